"""Each operation of the inference graph in JAX: floats in float32, integers to the last bit.

int8 × int8 products accumulate in int32, and are requantized as `arithmetic` states.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hybrid_jax.deploy import arithmetic
from hybrid_jax.deploy.forms import convolve, pad
from hybrid_jax.deploy.program import (
    UNBOUNDED,
    Add,
    AveragePool,
    Clip,
    Concatenate,
    Conv,
    Convert,
    Dense,
    Encoding,
    Lookup,
    MaxPool,
    Mean,
    Multiply,
    Operation,
    Pad,
    Reshape,
    Slice,
    Softmax,
    Transpose,
)

# x − 128 fits an int8 for every uint8 x; what it leaves out is added with the bias.
_SHIFT = 128


def evaluate(
    op: Operation,
    values: list[jax.Array],
    encodings: list[Encoding | None],
    output: Encoding | None,
    shape: tuple[int, ...],
    form: str = "conv",
) -> jax.Array:
    """One operation.

    Args:
      op: The operation.
      values: Its inputs, (B, …).
      encodings: Theirs.
      output: That of the result.
      shape: Of one example of the result.
      form: Of a convolution, 'conv' or 'matmul'.
    """
    if isinstance(op, Reshape):
        return values[0].reshape(values[0].shape[0], *shape)
    if isinstance(op, Conv | Dense):
        return _weighted(op, values, encodings, output, form)
    return _RULES[type(op)](op, values, encodings, output)


def requantize(
    accumulator: jax.Array, multiplier: np.ndarray, output: Encoding, clip=UNBOUNDED
) -> jax.Array:
    """uint8 of an int32 accumulator, as `arithmetic` states; of floats alike, NaN as zero.

    Example:
      >>> requantize(jnp.int32([3, 5, 900]), np.float32(0.5), Encoding(1.0, 10))
      Array([ 12,  12, 255], dtype=uint8)
    """
    low, high = (np.float32(end - output.zero_point) for end in arithmetic.bounds(output, clip))
    # Floats that come from a product with a constant: XLA would make one of the two constants.
    if accumulator.dtype == jnp.float32:
        accumulator = lax.optimization_barrier(accumulator)
    steps = jnp.round(accumulator.astype(jnp.float32) * _channels(multiplier, accumulator))
    return (jnp.clip(steps, low, high).astype(jnp.int32) + output.zero_point).astype(jnp.uint8)


def steps_from_zero(q: jax.Array, encoding: Encoding) -> jax.Array:
    """The integers less their zero point, int32."""
    return q.astype(jnp.int32) - encoding.zero_point


def rounded(x: jax.Array, encoding: Encoding) -> jax.Array:
    """The values of an encoding that are nearest to x, float32.

    Example:
      >>> rounded(jnp.float32([0.3, 99.0]), Encoding(0.25, 128))
      Array([ 0.25, 31.75], dtype=float32)
    """
    return steps_from_zero(_quantize(x, encoding), encoding).astype(jnp.float32) * np.float32(
        encoding.scale
    )


def _finish(op, accumulator, scales, output, count=1):
    """The result of an accumulator in steps of the product of the scales."""
    clip = getattr(op, "clip", UNBOUNDED)
    factor = arithmetic.multiplier(*scales, output=output or _ONE, count=count)
    if output is None:
        return jnp.clip(accumulator.astype(jnp.float32) * _channels(factor, accumulator), *clip)
    return requantize(accumulator, factor, output, clip)


_ONE = Encoding(1.0)


def _channels(vector, like):
    """A scalar, or (O,) along the last axis, of the rank of `like`."""
    vector = np.asarray(vector)
    return vector.reshape((1,) * (like.ndim - vector.ndim) + vector.shape)


def _weighted(op, values, encodings, output, form):
    (x,), (encoding,), weights = values, encodings, op.weights
    kernel = jnp.asarray(weights.values)
    if encoding is None:
        if weights.scale is not None:
            kernel = kernel.astype(jnp.float32) * _channels(weights.scale, kernel)
        y = _product(op, x, kernel, 0, form)
        return jnp.clip(y + _channels(weights.bias, y), *op.clip)
    shifted = (x.astype(jnp.int32) - _SHIFT).astype(jnp.int8)
    y = _product(op, shifted, kernel, encoding.zero_point - _SHIFT, form)
    sums = weights.values.astype(np.int64).sum(tuple(range(kernel.ndim - 1)))
    correction = (_SHIFT - encoding.zero_point) * sums + arithmetic.integer_bias(weights, encoding)
    y = y + _channels(correction.astype(np.int32), y)
    return _finish(op, y, (encoding.scale, weights.scale), output)


def _product(op, x, kernel, zero, form):
    """Without bias; float32, of int8 in int32."""
    if isinstance(op, Conv):
        return convolve(op, x, kernel, zero, form)
    dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return lax.dot(x, kernel, precision="highest", preferred_element_type=dtype)


def _add(op, values, encodings, output):
    a, b = values
    if None in (*encodings, output):
        return jnp.clip(a + b, *op.clip)
    first, second, multiplier = arithmetic.addition(*encodings, output)
    a, b = map(steps_from_zero, values, encodings)
    return requantize(a * first + b * second, multiplier, output, op.clip)


def _multiply(op, values, encodings, output):
    if None in encodings:
        return jnp.clip(_broadcast_product(*values), *op.clip)
    a, b = map(steps_from_zero, values, encodings)
    return _finish(op, _broadcast_product(a, b), [e.scale for e in encodings], output)


def _broadcast_product(a, b):
    return a * jnp.broadcast_to(b, a.shape)


def _clip(op, values, encodings, output):
    if output is None:
        return jnp.clip(values[0], op.low, op.high)
    low, high = arithmetic.bounds(output, (op.low, op.high))
    return jnp.clip(values[0], np.uint8(low), np.uint8(high))


def _windows(op, x, start, reduce, zero):
    x = pad(x, [*op.padding, (0, 0)], zero)
    return lax.reduce_window(
        x, jnp.asarray(start, x.dtype), reduce, (1, *op.window, 1), (1, *op.strides, 1), "VALID"
    )


def _max_pool(op, values, encodings, output):
    least = -np.inf if output is None else 0
    return _windows(op, values[0], least, lax.max, least)


def _average_pool(op, values, encodings, output):
    return _average(
        op, values, encodings, output, lambda x: _windows(op, x, 0, lax.add, 0), np.prod(op.window)
    )


def _mean(op, values, encodings, output):
    return _average(
        op, values, encodings, output, lambda x: x.sum((1, 2)), np.prod(values[0].shape[1:3])
    )


def _average(op, values, encodings, output, total, count):
    if encodings[0] is None:
        return total(values[0]) / np.float32(count)
    return _finish(
        op, total(steps_from_zero(values[0], encodings[0])), [encodings[0].scale], output, count
    )


def _concatenate(op, values, encodings, output):
    parts = [_convert(op, [x], [e], output) for x, e in zip(values, encodings, strict=True)]
    return jnp.concatenate(parts, op.axis + 1)


def _convert(op, values, encodings, output):
    (x,), (encoding,) = values, encodings
    if encoding == output:
        return x
    if encoding is None:
        return _quantize(x, output)
    return _finish(op, steps_from_zero(x, encoding), [encoding.scale], output)


def _quantize(x, encoding):
    return requantize(x, np.float32(1) / np.float32(encoding.scale), encoding)


def _lookup(op, values, encodings, output):
    if output is None:
        return {"logistic": jax.nn.sigmoid, "tanh": jnp.tanh, "exp": jnp.exp}[op.function](
            values[0]
        )
    return jnp.asarray(arithmetic.table(op.function, encodings[0], output))[
        values[0].astype(jnp.int32)
    ]


def _zero_of(encoding):
    return 0 if encoding is None else encoding.zero_point


_RULES = {
    Add: _add,
    Multiply: _multiply,
    Clip: _clip,
    MaxPool: _max_pool,
    AveragePool: _average_pool,
    Mean: _mean,
    Concatenate: _concatenate,
    Transpose: lambda op, values, encodings, output: values[0].transpose(
        0, *(axis + 1 for axis in op.permutation)
    ),
    Pad: lambda op, values, encodings, output: pad(values[0], op.padding, _zero_of(output)),
    Slice: lambda op, values, encodings, output: values[0][
        (slice(None), *map(slice, op.starts, op.stops, op.strides))
    ],
    Lookup: _lookup,
    Softmax: lambda op, values, encodings, output: jax.nn.softmax(values[0]),
    Convert: _convert,
}
