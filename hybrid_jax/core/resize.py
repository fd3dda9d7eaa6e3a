"""Running a traced program on smaller arrays, equation by equation."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.core import interpreter
from hybrid_jax.core.channels import components
from hybrid_jax.core.graph import Graph
from hybrid_jax.core.labels import Value, sizes
from hybrid_jax.core.rests import Rests
from hybrid_jax.core.rules import MADE_UP, gather_axes

Kept = Mapping[str, tuple[np.ndarray, ...]]
"""{path: for each axis of the parameter the indices that stay, sorted}."""


def _sizes(shape: Sequence[Any], keep: Sequence[np.ndarray]) -> tuple[Any, ...]:
    """The shape that is left; a dimension that loses nothing stays as it is, symbolic or not."""
    return tuple(n if k.all() else int(k.sum()) for n, k in zip(shape, keep, strict=True))


def take(x: Any, indices: Sequence[np.ndarray]) -> Any:
    """x[np.ix_(*indices)], touching only the axes that lose something."""
    for axis, index in enumerate(indices):
        if len(index) != sizes(x.shape)[axis]:
            x = jnp.take(x, index, axis=axis, unique_indices=True, indices_are_sorted=True)
    return x


def _sized(name: str):
    """An equation whose parameter of that name is the size of its result."""
    return lambda eqn, values, ins, outs: interpreter.bind(
        eqn, values, **{name: _sizes(eqn.params[name], outs[0])}
    )


def _resize_slice(eqn, values, ins, outs):
    """Cuts by the surviving indices: a range where they form one, else a gather."""
    params, x = eqn.params, values[0]
    strides = params["strides"] or (1,) * x.ndim
    for axis, (start, limit, stride) in enumerate(
        zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    ):
        if ins[0][axis].all():
            x = jax.lax.slice_in_dim(x, start, limit, stride, axis)
            continue
        chosen = np.arange(start, limit, stride)[outs[0][axis]]
        position = (np.cumsum(ins[0][axis]) - 1)[chosen]
        step = int(position[1] - position[0]) if len(position) > 1 else 1
        if np.array_equal(position, position[:1] + step * np.arange(len(position))) and step > 0:
            low = int(position[0]) if len(position) else 0
            high = int(position[-1]) + 1 if len(position) else 0
            x = jax.lax.slice_in_dim(x, low, high, step, axis)
        else:
            x = jnp.take(x, position, axis=axis)
    return [x]


def _resize_split(eqn, values, ins, outs):
    axis = eqn.params["axis"]
    return interpreter.bind(
        eqn, values, sizes=_sizes(eqn.params["sizes"], [keep[axis] for keep in outs])
    )


def _resize_pad(eqn, values, ins, outs):
    config = []
    for keep, (low, high, inside) in zip(outs[0], eqn.params["padding_config"], strict=True):
        if low > 0 or high > 0:
            end = len(keep) - max(high, 0)
            low = int(keep[:low].sum()) if low > 0 else low
            high = int(keep[end:].sum()) if high > 0 else high
        config.append((low, high, inside))
    return interpreter.bind(eqn, values, padding_config=tuple(config))


def _resize_gather(eqn, values, ins, outs):
    sizes = list(eqn.params["slice_sizes"])
    for axis in gather_axes(eqn.params, [len(k) for k in ins[0]]):
        sizes[axis] = int(ins[0][axis].sum())
    return interpreter.bind(eqn, values, slice_sizes=tuple(sizes))


def _resize_convolution(eqn, values, ins, outs):
    groups = eqn.params["feature_group_count"]
    numbers = eqn.params["dimension_numbers"]
    if not outs[0][numbers.out_spec[1]].any():
        # No channel is left, which a convolution in groups refuses.
        return [jnp.zeros(_sizes(eqn.outvars[0].aval.shape, outs[0]), eqn.outvars[0].aval.dtype)]
    if groups > 1 and len(ins[1][numbers.rhs_spec[1]]) == 1:
        groups = int(ins[0][numbers.lhs_spec[1]].sum())
    return interpreter.bind(eqn, values, feature_group_count=groups)


def _resize_tile(eqn, values, ins, outs):
    """An axis of one index is as long as what is left of it repeated."""
    reps = [
        int(own.sum()) if len(before) == 1 else n
        for before, own, n in zip(ins[0], outs[0], eqn.params["reps"], strict=True)
    ]
    return interpreter.bind(eqn, values, reps=tuple(reps))


RESIZE = {
    "broadcast_in_dim": _sized("shape"),
    "reshape": _sized("new_sizes"),
    "slice": _resize_slice,
    "split": _resize_split,
    "pad": _resize_pad,
    "tile": _resize_tile,
    "dynamic_slice": _sized("slice_sizes"),
    "gather": _resize_gather,
    "conv_general_dilated": _resize_convolution,
}
"""Primitives whose parameters hold sizes -> f(equation, values, kept in, kept out) -> outputs."""


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
            resize = RESIZE.get(eqn.primitive.name)
            results = resize(eqn, values, ins, outs) if resize else interpreter.bind(eqn, values)
            if eqn.primitive.name in MADE_UP:
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
