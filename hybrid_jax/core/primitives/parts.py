"""Primitives that take parts of an array, or put parts together."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.core import interpreter
from hybrid_jax.core.labels import Arrangement, Value, common, sizes
from hybrid_jax.core.primitives.base import PRIMITIVES, Primitive
from hybrid_jax.core.primitives.moves import left, sized


def _slice(labels, params, values, outvars):
    x = values[0]
    strides = params["strides"] or (1,) * len(x.shape)
    cuts = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    symbolic = [not isinstance(n, int | np.integer) for n in outvars[0].aval.shape]
    out = tuple(
        a if whole else a[slice(*cut)]
        for a, cut, whole in zip(x.labels, cuts, symbolic, strict=True)
    )
    return [Value(out, x.rest, x.origin, x.constant)]


def _slice_resized(eqn, values, ins, outs):
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


def _slice_arranged(a, params, shape, outs):
    strides = params["strides"] or (1,) * len(shape)
    return [_part(a, params["start_indices"], params["limit_indices"], strides, shape)]


def _part(a, starts, limits, strides, shape):
    """The arrangement of a slice; start None is one of the equal parts, which are stacked."""
    start, stack, axes, count = list(a.start), list(a.stack), [], a.count
    for own, low, high, stride, n in zip(a.axes, starts, limits, strides, shape, strict=True):
        taken = high if low is None else -(-(high - low) // stride)
        if taken == n:
            axes.append(own)
            continue
        if len(own) != 1 or (low is None and n % taken):
            return None
        [(axis, _, step)] = own
        if low is None:
            stack.append((axis, n // taken, taken * step))
        else:
            start[axis] += low * step
            count = count // n * taken
        axes.append(((axis, taken, step * stride),) if taken > 1 else ())
    return Arrangement(a.path, count, tuple(start), tuple(stack), tuple(axes))


def _split(labels, params, values, outvars):
    x, where = values[0], params["axis"]
    pieces = np.split(x.labels[where], np.cumsum(params["sizes"])[:-1])
    return [
        Value(
            tuple(piece if a == where else b for a, b in enumerate(x.labels)),
            x.rest,
            x.origin,
            x.constant,
        )
        for piece in pieces
    ]


def _split_resized(eqn, values, ins, outs):
    axis = eqn.params["axis"]
    return interpreter.bind(
        eqn, values, sizes=left(eqn.params["sizes"], [keep[axis] for keep in outs])
    )


def _split_arranged(a, params, shape, outs):
    found, low = [], 0
    for size in params["sizes"]:
        starts, limits = [0] * len(shape), list(shape)
        starts[params["axis"]], limits[params["axis"]] = low, low + size
        found.append(_part(a, starts, limits, (1,) * len(shape), shape))
        low += size
    return found


def _dynamic_slice(labels, params, values, outvars):
    """An axis taken whole passes, another is frozen."""
    x, out_labels, out_rest = values[0], [], []
    for axis, size in enumerate(params["slice_sizes"]):
        whole = size == len(x.labels[axis])
        if not whole:
            labels.freeze(x.labels[axis], "is sliced at a computed index")
        out_labels.append(x.labels[axis] if whole else np.zeros(size, np.int32))
        out_rest.append(x.rest[axis] if whole else None)
    return [Value(tuple(out_labels), tuple(out_rest), x.origin)]


def _dynamic_slice_arranged(a, params, shape, outs):
    ones = (1,) * len(shape)
    return [_part(a, (None,) * len(shape), params["slice_sizes"], ones, shape)]


def _gather_axes(params, shape: Sequence[int]) -> dict[int, int]:
    """Operand axes that a gather takes whole -> their axis in the output."""
    numbers = params["dimension_numbers"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [axis for axis in range(len(shape)) if axis not in gone]
    return {
        axis: out
        for axis, out in zip(kept, numbers.offset_dims, strict=True)
        if params["slice_sizes"][axis] == shape[axis] and axis not in numbers.start_index_map
    }


def _gather(labels, params, values, outvars):
    x, indices = values
    whole = _gather_axes(params, x.shape)
    for axis, a in enumerate(x.labels):
        if axis not in whole:
            labels.freeze(a, "is gathered from")
    for a in indices.labels:
        labels.freeze(a, "indexes a gather")
    out_labels = [np.zeros(n, np.int32) for n in sizes(outvars[0].aval.shape)]
    out_rest: list[Any] = [None] * len(out_labels)
    for axis, out in whole.items():
        out_labels[out], out_rest[out] = x.labels[axis], x.rest[axis]
    return [Value(tuple(out_labels), tuple(out_rest), x.origin)]


def _gather_resized(eqn, values, ins, outs):
    sizes = list(eqn.params["slice_sizes"])
    for axis in _gather_axes(eqn.params, [len(k) for k in ins[0]]):
        sizes[axis] = int(ins[0][axis].sum())
    return interpreter.bind(eqn, values, slice_sizes=tuple(sizes))


def _pad(labels, params, values, outvars):
    x, filler = values
    out_labels, out_rest = [], []
    for axis, rest, (low, high, inside) in zip(
        x.labels, x.rest, params["padding_config"], strict=True
    ):
        if inside or low < 0 or high < 0:
            labels.freeze(axis, "is padded between its channels or cut by a negative pad")
            size = len(axis) + (len(axis) - 1) * inside + low + high
            out_labels.append(np.zeros(size, np.int32))
            out_rest.append(None)
        else:
            out_labels.append(np.concatenate([labels.fresh(low), axis, labels.fresh(high)]))
            out_rest.append(common([rest, filler.constant]) if low or high else rest)
    return [Value(tuple(out_labels), tuple(out_rest), x.origin)]


def _pad_resized(eqn, values, ins, outs):
    config = []
    for keep, (low, high, inside) in zip(outs[0], eqn.params["padding_config"], strict=True):
        if low > 0 or high > 0:
            end = len(keep) - max(high, 0)
            low = int(keep[:low].sum()) if low > 0 else low
            high = int(keep[end:].sum()) if high > 0 else high
        config.append((low, high, inside))
    return interpreter.bind(eqn, values, padding_config=tuple(config))


def _concatenate(labels, params, values, outvars):
    where, first = params["dimension"], values[0]
    for other in values[1:]:
        for axis in range(len(first.shape)):
            if axis != where:
                labels.tie(first.labels[axis], other.labels[axis])
    joined = np.concatenate([value.labels[where] for value in values])
    out = tuple(joined if axis == where else a for axis, a in enumerate(first.labels))
    rest = tuple(common([v.rest[axis] for v in values]) for axis in range(len(out)))
    return [Value(out, rest, first.origin, common([v.constant for v in values]))]


def _stack(labels, params, values, outvars):
    first, where = values[0], params["axis"]
    for other in values[1:]:
        for a, b in zip(first.labels, other.labels, strict=True):
            labels.tie(a, b)
    new = np.zeros(len(values), np.int32)
    rest = [common([v.rest[axis] for v in values]) for axis in range(len(first.shape))]
    out_labels = (*first.labels[:where], new, *first.labels[where:])
    return [Value(out_labels, (*rest[:where], None, *rest[where:]), first.origin)]


PRIMITIVES |= {
    "slice": Primitive(_slice, _slice_resized, _slice_arranged),
    "split": Primitive(_split, _split_resized, _split_arranged),
    "dynamic_slice": Primitive(_dynamic_slice, sized("slice_sizes"), _dynamic_slice_arranged),
    "gather": Primitive(_gather, _gather_resized),
    "pad": Primitive(_pad, _pad_resized),
    "concatenate": Primitive(_concatenate),
    "stack": Primitive(_stack),
}
