"""What an operation is, and the arithmetic of stored values that all share."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hybrid_jax.program import arithmetic
from hybrid_jax.program.encoding import UNBOUNDED, Encoding

Array = jax.Array
Encodings = list[Encoding | None]
Pairs = tuple[tuple[int, int], ...]

_ONE = Encoding(1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One step: reads tensors by name, and makes one."""

    inputs: tuple[str, ...]  # names of the tensors that it reads
    output: str  # name of the tensor that it makes

    # Whether the result has entries of the input, so that one encoding serves both
    same_encoding: ClassVar[bool] = False
    integral: ClassVar[bool] = True  # whether it computes with integers
    # Whether it may return floats of integers: its accumulator times its scale
    returns_floats: ClassVar[bool] = False
    # Whether an entry of the result depends on that entry of the inputs alone
    in_place: ClassVar[bool] = False

    def floats(self, *values: Array) -> Array:
        """The result of float32 inputs."""
        raise NotImplementedError

    def integers(self, values: list[Array], encodings: Encodings, output: Encoding | None) -> Array:
        """The result as it is stored, of inputs as they are stored."""
        raise NotImplementedError


def compute(
    op: Operation,
    values: list[Array],
    encodings: Encodings,
    output: Encoding | None,
    **options: Any,
) -> Array:
    """One operation on its inputs (B, …), of floats in floats, of what is encoded in integers.

    `options` are the `form` of a convolution, see `forms`.
    """
    if all(encoding is None for encoding in (*encodings, output)):
        return op.floats(*values, **options)
    return op.integers(values, encodings, output, **options)


def requantize(
    accumulator: Array, multiplier: np.ndarray, output: Encoding, clip: Any = UNBOUNDED
) -> Array:
    """uint8 of an int32 accumulator, as `arithmetic` states; of floats alike, NaN as zero."""
    low, high = (np.float32(end - output.zero_point) for end in arithmetic.bounds(output, clip))
    # Floats that come from a product with a constant: XLA would make one of the two constants.
    if accumulator.dtype == jnp.float32:
        accumulator = lax.optimization_barrier(accumulator)
    steps = jnp.round(accumulator.astype(jnp.float32) * along(multiplier, accumulator))
    return (jnp.clip(steps, low, high).astype(jnp.int32) + output.zero_point).astype(jnp.uint8)


def steps_from_zero(q: Array, encoding: Encoding) -> Array:
    """The integers less their zero point, int32."""
    return q.astype(jnp.int32) - encoding.zero_point


def quantize(x: Array, encoding: Encoding) -> Array:
    """The integers of an encoding whose values are nearest to x, uint8."""
    return requantize(x, np.float32(1) / np.float32(encoding.scale), encoding)


def dequantize(q: Array, encoding: Encoding | None) -> Array:
    """The values of stored integers, float32; floats as they are."""
    if encoding is None:
        return q
    return steps_from_zero(q, encoding).astype(jnp.float32) * np.float32(encoding.scale)


def rounded(x: Array, encoding: Encoding | None) -> Array:
    """The values of an encoding that are nearest to x, float32."""
    return x if encoding is None else dequantize(quantize(x, encoding), encoding)


def convert(x: Array, encoding: Encoding | None, output: Encoding | None) -> Array:
    """The same values in another encoding."""
    if encoding == output:
        return x
    if encoding is None:
        return quantize(x, output)
    return finish(steps_from_zero(x, encoding), [encoding.scale], output)


def finish(accumulator, scales, output, clip=UNBOUNDED, count=1):
    """The result of an accumulator in steps of the product of the scales."""
    factor = arithmetic.multiplier(*scales, output=output or _ONE, count=count)
    if output is None:
        return jnp.clip(accumulator.astype(jnp.float32) * along(factor, accumulator), *clip)
    return requantize(accumulator, factor, output, clip)


def clipped(x: Array, clip: tuple[float, float]) -> Array:
    """The values between two bounds; one that is infinite is no step of its own."""
    return jnp.clip(x, *(None if math.isinf(end) else end for end in clip))


def along(vector, like):
    """An array of the rank of `like` whose axes are its last."""
    return vector.reshape((1,) * (like.ndim - np.ndim(vector)) + np.shape(vector))
