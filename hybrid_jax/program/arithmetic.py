"""The integer arithmetic that every target shares: accumulate in int32, requantize once.

    q = clip(round(float32(accumulator) · multiplier), low − z, high − z) + z

with rounding to the nearest even and one float32 product: what ONNX Runtime's and XNNPACK's kernels
compute, what C99 computes without contraction, and what XLA cannot fuse into anything else. The
accumulators are

* convolution, dense:  Σ (x − z_x) · w + bias, with bias in steps of s_x · s_w
* addition:            (a − z_a) · A + (b − z_b) · B, with A, B at most 2^20 in the ratio of scales
* multiplication:      (a − z_a) · (b − z_b), of matrices the sum of them
* mean, average pool:  Σ (x − z_x) over the window
* conversion, concatenation: x − z_x

and nothing overflows: `integer_bias` and `check_product` refuse sums that may reach 2^31.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hybrid_jax.program import functions
from hybrid_jax.program.encoding import Encoding, Weights

_ADD_BITS = 20


def multiplier(*scales: float | np.ndarray, output: Encoding, count: int = 1) -> np.ndarray:
    """float32 product of the scales, divided by that of the output and by `count`."""
    product = np.float32(1)
    for scale in scales:
        product = product * np.float32(scale)
    return product / (np.float32(output.scale) * np.float32(count))


def integer_bias(weights: Weights, x: Encoding) -> np.ndarray:
    """The bias in steps of the accumulator, int32 (O,): round(bias / (s_x · s_w))."""
    step = np.float32(x.scale) * weights.scale
    bias = np.rint(weights.bias.astype(np.float64) / step)
    axes = tuple(range(weights.values.ndim - 1))
    reach = np.abs(weights.values.astype(np.int64)).sum(axes) * 255 + np.abs(bias)
    if not (reach < 2**31).all():
        raise ValueError(
            f"weights must keep the accumulator below 2^31, got up to {reach.max():.3g} "
            "steps; the scale of the input or of a channel is too small for its bias"
        )
    return bias.astype(np.int32)


def rounded_bias(weights: Weights, x: Encoding) -> np.ndarray:
    """The values that `integer_bias` stands for, float32 (O,)."""
    step = np.float32(x.scale) * weights.scale
    return (integer_bias(weights, x) * step).astype(np.float32)


def check_product(name: str, a: Encoding, b: Encoding, count: int) -> None:
    """Raises ValueError if a sum of `count` products of the tensor `name` may leave int32."""
    most = count
    for encoding in (a, b):
        most *= max(encoding.high - encoding.zero_point, encoding.zero_point - encoding.low)
    if most >= 2**31:
        raise ValueError(
            f"sums of the matrix product {name!r} must stay below 2^31, got up to {most:.3g}: "
            f"take fewer than {count} rows, or activations of fewer bits"
        )


def saturates(weights: Weights, x: Encoding) -> bool:
    """Whether two products of a channel may add up to more than an int16 holds.

    An x86 without VNNI (AMD before Zen 4, Intel before Cascade Lake) multiplies a uint8 by an int8
    with VPMADDUBSW, which adds neighbours and stops at ±2^15. Which entries are neighbours is the
    runtime's business; only kernels of 8 bits reach that far.

    Example:
      >>> kernel = np.int8([[127], [2], [-127]])
      >>> saturates(Weights(kernel, np.ones(1), np.zeros(1), 8), Encoding(0.25))
      True
      >>> saturates(Weights(kernel, np.ones(1), np.zeros(1), 8), Encoding(0.25, high=15))
      False
    """
    columns = np.sort(weights.values.reshape(-1, weights.values.shape[-1]).astype(np.int64), 0)
    ends = columns[:2].clip(max=0).sum(0).min(), columns[-2:].clip(min=0).sum(0).max()
    return not -(2**15) <= x.high * ends[0] <= x.high * ends[1] < 2**15


class Sum(NamedTuple):
    """Integer factors of the two terms of an addition, and the multiplier of their sum."""

    first: int
    second: int
    multiplier: np.float32


def addition(a: Encoding, b: Encoding, output: Encoding) -> Sum:
    """The constants of `a + b`."""
    most = max(a.scale, b.scale)
    first, second = (round(e.scale / most * 2**_ADD_BITS) for e in (a, b))
    return Sum(first, second, np.float32(most / 2**_ADD_BITS / output.scale))


def bounds(encoding: Encoding, clip: tuple[float, float]) -> tuple[int, int]:
    """The least and the greatest integer of a result clipped to values in `clip`."""
    low, high = (
        float(np.clip(np.rint(end / encoding.scale) + encoding.zero_point, *ends))
        for end, ends in zip(clip, [(encoding.low, encoding.high)] * 2, strict=True)
    )
    return int(low), int(high)


def table(
    steps: Sequence[functions.Step], constants: Sequence[np.ndarray], x: Encoding, y: Encoding
) -> np.ndarray:
    """The integer that each of 256 integers becomes under an expression, uint8 (256,) or (256, C).

    `steps` are of one input with encoding `x`, `constants` scalars or (C,) where each channel has
    its own. What is NaN becomes the zero point of the result's encoding `y`.

    Example:
      >>> table([functions.Step('tanh', (0,))], [], Encoding(0.1, 128), Encoding(1 / 128, 128))[
      ...     [0, 128, 255]]
      array([  0, 128, 255], dtype=uint8)
    """
    values = (np.arange(256) - x.zero_point) * np.float64(x.scale)
    if any(np.ndim(constant) for constant in constants):
        values = values[:, None]
    with np.errstate(all="ignore"):
        result = functions.evaluate(steps, [values, *(np.asarray(c) for c in constants)])
        result = np.nan_to_num(np.asarray(result, np.float64), nan=0.0)
        result = np.clip(np.rint(result / y.scale) + y.zero_point, y.low, y.high)
    return np.ascontiguousarray(
        np.broadcast_to(result, np.broadcast_shapes(result.shape, values.shape)).astype(np.uint8)
    )
