"""Fake quantization: the grid's nearest value forwards, a documented formula backwards.

The three functions compute the same values, with n and p the ends of the grid in steps from zero,

    v = x / scale        x̂ = scale · clip(round(v), n, p)

and differ in their derivative. Here round(v) is what `grids.nearest` returns: for integers the
nearest one, for signs −½ or ½, for 8-bit floats the nearest of these; with a random key the number
drawn, of the two around v, such that the mean of x̂ is x within the grid's ends. All work in
float32 and return the dtype of `x`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_jax.quantization import grids, schemes
from hybrid_jax.quantization.surrogate import with_gradient


def fake_quant(x: jax.Array, grid: grids.Grid, key: jax.Array | None = None) -> jax.Array:
    """Quantizes and dequantizes, with the clipped straight-through gradient.

        ∂x̂/∂x = 1 where n ≤ round(v) ≤ p, else 0

    The grid gets no gradient.

    Source: Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, arXiv
    1308.3432.

    Example:
      >>> grid = schemes.symmetric(grids.Range(jnp.float32(-1.0), jnp.float32(1.0)), bits=2)
      >>> x = jnp.array([-3.0, -0.6, 0.2, 1.2])
      >>> print(fake_quant(x, grid), jax.grad(lambda x: fake_quant(x, grid).sum())(x))
      [-1. -1.  0.  1.] [0. 1. 1. 1.]
    """
    grid = grids.spread(grid, x.shape)
    lowest, highest = grids.steps(grid)
    nearest = grids.nearest(_real(x) / grid.scale, grid, key)
    inside = (lowest <= nearest) & (nearest <= highest)
    value = jnp.clip(nearest, lowest, highest) * grid.scale
    return with_gradient(value, jnp.where(inside, _real(x), 0.0)).astype(x.dtype)


def lsq(x: jax.Array, grid: grids.Grid, count: int, key: jax.Array | None = None) -> jax.Array:
    """Quantizes and dequantizes, with a learned step size.

        ∂x̂/∂x     = 1 where n < v < p, else 0
        ∂x̂/∂scale = g · (round(v) − v) where n < v < p,  g · n where v ≤ n,  g · p where v ≥ p
        g          = 1 / √(count · max(p, −n))

    `count` is N of the paper: how many weights, or how many features of one example, share a scale.

    Source: Esser et al., Learned Step Size Quantization, arXiv 1902.08153, equations 3 and 5 and
    section 2.2.

    Example:
      >>> grid = schemes.symmetric(grids.Range(jnp.float32(-7.0), jnp.float32(7.0)), bits=4)
      >>> def total(scale, x):
      ...     return lsq(x, grid._replace(scale=scale), count=7).sum()
      >>> print(jax.grad(total)(grid.scale, jnp.array([9.0])))  # g = 1/7, p = 7
      1.0
    """
    grid = grids.spread(grid, x.shape)
    lowest, highest = grids.steps(grid)
    v = _real(x) / grid.scale
    inside = (lowest < v) & (v < highest)
    nearest = jnp.clip(grids.nearest(v, grid, key), lowest, highest)
    slope = lax.stop_gradient(jnp.where(inside, nearest - v, nearest))
    damped = grid.scale * lax.rsqrt(count * jnp.maximum(highest, -lowest))
    learned = jnp.where(inside, _real(x), 0.0) + slope * damped
    return with_gradient(nearest * grid.scale, learned).astype(x.dtype)


def pact(
    x: jax.Array, span: grids.Range, bits: jax.Array | int, key: jax.Array | None = None
) -> jax.Array:
    """Quantizes to the affine grid of a learned clipping range.

        ∂x̂/∂x = 1 where low ≤ x ≤ high, else 0
        ∂x̂/∂high = 1 where x > high, else 0        ∂x̂/∂low = 1 where x < low, else 0

    With low = 0 this is PACT, high being its α; with low < 0 the same holds for the other end.
    `bits`, 1 to 8, may be traced.

    Source: Choi et al., PACT: Parameterized Clipping Activation for Quantized Neural Networks,
    arXiv 1805.06085, equations 1 to 3.

    Example:
      >>> alpha = jax.grad(lambda a: pact(jnp.arange(4.0), grids.Range(0.0 * a, a), 4).sum())
      >>> print(alpha(1.5))
      2.0
    """
    real, span = _real(x), grids.spread(span, x.shape)
    clipped = jnp.where(real < span.low, span.low, jnp.where(real > span.high, span.high, real))
    return with_gradient(fake_quant(real, schemes.affine(span, bits), key), clipped).astype(x.dtype)


def _real(x):
    return x.astype(jnp.float32)
