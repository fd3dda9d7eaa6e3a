"""Running a traced program on smaller arrays, equation by equation."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from hybrid_jax.core import interpreter
from hybrid_jax.core.channels import components
from hybrid_jax.core.graph import Graph
from hybrid_jax.core.labels import Value, sizes
from hybrid_jax.core.primitives import PRIMITIVES
from hybrid_jax.core.rests import Rests

Kept = Mapping[str, tuple[np.ndarray, ...]]
"""{path: for each axis of the parameter the indices that stay, sorted}."""


def take(x: Any, indices: Sequence[np.ndarray]) -> Any:
    """x[np.ix_(*indices)], touching only the axes that lose something."""
    for axis, index in enumerate(indices):
        if len(index) != sizes(x.shape)[axis]:
            x = jnp.take(x, index, axis=axis, unique_indices=True, indices_are_sorted=True)
    return x


class Plan:
    """Which indices of every array in a traced program stay, and how each equation is changed."""

    def __init__(self, graph: Graph, kept: Kept):
        self.graph = graph
        axes = [
            (path, axis, own)
            for path, value in zip(graph.parameters, graph.arguments, strict=False)
            for axis, own in enumerate(value.labels)
        ]
        stay = [
            (own[kept[path][axis]], "is coupled with one that stays") for path, axis, own in axes
        ]
        found = components(graph.analysis.labels, stay)
        self.alive = np.ones(len(found.of), bool)
        for path, axis, own in axes:
            gone = found.of[np.delete(own, kept[path][axis])]
            for component in gone.tolist():
                if component in found.reasons:
                    raise ValueError(
                        f"kept must keep {path!r} whole on axis {axis}: "
                        f"a removed channel {found.reasons[component]}"
                    )
            self.alive[gone] = False
        self.alive = self.alive[found.of]
        self.active = {
            path[:n]
            for path, (ins, outs) in graph.analysis.equations.items()
            if any(not all(k.all() for k in self.keeps(v)) for v in [*ins, *outs])
            for n in range(1, len(path) + 1)
        }

    def keeps(self, value: Value) -> list[np.ndarray]:
        """For each axis of an array, bool[n]: which indices stay."""
        return [self.alive[labels] for labels in value.labels]

    def rule(self) -> interpreter.Rule:
        """The rule of one run: it runs each equation on the smaller arrays."""
        equations, barriers = self.graph.analysis.equations, self.graph.analysis.barriers
        rests = Rests()

        def rule(path, eqn, values):
            ins, outs = ([self.keeps(v) for v in known] for known in equations[path])
            if path in barriers:
                # Its inputs are whole: computed in full, then sliced.
                full = interpreter.bind(eqn, values)
                return [take(out, _indices(keep)) for out, keep in zip(full, outs, strict=True)], {}
            known = PRIMITIVES.get(eqn.primitive.name)
            resize = known and known.resize
            results = resize(eqn, values, ins, outs) if resize else interpreter.bind(eqn, values)
            if known and known.made_up:
                results = rests.made_up(eqn, values, equations[path][0][0], ins[0], results[0])
            elif len(outs) == 1:
                rests.follow(eqn, values, *equations[path], outs[0])
            return results, {}

        return rule

    def cut_constants(self, path: interpreter.Path, values: list[Any]) -> list[Any]:
        """What an equation takes, with the constants sliced."""
        known = self.graph.analysis.equations[path][0]
        cut = {i: _indices(self.keeps(known[i])) for i in self.graph.analysis.constants[path]}
        return [take(v, cut[i]) if i in cut else v for i, v in enumerate(values)]


def _indices(keep: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [np.flatnonzero(axis) for axis in keep]
