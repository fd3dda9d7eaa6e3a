"""Running a traced program on smaller arrays, equation by equation."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from hybrid_jax.core import interpreter
from hybrid_jax.core.channels import components
from hybrid_jax.core.graph import Graph
from hybrid_jax.core.labels import Value, sizes
from hybrid_jax.core.rules import gather_axes

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


def _resize_broadcast(eqn, values, ins, outs):
    return interpreter.bind(eqn, values, shape=_sizes(eqn.params["shape"], outs[0]))


def _resize_reshape(eqn, values, ins, outs):
    return interpreter.bind(eqn, values, new_sizes=_sizes(eqn.params["new_sizes"], outs[0]))


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


def _resize_dynamic_slice(eqn, values, ins, outs):
    return interpreter.bind(eqn, values, slice_sizes=_sizes(eqn.params["slice_sizes"], outs[0]))


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


RESIZE = {
    "broadcast_in_dim": _resize_broadcast,
    "reshape": _resize_reshape,
    "slice": _resize_slice,
    "split": _resize_split,
    "pad": _resize_pad,
    "dynamic_slice": _resize_dynamic_slice,
    "gather": _resize_gather,
    "conv_general_dilated": _resize_convolution,
}
"""Primitives whose parameters hold sizes -> f(equation, values, kept in, kept out) -> outputs."""


class Plan:
    """Which indices of every array in a traced program stay, and how each equation is changed."""

    def __init__(self, graph: Graph, kept: Kept):
        self.graph = graph
        found = components(graph.analysis.labels)
        removed: set[int] = set()
        for (path, leaf), value in zip(graph.parameters.items(), graph.arguments, strict=False):
            for axis, own in enumerate(value.labels):
                gone = np.setdiff1d(np.arange(leaf.shape[axis]), kept[path][axis])
                for component in np.unique(found.of[own[gone]]).tolist():
                    if component in found.reasons:
                        raise ValueError(
                            f"kept must keep {path!r} whole on axis {axis}: "
                            f"a removed channel {found.reasons[component]}"
                        )
                    removed.add(component)
        self.alive = ~np.isin(found.of, sorted(removed))
        for (path, leaf), value in zip(graph.parameters.items(), graph.arguments, strict=False):
            for axis, own in enumerate(value.labels):
                if np.flatnonzero(self.alive[own]).tolist() != kept[path][axis].tolist():
                    raise ValueError(
                        f"kept must remove coupled channels together, got {leaf.shape[axis]} -> "
                        f"{len(kept[path][axis])} at {path!r} on axis {axis}, which does not fit"
                    )
        self.active = {
            path[:n]
            for path, (ins, outs) in graph.analysis.equations.items()
            if any(not all(k.all() for k in self.keeps(v)) for v in [*ins, *outs])
            for n in range(1, len(path) + 1)
        }

    def keeps(self, value: Value) -> list[np.ndarray]:
        """For each axis of an array, bool[n]: which indices stay."""
        return [self.alive[labels] for labels in value.labels]

    def rule(self, path: interpreter.Path, eqn: jex.JaxprEqn, values: list[Any]):
        """Runs one equation on the smaller arrays."""
        ins, outs = self.graph.analysis.equations[path]
        ins, outs = [self.keeps(v) for v in ins], [self.keeps(v) for v in outs]
        if path in self.graph.analysis.barriers:
            # Its inputs are whole: computed in full, then sliced.
            full = interpreter.bind(eqn, values)
            return [take(out, _indices(keep)) for out, keep in zip(full, outs, strict=True)], {}
        resize = RESIZE.get(eqn.primitive.name)
        return resize(eqn, values, ins, outs) if resize else interpreter.bind(eqn, values), {}

    def constants(self, path: interpreter.Path, consts: Sequence[Any]) -> list[Any]:
        """The constants of a jaxpr, sliced."""
        known = self.graph.analysis.constants[path]
        return [take(c, _indices(self.keeps(v))) for c, v in zip(consts, known, strict=True)]


def _indices(keep: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [np.flatnonzero(axis) for axis in keep]
