"""Rules of the primitives that only move indices about, by name in `RULES`.

A rule is rule(labels, params, values, outvars) -> output values, or None if it cannot say.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybrid_jax.core.labels import UNIFORM, Value, common, sizes


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


def _tile(labels, params, values, outvars):
    x = values[0]
    out = tuple(
        labels.axis(n) if len(a) == 1 else np.tile(a, n)
        for a, n in zip(x.labels, params["reps"], strict=True)
    )
    return [Value(out, x.rest, x.origin, x.constant)]


RULES = {
    "optimization_barrier": lambda labels, params, values, outvars: values,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _reorder(_squeeze_axes),
    "transpose": _reorder(lambda params, x: params["permutation"]),
    "concatenate": _concatenate,
    "stack": _stack,
    "slice": _slice,
    "split": _split,
    "pad": _pad,
    "tile": _tile,
}
