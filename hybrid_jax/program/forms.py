"""How a convolution is computed, chosen by measurement: as one operation or as a matrix product.

XLA's convolutions are many times slower on a CPU for some shapes than the matrix product of what
each output position sees with the kernel, and a little faster for others. The sums are the same, of
integers to the last bit, so the choice is a matter of speed alone.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_NHWC = ("NHWC", "HWIO", "NHWC")


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
    return FORMS[form](op, lax.optimization_barrier(x) if dtype == jnp.int32 else x, kernel, dtype)


def pad(x: jax.Array, padding, zero: int | float) -> jax.Array:
    """(before, after) entries of `zero` along each axis but the batch."""
    widths = [(0, 0, 0), *((before, after, 0) for before, after in padding)]
    return lax.pad(x, jnp.asarray(zero, x.dtype), widths)


def _conv(op, x, kernel, dtype):
    return lax.conv_general_dilated(
        x,
        kernel,
        op.strides,
        "VALID",
        rhs_dilation=op.dilation,
        dimension_numbers=_NHWC,
        feature_group_count=op.groups,
        precision="highest",
        preferred_element_type=dtype,
    )


def _matmul(op, x, kernel, dtype):
    taps = _taps(op, x, kernel.shape[:2])
    if op.groups == x.shape[-1] == kernel.shape[-1]:  # depthwise: a product of one entry each
        weights = kernel.reshape(len(taps), 1, 1, 1, -1).astype(dtype)
        return sum(tap.astype(dtype) * weight for tap, weight in zip(taps, weights, strict=True))
    outputs = kernel.shape[-1] // op.groups
    # (groups, batch and positions, taps and channels of the group) times (groups, the same, O / G)
    seen = jnp.stack([tap.reshape(-1, op.groups, kernel.shape[2]) for tap in taps], 2)
    seen = seen.reshape(-1, op.groups, len(taps) * kernel.shape[2])
    rows = kernel.reshape(-1, op.groups, outputs)
    if op.groups == 1:
        y = _dot(seen[:, 0], rows[:, 0], dtype)
    else:
        y = jax.vmap(functools.partial(_dot, dtype=dtype), (1, 1), 1)(seen, rows)
    return y.reshape(*taps[0].shape[:-1], kernel.shape[-1])


def _taps(op, x, window):
    """What the positions of the result see of x through each entry of the kernel."""
    spans = []
    for size, length, stride, dilation in zip(
        window, x.shape[1:3], op.strides, op.dilation, strict=True
    ):
        reach = length - (size - 1) * dilation
        spans.append([slice(i * dilation, i * dilation + reach, stride) for i in range(size)])
    return [x[:, rows, columns] for rows in spans[0] for columns in spans[1]]


def _dot(a, b, dtype):
    return lax.dot(a, b, precision="highest", preferred_element_type=dtype)


FORMS = {"conv": _conv, "matmul": _matmul}
"""The forms of a convolution."""
