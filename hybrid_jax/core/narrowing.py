"""The graph of the network that is left after a removal, without tracing that network."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from hybrid_jax.core.analysis import Analysis
from hybrid_jax.core.arrangement import narrowed
from hybrid_jax.core.channels import kept_along
from hybrid_jax.core.graph import Graph, from_analysis
from hybrid_jax.core.interpreter import in_derivative
from hybrid_jax.core.labels import Value
from hybrid_jax.core.sites import count_macs, describe


def narrow_graph(graph: Graph, keep: Mapping[str, Any]) -> Graph:
    """The graph of what `narrow` makes: parameters, sites, groups and costs after a removal.

    Nothing is traced, so that a search may ask for the cost of many removals. Groups keep their
    names; `jaxpr` stays the one before the removal. `keep` is {group name: bool[n]}, True where
    kept, a channel of each at least; groups left out are kept whole.
    """
    for name, kept in keep.items():
        if not np.any(kept):
            raise ValueError(f"keep[{name!r}] must keep a channel, got none")
    arguments = dict(zip(graph.parameters, graph.arguments, strict=False))
    of = graph.components.of
    removed = np.zeros(len(of), bool)
    for member, stays in kept_along(keep, graph.groups):
        removed[of[arguments[member.path].labels[member.axis][~stays]]] = True
    cut = _cutter(~removed[of])
    small = tuple(cut(value) for value in graph.arguments)
    parameters = {
        path: leaf.update(shape=value.shape)
        for (path, leaf), value in zip(graph.parameters.items(), small, strict=False)
    }
    shapes = {path: (leaf.shape, parameters[path].shape) for path, leaf in graph.parameters.items()}
    analysis = _cut_analysis(graph.analysis, cut, shapes)
    outputs = [cut(value) for value in graph.outputs]
    return from_analysis(
        graph.jaxpr, graph.out_tree, parameters, graph.batch, small, outputs, analysis
    )


def _cutter(alive: np.ndarray):
    """cut(value): its axes without the indices removed, equal arrays of labels to equal ones."""
    seen: dict[int, np.ndarray] = {}

    def cut_axis(labels):
        if id(labels) not in seen:
            stays = alive[labels]
            seen[id(labels)] = labels if stays.all() else labels[stays]
        return seen[id(labels)]

    def cut(value: Value) -> Value:
        labels = tuple(cut_axis(own) for own in value.labels)
        return Value(labels, value.rest, value.origin, value.constant)

    return cut


def _cut_analysis(analysis: Analysis, cut, shapes) -> Analysis:
    small = copy.copy(analysis)
    small.equations = {
        path: ([cut(v) for v in ins], [cut(v) for v in outs])
        for path, (ins, outs) in analysis.equations.items()
    }
    small.used = {
        id(new)
        for path, (ins, _) in analysis.equations.items()
        for old, value in zip(ins, small.equations[path][0], strict=True)
        for own, new in zip(old.labels, value.labels, strict=True)
        if id(own) in analysis.used
    }
    small.sites, small.macs = {}, 0
    for path, (eqn, calls) in analysis.contractions.items():
        # What takes whole inputs is computed whole, and its result cut.
        values, results = (analysis if path in analysis.barriers else small).equations[path]
        if not in_derivative(path):
            small.macs += calls * count_macs(eqn, values, results[0])
        if path in analysis.sites:
            old = analysis.sites[path]
            new = describe(eqn, values, results[0], old.kernel_operand, calls, analysis.counts)
            arrangement = narrowed(old.arrangement, *shapes[old.path])
            small.sites[path] = dataclasses.replace(
                new, name=old.name, path=old.path, arrangement=arrangement
            )
    return small
