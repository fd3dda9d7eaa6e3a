"""Rules of the primitives that reduce, contract, pool, look up or mix along an axis, and of all."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from hybrid_jax.core import layout
from hybrid_jax.core.elementwise import ELEMENTWISE, elementwise, product
from hybrid_jax.core.labels import Labels, Value, join_origins, sizes

NEUTRAL = {"reduce_sum": 0.0, "reduce_prod": 1.0}
"""Reductions -> what changes nothing in them; of the others nothing is known to."""
MADE_UP: dict[str, Callable[..., jax.Array]] = {
    "reduce_sum": lambda kept, rest, n: kept + jnp.asarray(n, kept.dtype) * rest,
    "reduce_max": lambda kept, rest, n: jnp.maximum(kept, rest),
    "reduce_min": lambda kept, rest, n: jnp.minimum(kept, rest),
}
"""Reductions that may lose n equal entries -> that of what is left together with these."""


def counting(name: str, axes: Sequence[int], x: Value) -> list[int]:
    """Those of the axes that a reduction runs over along which masked channels count."""
    return [a for a in axes if x.labels[a].any() and x.rest[a] != NEUTRAL.get(name, math.nan)]


def _reduce(name: str, keeps: Callable[[float | None], float | None]):
    """A reduction: where masked channels count and it can't be made up for them, they stay."""

    def rule(labels, params, values, outvars):
        x = values[0]
        counted = counting(name, params["axes"], x)
        for axis in counted:
            rest = x.rest[axis]
            if name not in MADE_UP or len(counted) > 1 or rest is None or rest != rest:
                labels.freeze(x.labels[axis], "is reduced over where a masked channel counts")
        x = x.plain()
        kept = [axis for axis in range(len(x.shape)) if axis not in params["axes"]]
        rest = tuple(keeps(x.rest[axis]) for axis in kept)
        return [Value(tuple(x.labels[axis] for axis in kept), rest, x.origin)] * len(outvars)

    return rule


def _zero_stays(rest):
    """Sums of zeros are zero, and of what is not finite (NaN) neither."""
    return rest if rest == 0 or rest != rest else None


def _along(parameter: str):
    """A primitive that mixes one axis and treats the others alike (cumsum, sort, reverse, …)."""

    def rule(labels, params, values, outvars):
        where = np.atleast_1d(params[parameter])
        for value in values:
            for axis in where:
                labels.freeze(value.labels[axis], "is mixed along by a scan or sort")
            for a, b in zip(values[0].labels, value.labels, strict=True):
                labels.tie(a, b)
        x = values[0]
        return [Value(x.labels, (None,) * len(x.shape), x.origin)] * len(outvars)

    return rule


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


def gather_axes(params, shape: Sequence[int]) -> dict[int, int]:
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
    whole = gather_axes(params, x.shape)
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


def _contract(labels, x, y, i, j):
    labels.tie(x.labels[i], y.labels[j])
    if product(x.rest[i], y.rest[j]) != 0:
        for a in (x.labels[i], y.labels[j]):
            labels.freeze(a, "is contracted where a masked channel counts")


def _dot(labels, params, values, outvars):
    x, y = values
    (x_in, y_in), (x_batch, y_batch) = params["dimension_numbers"]
    for i, j in zip(x_in, y_in, strict=True):
        _contract(labels, x, y, i, j)
    out_labels, out_rest = [], []
    for i, j in zip(x_batch, y_batch, strict=True):
        labels.tie(x.labels[i], y.labels[j])
        out_labels.append(x.labels[i] if not x.labels[i].any() else y.labels[j])
        out_rest.append(_zero_stays(product(x.rest[i], y.rest[j])))
    for value, used in ((x, (*x_in, *x_batch)), (y, (*y_in, *y_batch))):
        for axis in range(len(value.shape)):
            if axis not in used:
                out_labels.append(value.labels[axis])
                out_rest.append(_zero_stays(value.rest[axis]))
    return [Value(tuple(out_labels), tuple(out_rest), x.origin)]


def _convolution(labels, params, values, outvars):
    x, kernel = values
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1:
        return None
    (x_batch, x_in, *x_space), (k_out, k_in, *k_space) = numbers.lhs_spec, numbers.rhs_spec
    for value, axes in ((x, x_space), (kernel, k_space)):
        for axis in axes:
            labels.freeze(value.labels[axis], "is a spatial axis of a convolution")
    channels, inside, outside = x.labels[x_in], kernel.labels[k_in], kernel.labels[k_out]
    alone = groups > 1 and len(inside) == 1
    if groups == 1:
        _contract(labels, x, kernel, x_in, k_in)
    elif alone:
        # Depthwise: a channel leaves with all the outputs that it alone feeds.
        labels.tie(np.repeat(channels, len(outside) // groups), outside)
    else:
        # Grouped: every group keeps the same places, or the groups would no longer be equal.
        for place in channels.reshape(groups, -1):
            labels.tie(inside, place)
        if product(x.rest[x_in], kernel.rest[k_in]) != 0:
            labels.freeze(inside, "is contracted where a masked channel counts")
        first, *others = outside.reshape(groups, -1)
        for other in others:
            labels.tie(first, other)
    out_labels = [np.zeros(n, np.int32) for n in sizes(outvars[0].aval.shape)]
    out_rest: list[Any] = [None] * len(out_labels)
    batch, feature, *_ = numbers.out_spec
    out_labels[batch], out_rest[batch] = x.labels[x_batch], _zero_stays(x.rest[x_batch])
    # A channel of zeros makes zeros, alone with any kernel.
    made = product(x.rest[x_in], kernel.rest[k_out]) if alone else kernel.rest[k_out]
    out_labels[feature], out_rest[feature] = outside, _zero_stays(made)
    return [Value(tuple(out_labels), tuple(out_rest), x.origin)]


def _window(keeps: Callable[[float | None], float | None]):
    """Pooling: an axis with window 1 passes, another is frozen."""

    def rule(labels, params, values, outvars):
        x, out_labels, out_rest = values[0], [], []
        for axis, size in enumerate(sizes(outvars[0].aval.shape)):
            trivial = params["window_dimensions"][axis] == 1 and size == x.shape[axis]
            if not trivial:
                labels.freeze(x.labels[axis], "is pooled over")
            out_labels.append(x.labels[axis] if trivial else np.zeros(size, np.int32))
            out_rest.append(keeps(x.rest[axis]) if trivial else None)
        return [Value(tuple(out_labels), tuple(out_rest), x.origin)]

    return rule


def _same(rest):
    return rest


def _across_devices(keeps: Callable[[float | None], float | None]):
    """Sums and the like over a mesh axis: every index meets the same index on other devices."""

    def rule(labels, params, values, outvars):
        if any(isinstance(axis, int) for axis in params["axes"]):
            return None
        return [Value(x.labels, tuple(keeps(rest) for rest in x.rest), x.origin) for x in values]

    return rule


RULES = layout.RULES | {
    "psum": _across_devices(_zero_stays),
    "psum_invariant": _across_devices(_zero_stays),
    "pmax": _across_devices(_same),
    "pmin": _across_devices(_same),
    **{name: _reduce(name, _zero_stays) for name in ("reduce_sum", "reduce_prod")},
    **{name: _reduce(name, _same) for name in ("reduce_max", "reduce_min")},
    **{
        name: _reduce(name, lambda rest: None)
        for name in ("reduce_and", "reduce_or", "argmax", "argmin")
    },
    "rev": _along("dimensions"),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along("axis")),
    "sort": _along("dimension"),
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "reduce_window_max": _window(_same),
    "reduce_window_min": _window(_same),
    "reduce_window_sum": _window(_zero_stays),
}
"""Primitives -> rule(labels, params, values, outvars) -> output values, or None for a barrier."""


def propagate(labels: Labels, eqn: jex.JaxprEqn, values: list[Value]) -> list[Value] | None:
    """Labels of an equation's outputs, tied and frozen; None without a rule: it is a barrier."""
    name = eqn.primitive.name
    origin = join_origins(values)
    if name in ELEMENTWISE:
        return [elementwise(labels, eqn, values, origin)]
    if name not in ("broadcast_in_dim", *MADE_UP):
        values = [value.plain() for value in values]
        # What constants alone make is computed in full, so that an axis of it is as free as theirs.
        rule = RULES.get(name) if origin else None
    else:
        rule = RULES[name]
    outs = rule(labels, eqn.params, values, eqn.outvars) if rule else None
    if outs is None:
        return None
    for out in outs:
        for axis in out.labels:
            if len(axis) == 1:
                labels.freeze(axis, "is picked out alone")
    return [dataclasses.replace(out, origin=origin) for out in outs]
