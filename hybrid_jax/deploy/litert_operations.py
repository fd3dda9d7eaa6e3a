"""One table of rules: how each operation is written in JAX so that LiteRT's converter takes it.

A rule sees floats, marked where they are stored in integers, and makes floats. One integer
operation comes of what lies between two marks if LiteRT has a kernel for it; a barrier keeps what
has none in floats, between a DEQUANTIZE and a QUANTIZE.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hybrid_jax import program as p
from hybrid_jax.deploy import litert_functions as functions
from hybrid_jax.deploy.litert_axes import fold
from hybrid_jax.deploy.litert_marks import mark, mark_kernel
from hybrid_jax.program import UNBOUNDED, arithmetic

_NHWC = ("NHWC", "OHWI", "NHWC")
_RELU6 = (0.0, 6.0)
# Operations that LiteRT clips without a step more, at zero and there or at 6.
_ACTIVATED = (p.Conv, p.Dense, p.Add, p.Multiply, p.Clip)


class Place(NamedTuple):
    """Where an operation stands: itself, the encodings of its inputs and result, and its number."""

    op: p.Operation
    encodings: list[p.Encoding | None]
    output: p.Encoding | None
    number: int


def evaluate(program: p.Program, op: p.Operation, values: list[jax.Array]) -> jax.Array:
    """An operation of the program in floats, with a mark on what it makes if that is encoded."""
    made = program.tensors[op.output]
    encodings = [program.encoding(name) for name in op.inputs]
    number = program.operations.index(op)
    folded, op, values = fold(op, values, encodings)
    at = Place(op, encodings, made.encoding, number)
    y = RULES[type(op)](at, *values)
    if made.encoding is None:
        y = _between(y, *_bounds(op))
    elif op.same_encoding:
        y = mark(y, made.encoding)
    else:
        y = _clip_and_mark(op, y, encodings, made.encoding)
    return mark(y.reshape(len(y), *made.shape), made.encoding) if folded else y


def _bounds(op):
    return (op.low, op.high) if isinstance(op, p.Clip) else getattr(op, "clip", UNBOUNDED)


def _clip_and_mark(op, y, encodings, output):
    """Clips to the bounds of the result, where the int8 does not saturate at them anyway."""
    clip = _bounds(op)
    low, high = arithmetic.bounds(output, clip)
    least, most = output.high - 255, output.high
    if isinstance(op, _ACTIVATED) and low == output.zero_point:
        y, least = _between(y, 0.0), low
        if clip == _RELU6:
            y, most = _between(y, high=6.0), high
    elif all(map(_from_zero, [*encodings, output])):
        least = low
    y = mark(y, output)

    def end(q):
        return mark(np.full((1,) * y.ndim, _value(q, output)), output)

    # An operation more is not worth the one step that a symmetric range leaves at its end.
    if low > least + 1:
        y = mark(jnp.maximum(y, end(low)), output)
    if high < most:
        y = mark(jnp.minimum(y, end(high)), output)
    return y


def _value(q, encoding):
    return np.float32(encoding.scale) * np.float32(q - encoding.zero_point)


def _from_zero(encoding):
    return encoding is not None and encoding.zero_point == encoding.low


def _between(y, low=-np.inf, high=np.inf):
    if low > -np.inf:
        y = jnp.maximum(y, np.float32(low))
    if high < np.inf:
        y = jnp.minimum(y, np.float32(high))
    return y


def _floats(at, *values):
    return at.op.floats(*values)


def _matmul(at, a, b):
    """In floats: LiteRT's integers are a step off on three entries of a thousand."""
    return _apart(at.op.floats(*map(_apart, (a, b))))


def _apart(x):
    """Keeps what is before it and what is behind it out of one integer operation."""
    return lax.optimization_barrier(x)


def _weighted(at, x):
    op, (encoding,), weights = at.op, at.encodings, at.op.weights
    kernel, bias = np.moveaxis(weights.values, -1, 0), weights.bias
    if weights.scale is not None:
        scale = weights.scale.reshape(-1, *[1] * (kernel.ndim - 1))
        kernel = mark_kernel(kernel * scale, weights.scale)
    if encoding is not None:
        bias = arithmetic.rounded_bias(weights, encoding)
    if isinstance(op, p.Dense):
        y = lax.dot_general(x, kernel, (((1,), (1,)), ((), ())))
    else:
        y = lax.conv_general_dilated(
            x,
            kernel,
            op.strides,
            op.padding,
            rhs_dilation=op.dilation,
            dimension_numbers=_NHWC,
            feature_group_count=op.groups,
        )
    return y + bias.reshape([1] * (y.ndim - 1) + [-1])


def _requantized(at, x, encoding):
    """Values on their way to another encoding: times one, as LiteRT's QUANTIZE rounds its factor.

    Nor does the converter keep in integers what else reads a tensor that QUANTIZE reads.
    """
    if encoding == at.output or None in (encoding, at.output):
        return x
    # Each one is stored in its own way: two equal products of a tensor would be merged, and both
    # would then have the encoding of one of them.
    one = p.Encoding(1.0, at.number % 255)
    return x * mark(np.ones((1,) * x.ndim, np.float32), one)


def _convert(at, x):
    (encoding,) = at.encodings
    if encoding != at.output and None in (encoding, at.output):
        return _apart(x)
    return _requantized(at, x, encoding)


def _alike(at, values):
    return [
        mark(_requantized(at, x, encoding), at.output)
        for x, encoding in zip(values, at.encodings, strict=True)
    ]


def _concatenate(at, *values):
    """What is the same for every example is added where zeros stand in its place.

    Only so does it become as many examples as there are.
    """
    axis, parts = at.op.axis + 1, _alike(at, values)
    batch = max(map(len, parts))
    if all(len(x) == batch for x in parts):
        return jnp.concatenate(parts, axis)
    sizes = [x.shape[axis] for x in parts]
    starts = np.cumsum([0, *sizes])

    def padded(x, start):
        ends = [(0, 0, 0)] * x.ndim
        ends[axis] = (int(start), int(starts[-1] - start - x.shape[axis]), 0)
        return lax.pad(x, np.float32(0), ends)

    total, *rest = (
        mark(padded(x, start), at.output)
        for one in (False, True)
        for x, start in zip(parts, starts, strict=False)
        if (len(x) == 1) == one
    )
    for part in rest:
        total = mark(total + part, at.output)
    return total


def _picked(at, *values):
    return at.op.pick(*_alike(at, values))


def _function(at, *values):
    if at.output is None:
        return functions.in_floats(at.op, values)
    return functions.in_integers(at.op, *values, *at.encodings, at.output)


def _average_pool(at, x):
    """In integers a depthwise convolution: LiteRT's own pool would keep the input's encoding."""
    op, channels = at.op, x.shape[-1]
    ones, zeros = np.ones((*op.window, 1, channels), np.int8), np.zeros(channels, np.float32)
    if op.count_padding and None in (*at.encodings, at.output):
        return op.floats(_apart(x))
    if op.count_padding:
        scale = np.full(channels, 1 / math.prod(op.window), np.float32)
        return _weighted(at._replace(op=_depthwise(op, p.Weights(ones, scale, zeros, 8))), x)
    summed = _depthwise(op, p.Weights(ones.astype(np.float32), None, zeros))
    counts = op.counts(x.shape[1:]).astype(np.float32)
    y = _weighted(Place(summed, [None], None, at.number), _apart(x))
    return _apart(y / np.expand_dims(counts, 0))


def _depthwise(op, weights):
    channels = weights.values.shape[-1]
    ends = (op.inputs, op.output, op.output)
    return p.Conv(*ends, weights, op.strides, op.padding, groups=channels)


def _max_pool(at, x):
    op = at.op
    window, strides = (1, *op.window, 1), (1, *op.strides, 1)
    padding = ((0, 0), *op.padding, (0, 0))
    same = padding == tuple(lax.padtype_to_pads(x.shape, window, strides, "SAME"))
    if not same and _from_zero(at.output):
        # No value is below zero, and XNNPACK pads with zeros only.
        x, padding = mark(jnp.pad(x, padding), at.output), ((0, 0),) * 4
    return lax.reduce_window(x, np.float32(-np.inf), lax.max, window, strides, padding)


def _pad(at, x):
    value, output = np.float32(at.op.value), at.output
    if output is not None and value:
        value = mark(_value(at.op.fill(output), output), output)
    return lax.pad(x, value, [(0, 0, 0), *((*ends, 0) for ends in at.op.padding)])


def _slice(at, x):
    """Strides along W, then C: XNNPACK slices without strides, TFLite Micro at most four axes."""
    op, sizes = at.op, x.shape[1:]
    even = all(n % stride == 0 for n, stride in zip(sizes, op.strides, strict=True))
    if set(op.strides) == {1} or len(sizes) != 3 or op.strides[2] != 1 or not even:
        return op.floats(x)
    (high, wide, _), (h, w, c) = op.strides, sizes
    (top, left, first), (bottom, right, last) = op.starts, op.stops
    rows, columns = len(range(top, bottom, high)), len(range(left, right, wide))
    # The rows of a stride stand side by side, and one of them is kept; so with its columns.
    begin = (0, top // high, top % high * w, 0)
    x = _part(at, x.reshape(-1, h // high, high * w, c), begin, (rows, w, c))
    begin = (0, 0, left // wide, left % wide * c + first)
    return _part(at, x.reshape(-1, rows, w // wide, wide * c), begin, (rows, columns, last - first))


def _part(at, x, begin, sizes):
    """So many values of each axis but the first; the tensor itself where these are all."""
    if x.shape[1:] == sizes:
        return x
    ends = [start + n for start, n in zip(begin, (len(x), *sizes), strict=True)]
    return lax.slice(mark(x, at.output), begin, ends)


def _gather(at, x):
    return jnp.take(x, np.int32(at.op.indices), at.op.axis + 1, mode="clip")


def _softmax(at, x):
    """Over the last axis, where LiteRT has it."""
    axis = at.op.axis + 1 if at.op.axis >= 0 else at.op.axis
    return jnp.moveaxis(jax.nn.softmax(jnp.moveaxis(x, axis, -1)), -1, axis)


def _refused(at, *values):
    raise at.op.refused("LiteRT")


RULES: dict[type[p.Operation], Callable[..., jax.Array]] = {
    p.Conv: _weighted,
    p.Dense: _weighted,
    p.MatMul: _matmul,
    p.Add: lambda at, a, b: a - b if at.op.minus else a + b,
    p.Multiply: lambda at, a, b: a * b,
    p.Maximum: _picked,
    p.Minimum: _picked,
    p.Clip: _convert,
    p.Convert: _convert,
    p.Function: _function,
    p.Mean: _floats,
    p.Largest: _floats,
    p.MaxPool: _max_pool,
    p.AveragePool: _average_pool,
    p.Concatenate: _concatenate,
    p.Reshape: _floats,
    p.Transpose: _floats,
    p.Broadcast: _floats,
    p.Pad: _pad,
    p.Slice: _slice,
    p.Gather: _gather,
    p.Softmax: _softmax,
    p.Normalize: _floats,
    p.Constant: _floats,
    p.Call: _refused,
}
"""{operation: rule(place, *values) -> value}, for every operation."""
