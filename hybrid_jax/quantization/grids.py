"""Integer grids: from a range and a bit-width to scale, zero point and integer bounds.

A grid is the set of values scale · (q − zero_point) with q an integer in [low, high]. Zero is
always one of them, exactly, so what is pruned stays pruned. A scheme is a function
(range, bits) -> Grid; bits may be a traced array, so one compilation serves every bit-width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hybrid_jax import core
from hybrid_jax.quantization import surrogate

OFF = 32
"""The bit-width that means: leave the tensor as it is."""

# A grid is computed for OFF too (its result is then not used); its bounds must fit an int32.
_WIDEST = 16


class Range(NamedTuple):
    """The interval that a grid spans: float32, () or of the tensor's rank, broadcasting against it.

    It does not depend on the bit-width, so that one range serves all of them.
    """

    low: jax.Array
    high: jax.Array


class Grid(NamedTuple):
    """The values scale · (q − zero_point), for integers q in [low, high].

    Attributes:
      scale: float32, above 0; () or of the tensor's rank, broadcasting against it.
      zero_point: int32 of scale's shape, in [low, high]: the integer that stands for zero.
      low: int32 (), the smallest integer.
      high: int32 (), the largest integer.
    """

    scale: jax.Array
    zero_point: jax.Array
    low: jax.Array
    high: jax.Array


def check_bits(name: str, bits: Any) -> Any:
    """Returns `bits` if it is 2 to 8, or 32 for off; of a traced array only the dtype is checked.

    Raises:
      ValueError: If a concrete value is another number.
      TypeError: If an array is not one of integers.

    Example:
      >>> check_bits('weight_bits', 4)
      4
      >>> check_bits('weight_bits', 1)
      Traceback (most recent call last):
      ...
      ValueError: weight_bits must be 2 to 8, or 32 for off, got 1
    """
    if hasattr(bits, "dtype") and not jnp.issubdtype(bits.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got an array of {bits.dtype}")
    if isinstance(bits, jax.core.Tracer):
        return bits
    for value in np.ravel(bits).tolist():
        if core.check_integer(name, value) not in (*range(2, 9), OFF):
            raise ValueError(f"{name} must be 2 to 8, or {OFF} for off, got {value}")
    return bits


def extent(x: jax.Array, axes: tuple[int, ...] | None = None) -> Range:
    """The least and the greatest value of `x` over `axes` (kept, with length 1), or over all of it.

    Example:
      >>> low, high = extent(jnp.array([[-1.0, 3.0], [2.0, 0.5]]), axes=(0,))
      >>> print(low, high)
      [[-1.   0.5]] [[2. 3.]]
    """
    x, keep = x.astype(jnp.float32), axes is not None
    return Range(jnp.min(x, axes, keepdims=keep), jnp.max(x, axes, keepdims=keep))


def symmetric(span: Range, bits: jax.Array | int) -> Grid:
    """The signed grid around zero: q in [−Q, Q] with Q = 2^(bits−1) − 1 (narrow), zero point 0.

    scale = max(|low|, |high|) / Q, or 1 where the range is zero (a dead channel). In the backward
    pass the range follows the scale as `follow` states.

    Args:
      span: The range to cover.
      bits: int or int32 (), 2 to 8; may be traced.

    Example:
      >>> grid = symmetric(Range(jnp.float32(-0.5), jnp.float32(1.4)), bits=4)
      >>> print(grid.scale, grid.zero_point, grid.low, grid.high)
      0.2 0 -7 7
    """
    most = (jnp.int32(1) << _width(bits) - 1) - 1
    reach = jnp.maximum(jnp.abs(span.low), jnp.abs(span.high))
    scale = _nonzero(reach / most.astype(jnp.float32))
    return follow(Grid(scale, jnp.zeros(jnp.shape(scale), jnp.int32), -most, most), span)


def affine(span: Range, bits: jax.Array | int) -> Grid:
    """The unsigned grid: q in [0, 2^bits − 1], zero point where the range has zero.

    The range is first widened to hold zero, and scale = (high − low) / (2^bits − 1), or 1 where
    that is zero (an activation that is always 0). zero_point = round(−low / scale), which is 0 for
    a range without negative values: the plain unsigned grid after a ReLU. In the backward pass the
    range follows the scale as `follow` states.

    Args:
      span: The range to cover.
      bits: int or int32 (), 2 to 8; may be traced.

    Source: Jacob et al., Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, arXiv 1712.05877, section 2.1.

    Example:
      >>> grid = affine(Range(jnp.float32(-1.0), jnp.float32(2.0)), bits=4)
      >>> print(grid.scale, grid.zero_point, grid.low, grid.high)
      0.2 5 0 15
    """
    most = (jnp.int32(1) << _width(bits)) - 1
    low, high = jnp.minimum(span.low, 0.0), jnp.maximum(span.high, 0.0)
    scale = _nonzero((high - low) / most.astype(jnp.float32))
    zero_point = jnp.clip(jnp.round(-low / scale).astype(jnp.int32), 0, most)
    return follow(Grid(scale, zero_point, jnp.zeros_like(most), most), span)


def follow(grid: Grid, span: Range) -> Grid:
    """Lets the range learn what the scale learns, whatever the bit-width.

    With n = grid.low − zero_point and p = grid.high − zero_point, the range [n·scale, p·scale] gets
    the gradient

        ∂/∂span.high := p · ∂/∂scale        ∂/∂span.low := n · ∂/∂scale

    which is not the chain rule (that would be 1 / (p − n) in place of p and n): a step of gradient
    descent on the range then does exactly what the same step does on the scale, so that step sizes
    found for scales hold, the zero point stays where it is, and an end that is zero stays zero.
    """
    lowest, highest = steps(grid)
    tied = highest * span.high + lowest * span.low
    return grid._replace(scale=surrogate.with_gradient(lax.stop_gradient(grid.scale), tied))


def steps(grid: Grid) -> tuple[jax.Array, jax.Array]:
    """The grid's ends in steps from zero: n = low − zero_point, p = high − zero_point; float32."""
    lowest, highest = grid.low - grid.zero_point, grid.high - grid.zero_point
    return lowest.astype(jnp.float32), highest.astype(jnp.float32)


def quantize(x: jax.Array, grid: Grid) -> jax.Array:
    """The integers of `x`: clip(round(x / scale) + zero_point, low, high), round to nearest even.

    Args:
      x: Floating-point array.
      grid: The grid, broadcasting against it.

    Returns:
      int32 of `x`'s shape; in [low, high], so that int8 (symmetric) or uint8 (affine) can hold it.

    Example:
      >>> grid = symmetric(Range(jnp.float32(-7.0), jnp.float32(7.0)), bits=4)
      >>> print(quantize(jnp.array([0.5, 1.5, -9.0]), grid))
      [ 0  2 -7]
    """
    return rounded(x, grid).astype(jnp.int32) + grid.zero_point


def dequantize(q: jax.Array, grid: Grid) -> jax.Array:
    """The values of integers `q`: scale · (q − zero_point), float32.

    Example:
      >>> grid = affine(Range(jnp.float32(-1.0), jnp.float32(2.0)), bits=4)
      >>> print(dequantize(jnp.array([0, 5, 15]), grid))
      [-1.  0.  2.]
    """
    return (q.astype(jnp.int32) - grid.zero_point).astype(jnp.float32) * grid.scale


def rounded(x: jax.Array, grid: Grid) -> jax.Array:
    """`x` in whole steps from zero, clipped to the grid: round(x / scale) in [n, p], float32."""
    return jnp.clip(jnp.round(x.astype(jnp.float32) / grid.scale), *steps(grid))


def _width(bits):
    return jnp.minimum(jnp.asarray(bits, jnp.int32), _WIDEST)


def _nonzero(scale):
    # The least normal number: below it a backend may flush to zero, and x / scale would be NaN.
    return jnp.where(scale >= jnp.finfo(jnp.float32).tiny, scale, 1.0)
