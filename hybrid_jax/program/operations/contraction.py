"""Convolutions and matrix products."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from hybrid_jax.program import arithmetic, forms
from hybrid_jax.program.encoding import UNBOUNDED, Weights
from hybrid_jax.program.operations.base import (
    Array,
    Operation,
    Pairs,
    along,
    clipped,
    finish,
    steps_from_zero,
)

# x − 128 fits an int8 for every uint8 x; what it leaves out is added with the bias.
_SHIFT = 128


@dataclasses.dataclass(frozen=True, eq=False)
class Weighted(Operation):
    """A product with a kernel, of int8 in int32, plus a bias."""

    name: str  # the site's
    weights: Weights  # kernel (kh, kw, C / groups, O) or (C, O), bias (O,)

    returns_floats = True

    def floats(self, x: Array, **options: Any) -> Array:
        """The product in float32, plus the bias, clipped."""
        weights, kernel = self.weights, jnp.asarray(self.weights.values)
        if weights.scale is not None:
            kernel = kernel.astype(jnp.float32) * along(weights.scale, kernel)
        y = self.product(x, kernel, 0, **options)
        return clipped(y + weights.bias.reshape((1,) * (y.ndim - 1) + (-1,)), self.clip)

    def integers(self, values, encodings, output, **options):
        """The product of int8 with int8, corrected by what the shift of the input leaves out."""
        (x,), (encoding,), weights = values, encodings, self.weights
        kernel = jnp.asarray(weights.values)
        shifted = (x.astype(jnp.int32) - _SHIFT).astype(jnp.int8)
        y = self.product(shifted, kernel, encoding.zero_point - _SHIFT, **options)
        sums = weights.values.astype(np.int64).sum(tuple(range(kernel.ndim - 1)))
        correction = (_SHIFT - encoding.zero_point) * sums
        correction += arithmetic.integer_bias(weights, encoding)
        y = y + along(correction.astype(np.int32), y)
        return finish(y, (encoding.scale, weights.scale), output, self.clip)

    def product(self, x: Array, kernel: Array, zero: int, **options: Any) -> Array:
        """Without bias; float32, of int8 in int32."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class Conv(Weighted):
    """A convolution of (H, W, C) with padding of zeros, plus a bias, clipped.

    Cross-correlation, as in every framework.
    """

    strides: tuple[int, int] = (1, 1)  # along H and W
    padding: Pairs = ((0, 0), (0, 0))  # ((before, after) along H, the same along W)
    dilation: tuple[int, int] = (1, 1)  # of the kernel, along H and W
    groups: int = 1  # C for a depthwise convolution
    clip: tuple[float, float] = UNBOUNDED  # of the result; (0, inf) is a ReLU, (0, 6) a ReLU6

    def product(self, x, kernel, zero, form="conv"):
        return forms.convolve(self, x, kernel, zero, form)


@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Weighted):
    """A matrix product of (C,) with a kernel (C, O), plus a bias, clipped."""

    clip: tuple[float, float] = UNBOUNDED

    def product(self, x, kernel, zero):
        del zero
        dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
        return lax.dot(x, kernel, precision="highest", preferred_element_type=dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class MatMul(Operation):
    """The product of two tensors, (…, M, K) by (…, K, N), of equal leading axes."""

    returns_floats = True

    def floats(self, a, b):
        return jnp.matmul(a, b, precision="highest")

    def integers(self, values, encodings, output):
        """Σ (a − z_a) · (b − z_b)."""
        arithmetic.check_product(self.output, *encodings, values[0].shape[-1])
        a, b = map(steps_from_zero, values, encodings)
        return finish(jnp.matmul(a, b), [e.scale for e in encodings], output)
