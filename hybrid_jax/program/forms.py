"""How a convolution is computed, chosen by measurement: as one operation or as a matrix product.

XLA's convolutions are many times slower on a CPU for some shapes than the matrix product of what
each output position sees with the kernel, and a little faster for others. The sums are the same, of
integers to the last bit, so the choice is a matter of speed alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_jax.core.convolution import Conv, at_once, channels_last, taps


def convolve(
    op: Any, x: jax.Array, kernel: jax.Array, zero: int = 0, form: str = "conv"
) -> jax.Array:
    """A convolution without bias, summed in float32, or of int8 in int32; its padding holds `zero`.

    `op` is a `Conv`, `x` (B, H, W, C) and `kernel` (kh, kw, C / groups, O) of float32 or int8.
    """
    dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    x = pad(x, [*op.padding, (0, 0)], zero)
    # A border of zeros XLA makes part of the convolution, and of int8 with more than 16 outputs
    # reads memory then that is not its own.
    x = lax.optimization_barrier(x) if dtype == jnp.int32 else x
    conv = Conv(op.strides, ((0, 0),) * 2, (1, 1), op.dilation, op.groups, "highest", dtype)
    return FORMS[form](conv, x, kernel)


def pad(x: jax.Array, padding, zero: int | float) -> jax.Array:
    """(before, after) entries of `zero` along each axis but the batch."""
    widths = [(0, 0, 0), *((before, after, 0) for before, after in padding)]
    return lax.pad(x, jnp.asarray(zero, x.dtype), widths)


def _matmul(conv, x, kernel):
    depthwise = conv.groups == x.shape[-1] == kernel.shape[-1]
    return (taps if depthwise else at_once)(conv, x, kernel)


FORMS = {"conv": channels_last, "matmul": _matmul}
"""The forms of a convolution."""
