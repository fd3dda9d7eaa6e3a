"""Schemes: from a range and a bit-width to a grid of integers, of signs or of 8-bit floats.

A scheme is a function (range, bits) -> Grid; bits may be a traced array, so one compilation serves
every bit-width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_jax.quantization import grids, surrogate

# A grid is computed for OFF too (its result is then not used); its bounds must fit an int32.
_WIDEST = 16


def symmetric(span: grids.Range, bits: jax.Array | int) -> grids.Grid:
    """The signed grid around zero: q in [−Q, Q] with Q = 2^(bits−1) − 1 (narrow), zero point 0.

    scale = max(−low, high) / Q, and at least `grids.LEAST_SCALE` (a dead channel). At 2 bits this
    is the ternary grid {−scale, 0, scale}. In the backward pass the range follows the scale as
    `follow` states. `bits`, 2 to 8, may be traced, in which case 1, that has no step, gives NaN.

    Example:
      >>> grid = symmetric(grids.Range(jnp.float32(-0.5), jnp.float32(1.4)), bits=4)
      >>> print(grid.scale, grid.zero_point, grid.low, grid.high)
      0.2 0 -7 7
    """
    most = (jnp.int32(1) << _width(bits) - 1) - 1
    scale = _floored(_reach(span) * _inverse(most))
    return follow(grids.Grid(scale, jnp.zeros(jnp.shape(scale), jnp.int32), -most, most), span)


def affine(span: grids.Range, bits: jax.Array | int) -> grids.Grid:
    """The unsigned grid: q in [0, 2^bits − 1], zero point where the range has zero.

    The range is first widened to hold zero, and scale = (high − low) / (2^bits − 1), and at least
    `grids.LEAST_SCALE` (an activation that is always 0). zero_point = round(−low / scale), which is
    0 for a range without negative values: the plain unsigned grid after a ReLU. At 1 bit the values
    are 0 and scale, or −scale and 0. In the backward pass the range follows the scale as `follow`
    states. `bits`, 1 to 8, may be traced.

    Source: Jacob et al., Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, arXiv 1712.05877, section 2.1.

    Example:
      >>> grid = affine(grids.Range(jnp.float32(-2.5), jnp.float32(5.0)), bits=4)
      >>> print(grid.scale, grid.zero_point, grid.low, grid.high)
      0.5 5 0 15
    """
    most = (jnp.int32(1) << _width(bits)) - 1
    low, high = jnp.minimum(span.low, 0.0), jnp.maximum(span.high, 0.0)
    scale = _floored((high - low) * _inverse(most))
    zero_point = jnp.clip(jnp.round(-low / scale).astype(jnp.int32), 0, most)
    return follow(grids.Grid(scale, zero_point, jnp.zeros_like(most), most), span)


def binary(span: grids.Range, bits: jax.Array | int = 1) -> grids.Grid:
    """The grid of signs: −scale / 2 and scale / 2, the ends of the range, and no zero.

    q is a bool, the zero point ½ and scale = 2 · max(−low, high), and at least
    `grids.LEAST_SCALE` (a dead channel). A zero becomes positive. The ends of the range are the
    two values, and `mean_abs` finds those of XNOR-Net. `bits` change nothing.

    Source: Rastegari et al., XNOR-Net: ImageNet Classification Using Binary Convolutional Neural
    Networks, arXiv 1603.05279, section 3.1.
    """
    scale = _floored(2.0 * _reach(span))
    half = jnp.full(jnp.shape(scale), 0.5, jnp.float32)
    return follow(grids.Grid(scale, half, jnp.bool_(False), jnp.bool_(True)), span)


def e4m3(span: grids.Range, bits: jax.Array | int = 8) -> grids.Grid:
    """The 8-bit floats with 4 bits of exponent and 3 of mantissa, from −448 to 448, scaled.

    scale = max(−low, high) / 448, and at least `grids.LEAST_SCALE`. What lies outside saturates;
    the code's NaN is never used. `bits` change nothing.

    Source: Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433, section 3.
    """
    return _float8(span, jnp.float8_e4m3fn)


def e5m2(span: grids.Range, bits: jax.Array | int = 8) -> grids.Grid:
    """The 8-bit floats with 5 bits of exponent and 2 of mantissa, from −57344 to 57344, scaled.

    Otherwise it is like `e4m3`; the code's infinities are never used.
    """
    return _float8(span, jnp.float8_e5m2)


def follow(grid: grids.Grid, span: grids.Range) -> grids.Grid:
    """Lets the range learn what the scale learns, whatever the bit-width.

    With n = grid.low − zero_point and p = grid.high − zero_point, the range [n·scale, p·scale] gets
    the gradient

        ∂/∂span.high := p · ∂/∂scale        ∂/∂span.low := n · ∂/∂scale

    which is not the chain rule (that would be 1 / (p − n) in place of p and n): a step of gradient
    descent on the range then does exactly what the same step does on the scale, so that step sizes
    found for scales hold, the zero point stays where it is, and an end that is zero stays zero.
    """
    lowest, highest = grids.steps(grid)
    tied = highest * span.high + lowest * span.low
    return grid._replace(scale=surrogate.with_gradient(lax.stop_gradient(grid.scale), tied))


def power_of_two(grid: grids.Grid) -> grids.Grid:
    """The same grid with its scale rounded up to a power of two, so that it clips nothing more.

    The zero point stays, and the derivative is that of the scale before rounding.
    """
    mantissa, exponent = jnp.frexp(grid.scale)  # scale = mantissa · 2^exponent, ½ ≤ mantissa < 1
    rounded_up = jnp.ldexp(jnp.float32(1.0), jnp.where(mantissa == 0.5, exponent - 1, exponent))
    return grid._replace(scale=surrogate.with_gradient(rounded_up, grid.scale))


class Scheme(NamedTuple):
    """A scheme with what it supports."""

    grid: Callable[..., grids.Grid]  # (range, bits) -> Grid
    bits: Sequence[int]  # the bit-widths that it has, beside 32 for off


SCHEMES = {
    "symmetric": Scheme(symmetric, range(2, 9)),
    "affine": Scheme(affine, range(1, 9)),
    "binary": Scheme(binary, range(1, 2)),
    "e4m3": Scheme(e4m3, range(8, 9)),
    "e5m2": Scheme(e5m2, range(8, 9)),
}


def _float8(span, code):
    info = jnp.finfo(code)
    scale = _floored(_reach(span) * (1.0 / float(info.max)))
    zero_point = jnp.zeros(jnp.shape(scale), jnp.float32)
    return follow(grids.Grid(scale, zero_point, jnp.array(info.min), jnp.array(info.max)), span)


def _reach(span):
    # Not the larger magnitude: of an end learned past zero that would grow as the range shrinks.
    return jnp.maximum(-span.low, span.high)


def _width(bits):
    return jnp.minimum(jnp.asarray(bits, jnp.int32), _WIDEST)


def _inverse(most):
    # A division by what is known while compiling becomes a product with the reciprocal; written as
    # one, scales are equal to the bit, compiled or not, with bits traced or known.
    return 1.0 / most.astype(jnp.float32)


def _floored(scale):
    return jnp.maximum(scale, grids.LEAST_SCALE)
