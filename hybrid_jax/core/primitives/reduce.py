"""Primitives that reduce, pool, or mix along an axis."""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from hybrid_jax.core.labels import Value, sizes
from hybrid_jax.core.primitives.base import PRIMITIVES, Primitive

_NEUTRAL = {"reduce_sum": 0.0, "reduce_prod": 1.0}
"""Reductions -> what changes nothing in them; of the others nothing is known to."""
_MADE_UP: dict[str, Callable] = {
    "reduce_sum": lambda kept, rest, n: kept + jnp.asarray(n, kept.dtype) * rest,
    "reduce_max": lambda kept, rest, n: jnp.maximum(kept, rest),
    "reduce_min": lambda kept, rest, n: jnp.minimum(kept, rest),
}
"""Reductions that may lose n equal entries -> that of what is left together with these."""


def counting(name: str, axes: Sequence[int], x: Value) -> list[int]:
    """Those of the axes that a reduction runs over along which masked channels count."""
    return [a for a in axes if x.labels[a].any() and x.rest[a] != _NEUTRAL.get(name, math.nan)]


def _reduce(name: str, keeps: Callable[[float | None], float | None]) -> Primitive:
    """A reduction: where masked channels count and it can't be made up for them, they stay."""

    def rule(labels, params, values, outvars):
        x = values[0]
        counted = counting(name, params["axes"], x)
        for axis in counted:
            rest = x.rest[axis]
            if name not in _MADE_UP or len(counted) > 1 or rest is None or rest != rest:
                labels.freeze(x.labels[axis], "is reduced over where a masked channel counts")
        x = x.plain()
        kept = [axis for axis in range(len(x.shape)) if axis not in params["axes"]]
        rest = tuple(keeps(x.rest[axis]) for axis in kept)
        return [Value(tuple(x.labels[axis] for axis in kept), rest, x.origin)] * len(outvars)

    made_up = _MADE_UP.get(name)
    return Primitive(rule, made_up=made_up, uniform=made_up is not None)


def zero_stays(rest):
    """Sums of zeros are zero, and of what is not finite (NaN) neither."""
    return rest if rest == 0 or rest != rest else None


def _along(parameter: str) -> Primitive:
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

    return Primitive(rule)


def _window(keeps: Callable[[float | None], float | None]) -> Primitive:
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

    return Primitive(rule)


def _same(rest):
    return rest


def _across_devices(keeps: Callable[[float | None], float | None]) -> Primitive:
    """Sums and the like over a mesh axis: every index meets the same index on other devices."""

    def rule(labels, params, values, outvars):
        if any(isinstance(axis, int) for axis in params["axes"]):
            return None
        return [Value(x.labels, tuple(keeps(rest) for rest in x.rest), x.origin) for x in values]

    return Primitive(rule)


PRIMITIVES |= {
    **{name: _reduce(name, zero_stays) for name in ("reduce_sum", "reduce_prod")},
    **{name: _reduce(name, _same) for name in ("reduce_max", "reduce_min")},
    **{
        name: _reduce(name, lambda rest: None)
        for name in ("reduce_and", "reduce_or", "argmax", "argmin")
    },
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along("axis")),
    "sort": _along("dimension"),
    # In which direction an axis runs matters to nothing that is asked of a kernel.
    "rev": Primitive(_along("dimensions").labels, arrange=lambda a, params, shape, outs: [a]),
    "reduce_window_max": _window(_same),
    "reduce_window_min": _window(_same),
    "reduce_window_sum": _window(zero_stays),
    "psum": _across_devices(zero_stays),
    "psum_invariant": _across_devices(zero_stays),
    "pmax": _across_devices(_same),
    "pmin": _across_devices(_same),
}
