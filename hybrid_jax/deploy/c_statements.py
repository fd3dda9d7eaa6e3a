"""The operations of an integer program as C: calls of the functions in kernels.c, and plain loops.

Windows (convolution, pools) are calls with constant descriptors; what works entry by entry, and
what moves entries about, is a loop nest with the program's numbers in it.
"""

import dataclasses
import math
import re
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hybrid_jax.deploy import arithmetic, memory
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

_WORD = 4  # Bytes of an int32, a float and a pointer on a 32-bit microcontroller.
_PER_LINE = 20
_TYPES = {"float32": "float", "int8": "int8_t", "int32": "int32_t", "uint8": "uint8_t"}
_ONE = Encoding(1.0)


@dataclasses.dataclass
class Constants:
    """What lies in flash: arrays, equal ones once, and the fields of descriptors.

    Attributes:
      declarations: {(type, contents): (name, declaration)}.
      flash: Bytes, with words of 32 bits.
    """

    declarations: dict[tuple[str, bytes], tuple[str, str]] = dataclasses.field(default_factory=dict)
    flash: int = 0

    def array(self, kind: str, values: np.ndarray) -> str:
        """The name of a constant array."""
        c_type = _TYPES[values.dtype.name]
        key = c_type, values.tobytes()
        if key not in self.declarations:
            name = f"{kind}_{len(self.declarations)}"
            numbers = [_literal(value) for value in values.ravel().tolist()]
            lines = [
                ", ".join(numbers[i : i + _PER_LINE]) for i in range(0, len(numbers), _PER_LINE)
            ]
            inside = ",\n    ".join(lines)
            text = f"static const {c_type} {name}[{values.size}] = {{\n    {inside}}};"
            self.declarations[key] = name, text
            self.flash += values.nbytes
        return self.declarations[key][0]

    def descriptor(self, kind: str, fields: Mapping[str, Any]) -> str:
        """The declaration of a constant struct, called as its type is in lower case."""
        self.flash += _WORD * _leaves(fields)
        text = f"static const {kind} {kind.lower()} = {_initializer(fields)};"
        return textwrap.fill(text, 92, subsequent_indent="    ", break_on_hyphens=False)


class Body(NamedTuple):
    """The statements of a function, and the bytes of the arena that it works in."""

    text: str
    ram: int


def body(program: Program, constants: Constants, pack: bool) -> Body:
    """The statements that compute `output` from `input`, in an array `arena`.

    Args:
      program: In integers between its ends.
      constants: Takes up what the statements refer to.
      pack: Whether weights that fit 4 bits lie two to a byte.

    Raises:
      ValueError: If a tensor between the ends is float32, or an end is not.
    """
    ends = _ends(program)
    scratch = {
        op.output: _kernels(op)[0].size for op in program.weighted if pack and _fits_half_a_byte(op)
    }
    context = _Context(program, constants, ends, memory.plan(program, scratch))
    texts = [
        f"/* {type(op).__name__}: {_comment(op.output)} */\n" + _RULES[type(op)](op, context)
        for op in program.operations
        if not memory.is_view(program, op)
    ]
    return Body("\n".join(texts), context.plan.size)


class _Operand(NamedTuple):
    """Entry (i, j, …) is array[offset + i · strides[0] + j · strides[1] + …]."""

    array: str
    offset: int
    strides: tuple[int, ...]


class _Context(NamedTuple):
    program: Program
    constants: Constants
    ends: dict[str, str]
    plan: memory.Plan

    def shape(self, name: str) -> tuple[int, ...]:
        return self.program.tensors[name].shape

    def operand(self, name: str) -> _Operand:
        array = self.ends.get(name, "arena")
        return _Operand(array, self.plan.offsets.get(name, 0), _strides(self.shape(name)))

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
    for name in {program.input, program.output, *made}:
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
    scratch = f"(int8_t *)arena + {context.plan.scratch[y]}" if packed else "0"
    ends = f"{context.pointer(x)}, {context.pointer(y)}"
    return _call(
        f"{function}({ends}, &window, &layer, &result, {scratch});",
        constants.descriptor("Window", window),
        constants.descriptor("Layer", layer),
        constants.descriptor("Result", _result(output, op.clip)),
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


def _fits_half_a_byte(op):
    values = op.weights.values
    return values.min() >= -8 and values.max() <= 7


def _pack(kernels):
    """Two entries to a byte, the low half first, each row from a whole byte."""
    even = np.pad(kernels, ((0, 0), (0, kernels.shape[1] % 2))).view(np.uint8) & 15
    return (even[:, ::2] | even[:, 1::2] << 4).view(np.int8)


def _max_pool(op, context):
    (x,), y = op.inputs, op.output
    window = _window(context.shape(x), context.shape(y), op.window, op.strides, op.padding)
    return _call(
        f"max_pool({context.pointer(x)}, {context.pointer(y)}, &window);",
        context.constants.descriptor("Window", window),
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
    return _call(
        f"average_pool({context.pointer(x)}, {context.pointer(y)}, &window, "
        f"{encoding.zero_point}, {factor}, &result);",
        context.constants.descriptor("Window", window),
        context.constants.descriptor("Result", _result(output)),
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
    statement = "{y} = " + _requantized(terms, _literal(factor), output, op.clip)
    names = {"a": op.inputs[0], "b": op.inputs[1], "y": op.output}
    return _each(context.shape(op.output), _operands(context, names), statement)


def _multiply(op, context):
    a, b = (context.program.encoding(name) for name in op.inputs)
    output = context.program.encoding(op.output)
    product = f"{_steps('{a}', a)} * {_steps('{b}', b)}"
    statement = "{y} = " + _requantized(product, _multiplier([a, b], output), output, op.clip)
    names = {"a": op.inputs[0], "b": op.inputs[1], "y": op.output}
    shape, operands = context.shape(op.output), _operands(context, names)
    once = [n == 1 for n in context.shape(op.inputs[1])]
    strides = tuple(0 if one else s for one, s in zip(once, operands["b"].strides, strict=True))
    return _each(shape, operands | {"b": operands["b"]._replace(strides=strides)}, statement)


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
        factor = _literal(np.float32(1) / np.float32(output.scale))
        return f"quantize({{x}}, {factor}, {_limits(output)})"
    return _requantized(_steps("{x}", encoding), _multiplier([encoding], output), output)


def _concatenate(op, context):
    y, texts, start = context.operand(op.output), [], 0
    for name in op.inputs:
        encodings = context.program.encoding(name), context.program.encoding(op.output)
        shape, x = context.shape(name), context.operand(name)
        part = y._replace(offset=y.offset + start * y.strides[op.axis])
        texts.append(_each(shape, {"x": x, "y": part}, f"{{y}} = {_converted(*encodings)}"))
        start += shape[op.axis]
    return "\n".join(texts)


def _transpose(op, context):
    x, y = context.operand(op.inputs[0]), context.operand(op.output)
    x = x._replace(strides=tuple(x.strides[axis] for axis in op.permutation))
    return _each(context.shape(op.output), {"x": x, "y": y}, "{y} = {x}")


def _pad(op, context):
    x, y = context.operand(op.inputs[0]), context.operand(op.output)
    fill = f"{{y}} = {context.program.encoding(op.output).zero_point}"
    whole = _each(context.shape(op.output), {"y": y}, fill)
    # Negative padding cuts off.
    shape = [
        n + min(before, 0) + min(after, 0)
        for n, (before, after) in zip(context.shape(op.inputs[0]), op.padding, strict=True)
    ]
    x = _shifted(x, [max(-before, 0) for before, _ in op.padding])
    y = _shifted(y, [max(before, 0) for before, _ in op.padding])
    return f"{whole}\n{_each(shape, {'x': x, 'y': y}, '{y} = {x}')}"


def _slice(op, context):
    x, y = context.operand(op.inputs[0]), context.operand(op.output)
    x = _shifted(x, op.starts)
    x = x._replace(strides=tuple(s * step for s, step in zip(x.strides, op.strides, strict=True)))
    return _each(context.shape(op.output), {"x": x, "y": y}, "{y} = {x}")


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
    low, high, zero, _ = map(_literal, _result(output, clip).values())
    return f"{low}, {high}" if output is None else f"{low}, {high}, {zero}"


def _requantized(total, factor, output, clip=UNBOUNDED):
    """The expression of a result from that of its int32 sum."""
    if output is None:
        return f"clamp((float)({total}) * {factor}, {_limits(output, clip)})"
    return f"requantize({total}, {factor}, {_limits(output, clip)})"


def _multiplier(encodings, output, count=1):
    scales = (encoding.scale for encoding in encodings)
    return _literal(arithmetic.multiplier(*scales, output=output or _ONE, count=count))


def _steps(entry, encoding):
    return f"(int32_t)({entry} - {encoding.zero_point})"


def _strides(shape):
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _shifted(operand, starts):
    offset = sum(start * s for start, s in zip(starts, operand.strides, strict=True))
    return operand._replace(offset=operand.offset + offset)


def _operands(context, names):
    return {letter: context.operand(name) for letter, name in names.items()}


def _map(op, context, expression):
    """A loop over all entries of one input and the output."""
    operands = _operands(context, {"x": op.inputs[0], "y": op.output})
    return _each(context.shape(op.output), operands, f"{{y}} = {expression}")


def _each(shape, operands: Mapping[str, _Operand], statement):
    """The loops over every index of `shape`, axes that step alike made one."""
    axes: list[tuple[int, tuple[int, ...]]] = []
    for n, *steps in zip(shape, *(o.strides for o in operands.values()), strict=True):
        if axes and all(outer == n * s for outer, s in zip(axes[-1][1], steps, strict=True)):
            axes[-1] = axes[-1][0] * n, tuple(steps)
        elif n > 1:
            axes.append((n, tuple(steps)))
    entries = {}
    for k, (letter, operand) in enumerate(operands.items()):
        terms = [(steps[k], f"i{i}") for i, (_, steps) in enumerate(axes) if steps[k]]
        index = [i if step == 1 else f"{step} * {i}" for step, i in terms]
        if operand.offset or not index:
            index.insert(0, str(operand.offset))
        entries[letter] = f"{operand.array}[{' + '.join(index)}]"
    text = statement.format(**entries) + ";"
    for i, (n, _) in reversed(list(enumerate(axes))):
        inside = _indent(text)
        text = f"for (int32_t i{i} = 0; i{i} < {n}; i{i}++) {{\n{inside}\n}}"
    return text


def _call(call, *descriptors):
    """A call with its constants, in a block of its own."""
    return "{\n" + _indent("\n".join([*descriptors, call])) + "\n}"


def _indent(text):
    return textwrap.indent(text, "    ")


def _comment(text):
    """Printable, and cannot end the comment."""
    return re.sub(r"[^ -~]|[*/\\]", ".", text)


def _initializer(value):
    if isinstance(value, Mapping):
        return "{" + ", ".join(f".{key} = {_initializer(v)}" for key, v in value.items()) + "}"
    return value if isinstance(value, str) else _literal(value)


def _leaves(value):
    return sum(map(_leaves, value.values())) if isinstance(value, Mapping) else 1


def _literal(value):
    """A number in C; a float as its exact bits."""
    if isinstance(value, int | np.integer):
        return str(value)
    digits, exponent = float(value).hex().split("p")
    return f"{digits.rstrip('0').rstrip('.')}p{exponent}f"
