"""Grids: scale, zero point and bounds of the numbers stored for a tensor, and rounding to them.

A grid is the set of values scale · (q − zero_point) with q a number of a code in [low, high]: an
integer, a sign or a float of 8 bits. But for signs, zero is always one of the values, exactly, so
what is pruned stays pruned.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core

OFF = 32
"""The bit-width that means: leave the tensor as it is."""

LEAST_SCALE = 2.0**-60
"""The least scale: that of a range that holds zero alone, or nothing, as one learned past zero.

In float32 the product of two such scales, and the quotient of any usual scale and this, are normal.
"""


class Range(NamedTuple):
    """The interval that a grid spans: float32, () or of the tensor's rank.

    Along each axis there is one for all, one for each index, or one for each of as many equal
    blocks of consecutive indices as the axis here is long. It does not depend on the bit-width, so
    that one range serves all of them.
    """

    low: jax.Array
    high: jax.Array


class Grid(NamedTuple):
    """The values scale · (q − zero_point), for the numbers q of a code in [low, high]."""

    scale: jax.Array  # float32, at least `LEAST_SCALE`; of the shape of a `Range`
    # Of scale's shape, the q that stands for zero: int32 in [low, high] for integers, float32 for
    # another code, and ½ for signs, which have no zero
    zero_point: jax.Array
    # The smallest number, (). Its dtype says what the numbers are: int32, bool for signs,
    # float8_e4m3fn or float8_e5m2
    low: jax.Array
    high: jax.Array  # the largest number, of the same dtype


def check_bits(name: str, bits: Any, supported: Sequence[int] = range(2, 9)) -> Any:
    """Returns `bits` if supported, or 32 for off; of a traced array only the dtype is checked.

    `name` is the argument's, for the message; `supported` are consecutive, and 32 is too.
    """
    if hasattr(bits, "dtype") and not jnp.issubdtype(bits.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got an array of {bits.dtype}")
    if isinstance(bits, jax.core.Tracer):
        return bits
    least, most = supported[0], supported[-1]
    for value in np.ravel(bits).tolist():
        if core.check_integer(name, value) not in (*supported, OFF):
            allowed = f"{least} to {most}" if least < most else least
            raise ValueError(f"{name} must be {allowed}, or {OFF} for off, got {value}")
    return bits


def extent(x: jax.Array, axes: tuple[int, ...] | None = None) -> Range:
    """The least and the greatest value of `x` over `axes` (kept, with length 1), or over all."""
    x, keep = x.astype(jnp.float32), axes is not None
    return Range(jnp.min(x, axes, keepdims=keep), jnp.max(x, axes, keepdims=keep))


def spread(tree: Any, shape: tuple[int, ...]) -> Any:
    """Repeats the entries of a range or grid over their blocks: what broadcasts stays as it is.

    `shape` is the tensor's.
    """

    def leaf(value):
        for axis, n in enumerate(shape if jnp.ndim(value) else ()):
            if value.shape[axis] not in (1, n):
                value = jnp.repeat(value, n // value.shape[axis], axis)
        return value

    return jax.tree.map(leaf, tree)


def blocks(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`x` as one row for each entry of a range of that shape, of the values that share it."""
    shape = shape or (1,) * x.ndim
    cut = x.reshape([size for m, n in zip(shape, x.shape, strict=True) for size in (m, n // m)])
    entries_first = jnp.moveaxis(cut, range(0, cut.ndim, 2), range(x.ndim))
    return entries_first.reshape(math.prod(shape), -1)


def steps(grid: Grid) -> tuple[jax.Array, jax.Array]:
    """The grid's ends in steps from zero: n = low − zero_point, p = high − zero_point; float32."""
    # Of integers the difference is taken in integers; the conversion is then none.
    low, high = (end.astype(grid.zero_point.dtype) for end in (grid.low, grid.high))
    lowest, highest = low - grid.zero_point, high - grid.zero_point
    return lowest.astype(jnp.float32), highest.astype(jnp.float32)


def nearest(v: jax.Array, grid: Grid, key: jax.Array | None = None) -> jax.Array:
    """Rounds steps from zero to the numbers of the grid's code, as if it had no ends.

    `v` is float32, x / scale. With a random key, one of the two numbers around v is drawn, such
    that the mean is v. Without, the nearest one is taken: of two integers or floats as near, the
    even one.
    """

    def whole(v):
        if key is None:
            return jnp.round(v)
        return jnp.floor(v + jax.random.uniform(key, v.shape))

    code = grid.low.dtype
    if code == jnp.bool_:
        # Signs are −½ and ½: between two integers. Zero counts as positive.
        return (jnp.floor(v) if key is None else whole(v - 0.5)) + 0.5
    if jnp.issubdtype(code, jnp.floating):
        spacing = _spacing(v, jnp.finfo(code))
        return whole(v / spacing) * spacing
    return whole(v)


def quantize(x: jax.Array, grid: Grid) -> jax.Array:
    """The numbers to store for `x`: clip(nearest(x / scale) + zero_point, low, high).

    They are of `x`'s shape and the grid's code: int32 in [low, high], so that int8 (symmetric) or
    uint8 (affine) can hold it; bool for signs; float8.

    Example:
      >>> from hybrid_jax.quantization.schemes import symmetric
      >>> grid = symmetric(Range(jnp.float32(-7.0), jnp.float32(7.0)), bits=4)
      >>> print(quantize(jnp.array([0.5, 1.5, -9.0]), grid))
      [ 0  2 -7]
    """
    grid = spread(grid, x.shape)
    zero_point = grid.zero_point
    return (rounded(x, grid).astype(zero_point.dtype) + zero_point).astype(grid.low.dtype)


def dequantize(q: jax.Array, grid: Grid) -> jax.Array:
    """The values of stored numbers `q`: scale · (q − zero_point), float32."""
    grid = spread(grid, q.shape)
    return (q.astype(grid.zero_point.dtype) - grid.zero_point).astype(jnp.float32) * grid.scale


def rounded(x: jax.Array, grid: Grid) -> jax.Array:
    """`x` in steps from zero, rounded and clipped: nearest(x / scale) in [n, p], float32."""
    grid = spread(grid, x.shape)
    return jnp.clip(nearest(x.astype(jnp.float32) / grid.scale, grid), *steps(grid))


def _spacing(v, info):
    """The distance of the floats around v; below the least normal number it stays the same."""
    exponent = jnp.maximum(jnp.frexp(v)[1] - 1, info.minexp)
    return jnp.ldexp(jnp.float32(1.0), exponent - info.nmant)
