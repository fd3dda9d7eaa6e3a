"""A program as a JAX function in floats, with marks from which LiteRT's converter makes integers.

Every encoded tensor passes a mark with its encoding, every kernel one with its scales. Operations
are written in the form that the converter knows; no mark is ever computed. The uint8 q of a tensor
is the int8 q + 127 − high, so that a narrower range ends where the int8 saturates.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hybrid_jax.deploy import arithmetic, reference
from hybrid_jax.deploy.program import (
    SAME_ENCODING,
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
    Multiply,
    Operation,
    Program,
    Slice,
    Weights,
)

MARK = "quant.fake_quant"
"""What the converter takes for a mark: a call of this name."""

_NHWC = ("NHWC", "OHWI", "NHWC")
_RELU6 = (0.0, 6.0)
# Operations that LiteRT clips without a step more, at zero and there or at 6.
_ACTIVATED = (Conv, Dense, Add, Multiply, Clip)
# The only encodings that LiteRT's integer kernels have for these functions.
_TABLES = {"logistic": Encoding(1 / 256), "tanh": Encoding(1 / 128, 128)}


def marked(program: Program) -> Callable[[jax.Array], jax.Array]:
    """The program in floats with marks: fn(x) -> y, (1, …) to (1, …), for lowering only."""

    def fn(x):
        values = {program.input: x}
        for op in program.operations:
            with jax.named_scope(op.output):  # names the tensor in the file
                values[op.output] = evaluate(program, op, [values[name] for name in op.inputs])
        return values[program.output]

    return fn


def evaluate(program: Program, op: Operation, values: list[jax.Array]) -> jax.Array:
    """An operation of the program in floats, with a mark on what it makes if that is encoded."""
    encodings = [program.encoding(name) for name in op.inputs]
    made = program.tensors[op.output]
    if isinstance(op, Convert) and encodings == [made.encoding]:
        return values[0]
    if type(op) in _REQUANTIZING:
        place = program.operations.index(op)
        y = _REQUANTIZING[type(op)](op, values, encodings, made.encoding, place)
    elif type(op) in _RULES:
        y = _RULES[type(op)](op, values, encodings, made.encoding)
    else:
        y = reference.evaluate(op, values, [None] * len(values), None, made.shape)
    if made.encoding is None:
        return _between(y, *_bounds(op))
    if isinstance(op, SAME_ENCODING) and not isinstance(op, Clip):
        return mark(y, made.encoding)
    return _clip_and_mark(op, y, encodings, made.encoding)


def _bounds(op):
    return (op.low, op.high) if isinstance(op, Clip) else getattr(op, "clip", UNBOUNDED)


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
        value = np.float32(output.scale) * np.float32(q - output.zero_point)
        return mark(np.full((1,) * y.ndim, value), output)

    # An operation more is not worth the one step that a symmetric range leaves at its end.
    if low > least + 1:
        y = mark(jnp.maximum(y, end(low)), output)
    if high < most:
        y = mark(jnp.minimum(y, end(high)), output)
    return y


def _from_zero(encoding):
    return encoding is not None and encoding.zero_point == encoding.low


def _between(y, low=-np.inf, high=np.inf):
    if low > -np.inf:
        y = jnp.maximum(y, np.float32(low))
    if high < np.inf:
        y = jnp.minimum(y, np.float32(high))
    return y


def mark(x: jax.Array, encoding: Encoding) -> jax.Array:
    """The same values, to be stored in this encoding."""
    return _fake_quant(x, [encoding.scale], encoding.zero_point + 127 - encoding.high)


def _fake_quant(x, scale, zero_point=0, **options):
    """A call that the converter reads; nothing computes it."""
    call = jax.ffi.ffi_call(MARK, jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(
        x,
        scale=np.asarray(scale, np.float32),
        zero_point=np.full(len(scale), zero_point, np.int64),
        dtype="i8",
        **{"narrow_range": False, **options},
    )


def _weighted(op, values, encodings, output):
    (x,), (encoding,), weights = values, encodings, op.weights
    kernel, bias = np.moveaxis(weights.values, -1, 0), weights.bias
    if weights.scale is not None:
        values = kernel * weights.scale.reshape(-1, *[1] * (kernel.ndim - 1))
        options = {"quantization_dimension": np.int32(0), "narrow_range": True}
        kernel = _fake_quant(values, weights.scale, **options)
    if encoding is not None:
        step = np.float32(encoding.scale) * weights.scale
        bias = arithmetic.integer_bias(weights, encoding).astype(np.float32) * step
    if isinstance(op, Dense):
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


def _convert(op, values, encodings, output, place):
    return _requantized(values[0], encodings[0], output, place)


def _requantized(x, encoding, output, place):
    """Values on their way to another encoding: times one, as LiteRT's QUANTIZE rounds its factor.

    Nor does the converter keep in integers what else reads a tensor that QUANTIZE reads.
    """
    if encoding == output or None in (encoding, output):
        return x
    # Each one is stored in its own way: two equal products of a tensor would be merged, and both
    # would then have the encoding of one of them.
    one = Encoding(1.0, place % 255)
    return x * mark(np.ones((1,) * x.ndim, np.float32), one)


def _concatenate(op, values, encodings, output, place):
    parts = [_requantized(x, e, output, place) for x, e in zip(values, encodings)]
    if output is not None:
        parts = [mark(x, output) for x in parts]
    return jnp.concatenate(parts, op.axis + 1)


def _average_pool(op, values, encodings, output):
    """In integers a depthwise convolution: LiteRT's own pool would keep the input's encoding."""
    if None in (*encodings, output):
        return reference.evaluate(op, values, [None], None, ())
    channels = values[0].shape[-1]
    scale = np.full(channels, 1 / np.prod(op.window), np.float32)
    ones, zeros = np.ones((*op.window, 1, channels), np.int8), np.zeros(channels, np.float32)
    weights = Weights(ones, scale, zeros, 8)
    ends = (op.inputs, op.output, op.output)
    conv = Conv(*ends, weights, op.strides, op.padding, groups=channels)
    return _weighted(conv, values, encodings, output)


def _max_pool(op, values, encodings, output):
    (x,) = values
    window, strides = (1, *op.window, 1), (1, *op.strides, 1)
    padding = ((0, 0), *op.padding, (0, 0))
    same = padding == tuple(lax.padtype_to_pads(x.shape, window, strides, "SAME"))
    if not same and _from_zero(output):
        # No value is below zero, and XNNPACK pads with zeros only.
        x, padding = mark(jnp.pad(x, padding), output), ((0, 0),) * 4
    return lax.reduce_window(x, np.float32(-np.inf), lax.max, window, strides, padding)


def _slice(op, values, encodings, output):
    """Strides along H and W as axes of their own: XNNPACK has only slices without strides."""
    (x,) = values
    sizes, (high, wide, *deep) = x.shape[1:], op.strides
    even = all(n % stride == 0 for n, stride in zip(sizes, op.strides))
    if high == wide == 1 or deep != [1] or not even:
        return reference.evaluate(op, values, [None], None, ())
    (top, left, first), (bottom, right, last), (h, w, c) = op.starts, op.stops, sizes

    def stored(y):
        return y if output is None else mark(y, output)

    apart = stored(x.reshape(1, h // high, high, w // wide, wide * c))
    rows, columns = len(range(top, bottom, high)), len(range(left, right, wide))
    row, column = top // high, left // wide
    offset = left % wide * c
    starts = (0, row, top % high, column, offset + first)
    stops = (1, row + rows, top % high + 1, column + columns, offset + last)
    return stored(lax.slice(apart, starts, stops)).reshape(1, rows, columns, last - first)


def _lookup(op, values, encodings, output, place):
    y = reference.evaluate(op, values, [None], None, ())
    if output is None:
        return y
    own = _TABLES.get(op.function, output)
    return _requantized(mark(y, own), own, output, place)


def _multiply(op, values, encodings, output):
    a, b = values
    return a * jnp.broadcast_to(b, a.shape)


_RULES = {
    Conv: _weighted,
    Dense: _weighted,
    Add: lambda op, values, encodings, output: values[0] + values[1],
    Multiply: _multiply,
    Clip: lambda op, values, encodings, output: values[0],
    MaxPool: _max_pool,
    AveragePool: _average_pool,
    Slice: _slice,
}
# These are told their place in the program too.
_REQUANTIZING = {Concatenate: _concatenate, Lookup: _lookup, Convert: _convert}
