"""Primitives that keep all entries: reshaped, reordered, repeated."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybrid_jax.core import interpreter
from hybrid_jax.core.labels import UNIFORM, Value, common, sizes
from hybrid_jax.core.primitives.base import PRIMITIVES, Primitive


def left(shape: Sequence[Any], keep: Sequence[np.ndarray]) -> tuple[Any, ...]:
    """The shape that is left; a dimension that loses nothing stays as it is, symbolic or not."""
    return tuple(n if k.all() else int(k.sum()) for n, k in zip(shape, keep, strict=True))


def sized(name: str):
    """An equation whose parameter of that name is the size of its result."""
    return lambda eqn, values, ins, outs: interpreter.bind(
        eqn, values, **{name: left(eqn.params[name], outs[0])}
    )


def _broadcast(labels, params, values, outvars):
    x, shape = values[0], sizes(outvars[0].aval.shape)
    out_labels: list[Any] = [None] * len(shape)
    out_rest: list[Any] = [UNIFORM if x.constant is None else x.constant] * len(shape)
    x = x.plain()
    for axis, out in enumerate(params["broadcast_dimensions"]):
        if len(x.labels[axis]) == shape[out]:
            out_labels[out], out_rest[out] = x.labels[axis], x.rest[axis]
    filled = [labels.axis(n) if a is None else a for n, a in zip(shape, out_labels, strict=True)]
    return [Value(tuple(filled), tuple(out_rest), x.origin, x.constant)]


def _broadcast_arranged(a, params, shape, outs):
    """Only axes of a single index may be new."""
    axes = dict(zip(params["broadcast_dimensions"], a.axes, strict=True))
    if math.prod(outs[0]) != math.prod(shape):
        return [None]
    return [dataclasses.replace(a, axes=tuple(axes.get(i, ()) for i in range(len(outs[0]))))]


def segments(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Splits a reshape into the smallest runs of equal products; the first may be unequal."""
    runs, i, j = [], len(old), len(new)
    while i or j:
        left, right, a, b = [], [], 1, 1
        while not left or not right or a != b:
            if (a <= b and i) or not j:
                if not i:
                    break
                i -= 1
                left, a = [i, *left], a * old[i]
            else:
                j -= 1
                right, b = [j, *right], b * new[j]
        runs.append((left, right))
    return runs[::-1]


def _reshape(labels, params, values, outvars):
    x, shape = values[0], sizes(outvars[0].aval.shape)
    order = params["dimensions"] or range(len(x.shape))
    before = [x.labels[a] for a in order]
    out_labels = [np.zeros(n, np.int32) for n in shape]
    out_rest: list[Any] = [x.constant] * len(shape)
    for old, new in segments([len(a) for a in before], shape):
        axes = [before[a] for a in old if len(before[a]) > 1]
        live = [a for a in old if before[a].any()]
        new = [a for a in new if shape[a] > 1]
        if not live:
            continue
        if math.prod(map(len, axes)) != math.prod(shape[a] for a in new):
            for a in live:
                labels.freeze(before[a], "is reshaped together with a symbolic dimension")
            continue
        rest = common([x.rest[order[a]] for a in live])
        made = labels.split(labels.merge(axes), [shape[a] for a in new])
        for a, own in zip(new, made, strict=True):
            out_labels[a], out_rest[a] = own, rest
    return [Value(tuple(out_labels), tuple(out_rest), x.origin, x.constant)]


def _reshape_arranged(a, params, shape, outs):
    order = params.get("dimensions") or range(len(shape))
    left, axes = [f for i in order for f in a.axes[i]], []
    for n in outs[0]:
        own = []
        while n > 1:
            axis, size, step = left.pop(0)
            if n % size and size % n:
                return [None]
            taken = min(n, size)
            own.append((axis, taken, step * (size // taken)))
            if size > taken:
                left.insert(0, (axis, size // taken, step))
            n //= taken
        axes.append(tuple(own))
    return [dataclasses.replace(a, axes=tuple(axes))]


def _reorder(f):
    """A primitive that permutes, drops or keeps whole axes: f(params, rank) -> source axes."""

    def rule(labels, params, values, outvars):
        x, axes = values[0], f(params, values[0])
        picked = tuple(x.labels[a] for a in axes), tuple(x.rest[a] for a in axes)
        return [Value(*picked, x.origin, x.constant)]

    return rule


def _squeeze_axes(params, x):
    dropped = {a % len(x.shape) for a in params["dimensions"]}
    return [a for a in range(len(x.shape)) if a not in dropped]


def _transpose_arranged(a, params, shape, outs):
    return [dataclasses.replace(a, axes=tuple(a.axes[i] for i in params["permutation"]))]


def _tile(labels, params, values, outvars):
    x = values[0]
    out = tuple(
        labels.axis(n) if len(a) == 1 else np.tile(a, n)
        for a, n in zip(x.labels, params["reps"], strict=True)
    )
    return [Value(out, x.rest, x.origin, x.constant)]


def _tile_resized(eqn, values, ins, outs):
    """An axis of one index is as long as what is left of it repeated."""
    reps = [
        int(own.sum()) if len(before) == 1 else n
        for before, own, n in zip(ins[0], outs[0], eqn.params["reps"], strict=True)
    ]
    return interpreter.bind(eqn, values, reps=tuple(reps))


PRIMITIVES |= {
    "optimization_barrier": Primitive(lambda labels, params, values, outvars: values),
    "broadcast_in_dim": Primitive(_broadcast, sized("shape"), _broadcast_arranged, uniform=True),
    "reshape": Primitive(_reshape, sized("new_sizes"), _reshape_arranged),
    "squeeze": Primitive(
        _reorder(_squeeze_axes),
        arrange=lambda a, params, shape, outs: _reshape_arranged(a, {}, shape, outs),
    ),
    "transpose": Primitive(
        _reorder(lambda params, x: params["permutation"]), arrange=_transpose_arranged
    ),
    "tile": Primitive(_tile, _tile_resized),
}
