"""The operations of an integer program as C: calls of the functions in kernels.c, and plain loops.

Windows (convolution, pools) are calls with constant descriptors; what works entry by entry, and
what moves entries about, is a loop nest with the program's numbers in it.
"""

import math
from typing import NamedTuple

import numpy as np

from hybrid_jax.deploy import arithmetic, c_text, memory
from hybrid_jax.deploy.packed import pack_bits
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
    Pad,
    Program,
    Slice,
    Softmax,
    Transpose,
)
from hybrid_jax.quantization import integer_step

_ONE = Encoding(1.0)


class Body(NamedTuple):
    """The statements of a function, the bytes of the arena that it works in, its kernels' bits."""

    text: str
    ram: int
    kernel_bits: set[int]


def body(program: Program, constants: c_text.Constants, pack: bool) -> Body:
    """The statements that compute `output` from `input`, in an array `arena`.

    Args:
      program: In integers between its ends.
      constants: Takes up what the statements refer to.
      pack: Whether weights of up to 4 bits lie two to a byte.

    Raises:
      ValueError: If a tensor between the ends is float32, or an end is not.
    """
    ends = _ends(program)
    scratch = {
        op.output: _kernels(op)[0].size for op in program.weighted if pack and op.weights.bits <= 4
    }
    context = _Context(program, constants, ends, memory.plan(program, scratch))
    texts = [
        c_text.comment(f"{type(op).__name__} {op.output}") + "\n" + _RULES[type(op)](op, context)
        for op in program.operations
        if not memory.is_view(program, op)
    ]
    bits = {4 if op.output in scratch else 8 for op in program.weighted}
    return Body("\n".join(texts), context.plan.size, bits)


class _Context(NamedTuple):
    program: Program
    constants: c_text.Constants
    ends: dict[str, str]
    plan: memory.Plan

    def shape(self, name: str) -> tuple[int, ...]:
        return self.program.tensors[name].shape

    def operand(self, name: str) -> c_text.Operand:
        array = self.ends.get(name, "arena")
        offset = self.plan.offsets.get(name, 0)
        return c_text.Operand.whole(array, offset, self.shape(name))

    def pointer(self, name: str) -> str:
        array, offset, _ = self.operand(name)
        return f"{array} + {offset}" if offset else array


def _ends(program):
    """{name: 'input' or 'output'}: float tensors, which lie where the caller of the C code says."""
    made = {op.output: op for op in program.operations}
    ends = {program.output: "output"}
    name = program.output
    while name in made and _stays_float(program, made[name]):
        [name] = made[name].inputs
        ends[name] = "output"
    if ends.setdefault(program.input, "input") == "output":
        raise ValueError(_MISPLACED.format(program.input))
    for op in program.operations:
        if memory.is_view(program, op) and op.inputs[0] in ends:
            ends.setdefault(op.output, ends[op.inputs[0]])
    for name in dict.fromkeys([program.input, *made, program.output]):
        if (name in ends) != (program.encoding(name) is None):
            raise ValueError(_MISPLACED.format(name))
    for op in program.operations:
        for name in op.inputs:
            if name in ends and not _may_read(program, op, ends[name], ends.get(op.output)):
                raise ValueError(_MISPLACED.format(name))
    return ends


_MISPLACED = (
    "tensor {!r} must be float32 at the ends of the program and encoded between them: in C floats "
    "come in to be converted, and go out, through a softmax at most"
)


def _stays_float(program, op):
    return program.encoding(op.inputs[0]) is None and (
        isinstance(op, Softmax) or memory.is_view(program, op)
    )


def _may_read(program, op, source, target):
    """Whether an operation may read a float at `source` to write to `target`, None is the arena."""
    if isinstance(op, Softmax):
        return source == target == "output"
    if memory.is_view(program, op):
        return source == target
    return isinstance(op, Convert) and source == "input"


def _weighted(op, context):
    (x,), y, weights = op.inputs, op.output, op.weights
    encoding, output = context.program.encoding(x), context.program.encoding(y)
    kernels, features = _kernels(op), weights.values.shape[-1]
    packed = y in context.plan.scratch
    factor = arithmetic.multiplier(encoding.scale, weights.scale, output=output or _ONE)
    constants = context.constants
    layer = {
        "weights": constants.array("weights", _pack(kernels) if packed else kernels),
        "bias": constants.array("bias", arithmetic.integer_bias(weights, encoding)),
        "multiplier": constants.array("multiplier", np.broadcast_to(factor, features)),
        "groups": getattr(op, "groups", 1),
        "packed": int(packed),
        "zero": encoding.zero_point,
    }
    if isinstance(op, Dense):
        window = _window((1, 1, *context.shape(x)), (1, 1, features), (1, 1))
    else:
        window = _window(
            context.shape(x),
            context.shape(y),
            weights.values.shape[:2],
            op.strides,
            op.padding,
            op.dilation,
        )
    function = "depthwise" if _is_depthwise(op) else "conv"
    scratch = f"arena + {context.plan.scratch[y]}" if packed else "0"
    ends = f"{context.pointer(x)}, {context.pointer(y)}"
    return c_text.block(
        constants.descriptor("Window", window),
        constants.descriptor("Layer", layer),
        constants.descriptor("Result", _result(output, op.clip)),
        f"{function}({ends}, &window, &layer, &result, {scratch});",
    )


def _is_depthwise(op):
    """Whether each channel makes one, so that the channels lie side by side in the kernel too."""
    return (
        isinstance(op, Conv)
        and op.groups == op.weights.values.shape[-1] > 1 == (op.weights.values.shape[2])
    )


def _kernels(op):
    """int8 (O, kh · kw · C / groups), or (1, kh · kw · C) of a depthwise convolution."""
    values = op.weights.values
    if _is_depthwise(op):
        return values.reshape(1, -1)
    return np.moveaxis(values, -1, 0).reshape(values.shape[-1], -1)


def _pack(kernels):
    """Two eighths of entries to a byte, the low half first, each row from a whole byte."""
    return pack_bits(kernels // integer_step(4), 4).view(np.int8)


def _max_pool(op, context):
    (x,), y = op.inputs, op.output
    window = _window(context.shape(x), context.shape(y), op.window, op.strides, op.padding)
    return c_text.block(
        context.constants.descriptor("Window", window),
        f"max_pool({context.pointer(x)}, {context.pointer(y)}, &window);",
    )


def _average(op, context):
    (x,), y = op.inputs, op.output
    encoding, output = context.program.encoding(x), context.program.encoding(y)
    if isinstance(op, Mean):
        sizes = context.shape(x)[:2]
        window = _window(context.shape(x), (1, 1, *context.shape(y)), sizes)
    else:
        sizes = op.window
        window = _window(context.shape(x), context.shape(y), sizes, op.strides, op.padding)
    factor = _multiplier([encoding], output, math.prod(sizes))
    return c_text.block(
        context.constants.descriptor("Window", window),
        context.constants.descriptor("Result", _result(output)),
        f"average_pool({context.pointer(x)}, {context.pointer(y)}, &window, "
        f"{encoding.zero_point}, {factor}, &result);",
    )


def _softmax(op, context):
    *rows, n = context.shape(op.output)
    return f"softmax(output, {math.prod(rows)}, {n});"


def _add(op, context):
    a, b = (context.program.encoding(name) for name in op.inputs)
    output = context.program.encoding(op.output)
    if output is None:
        raise ValueError(_MISPLACED.format(op.output))
    first, second, factor = arithmetic.addition(a, b, output)
    terms = f"{_steps('{a}', a)} * {first} + {_steps('{b}', b)} * {second}"
    statement = "{y} = " + _requantized(terms, c_text.literal(factor), output, op.clip)
    names = {"a": op.inputs[0], "b": op.inputs[1], "y": op.output}
    return c_text.each(context.shape(op.output), _operands(context, names), statement)


def _multiply(op, context):
    a, b = (context.program.encoding(name) for name in op.inputs)
    output = context.program.encoding(op.output)
    product = f"{_steps('{a}', a)} * {_steps('{b}', b)}"
    statement = "{y} = " + _requantized(product, _multiplier([a, b], output), output, op.clip)
    names = {"a": op.inputs[0], "b": op.inputs[1], "y": op.output}
    shape, operands = context.shape(op.output), _operands(context, names)
    once = [n == 1 for n in context.shape(op.inputs[1])]
    strides = tuple(0 if one else s for one, s in zip(once, operands["b"].strides, strict=True))
    return c_text.each(shape, operands | {"b": operands["b"]._replace(strides=strides)}, statement)


def _clip(op, context):
    low, high = arithmetic.bounds(context.program.encoding(op.output), (op.low, op.high))
    return _map(op, context, f"limit({{x}}, {low}, {high})")


def _lookup(op, context):
    [encoding] = map(context.program.encoding, op.inputs)
    values = arithmetic.table(op.function, encoding, context.program.encoding(op.output))
    return _map(op, context, f"{context.constants.array('table', values)}[{{x}}]")


def _convert(op, context):
    encodings = [context.program.encoding(name) for name in (*op.inputs, op.output)]
    return _map(op, context, _converted(*encodings))


def _converted(encoding, output):
    if encoding == output:
        return "{x}"
    if encoding is None:
        factor = c_text.literal(np.float32(1) / np.float32(output.scale))
        return f"quantize({{x}}, {factor}, {_limits(output)})"
    return _requantized(_steps("{x}", encoding), _multiplier([encoding], output), output)


def _concatenate(op, context):
    y, texts, start = context.operand(op.output), [], 0
    for name in op.inputs:
        encodings = context.program.encoding(name), context.program.encoding(op.output)
        shape, x = context.shape(name), context.operand(name)
        part = y._replace(offset=y.offset + start * y.strides[op.axis])
        texts.append(c_text.each(shape, {"x": x, "y": part}, f"{{y}} = {_converted(*encodings)}"))
        start += shape[op.axis]
    return "\n".join(texts)


def _transpose(op, context):
    x, y = context.operand(op.inputs[0]), context.operand(op.output)
    x = x._replace(strides=tuple(x.strides[axis] for axis in op.permutation))
    return c_text.each(context.shape(op.output), {"x": x, "y": y}, "{y} = {x}")


def _pad(op, context):
    x, y = context.operand(op.inputs[0]), context.operand(op.output)
    fill = f"{{y}} = {context.program.encoding(op.output).zero_point}"
    whole = c_text.each(context.shape(op.output), {"y": y}, fill)
    # Negative padding cuts off.
    shape = [
        n + min(before, 0) + min(after, 0)
        for n, (before, after) in zip(context.shape(op.inputs[0]), op.padding, strict=True)
    ]
    x = x.shifted([max(-before, 0) for before, _ in op.padding])
    y = y.shifted([max(before, 0) for before, _ in op.padding])
    return f"{whole}\n{c_text.each(shape, {'x': x, 'y': y}, '{y} = {x}')}"


def _slice(op, context):
    x, y = context.operand(op.inputs[0]), context.operand(op.output)
    x = x.shifted(op.starts)
    x = x._replace(strides=tuple(s * step for s, step in zip(x.strides, op.strides, strict=True)))
    return c_text.each(context.shape(op.output), {"x": x, "y": y}, "{y} = {x}")


_RULES = {
    Conv: _weighted,
    Dense: _weighted,
    Add: _add,
    Multiply: _multiply,
    Clip: _clip,
    MaxPool: _max_pool,
    AveragePool: _average,
    Mean: _average,
    Concatenate: _concatenate,
    Transpose: _transpose,
    Pad: _pad,
    Slice: _slice,
    Lookup: _lookup,
    Softmax: _softmax,
    Convert: _convert,
}


def _window(shape, output, window, strides=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1)):
    down, across = (
        {
            "length": shape[i],
            "outputs": output[i],
            "window": window[i],
            "stride": strides[i],
            "padding": padding[i][0],
            "dilation": dilation[i],
        }
        for i in range(2)
    )
    return {"down": down, "across": across, "channels": shape[2], "features": output[2]}


def _result(output, clip=UNBOUNDED):
    if output is None:
        most = np.finfo(np.float32).max
        low, high = (np.float32(np.clip(end, -most, most)) for end in clip)
        return {"low": low, "high": high, "zero": 0, "encoded": 0}
    low, high = (np.float32(end - output.zero_point) for end in arithmetic.bounds(output, clip))
    return {"low": low, "high": high, "zero": output.zero_point, "encoded": 1}


def _limits(output, clip=UNBOUNDED):
    low, high, zero, _ = map(c_text.literal, _result(output, clip).values())
    return f"{low}, {high}" if output is None else f"{low}, {high}, {zero}"


def _requantized(total, factor, output, clip=UNBOUNDED):
    """The expression of a result from that of its int32 sum."""
    if output is None:
        return f"clamp((float)({total}) * {factor}, {_limits(output, clip)})"
    return f"requantize({total}, {factor}, {_limits(output, clip)})"


def _multiplier(encodings, output, count=1):
    scales = (encoding.scale for encoding in encodings)
    return c_text.literal(arithmetic.multiplier(*scales, output=output or _ONE, count=count))


def _steps(entry, encoding):
    zero = encoding.zero_point
    return f"(int32_t)({entry} - {zero})" if zero else f"(int32_t){entry}"


def _operands(context, names):
    return {letter: context.operand(name) for letter, name in names.items()}


def _map(op, context, expression):
    """A loop over all entries of one input and the output."""
    operands = _operands(context, {"x": op.inputs[0], "y": op.output})
    return c_text.each(context.shape(op.output), operands, f"{{y}} = {expression}")
