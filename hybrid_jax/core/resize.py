"""Running one equation on smaller arrays, where its parameters hold sizes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.core import interpreter
from hybrid_jax.core.labels import sizes
from hybrid_jax.core.rules import gather_axes


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
