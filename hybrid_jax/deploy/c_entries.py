"""Operations as loops over entries in C: element by element, moved about, or reduced to fewer.

Each rule takes an operation and its `Context`, and returns statements. What is encoded is computed
in integers, as `program.run` does to the bit, the rest in floats; sums over whole axes in doubles,
right however many there are.
"""

import itertools
import math

import numpy as np

from hybrid_jax import program as p
from hybrid_jax.deploy import c_text
from hybrid_jax.deploy.c_context import (
    Context,
    clamped,
    converted,
    multiplier,
    requantized,
    result,
    steps,
)
from hybrid_jax.program import arithmetic, memory

EQUAL = "{y} = {x}"


def two(op: p.Add | p.Multiply | p.Maximum, context: Context) -> str:
    same = all(context.shape(name) == context.shape(op.output) for name in op.inputs)
    if isinstance(op, p.Add) and same and not context.program.in_floats(op):
        return _added(op, context)
    names = dict(zip("ab", op.inputs, strict=True))
    shape, operands = context.shape(op.output), {"y": context.operand(op.output)}
    for letter, name in names.items():
        operands[letter] = context.operand(name).repeated(context.shape(name))
    return c_text.each(shape, operands, "{y} = " + _of_two(op, context))


def _added(op, context):
    a, b, output = (context.encoding(name) for name in (*op.inputs, op.output))
    first, second, factor = arithmetic.addition(a, b, output)
    second = -second if op.minus else second
    start = -a.zero_point * first - b.zero_point * second
    terms = {"start": start, "first": first, "second": second, "multiplier": factor}
    ends = (context.operand(name).pointer for name in (*op.inputs, op.output))
    described = {"Terms": terms, "Result": result(output, op.clip)}
    return _call("add", ends, context.shape(op.output), described, context)


def _call(function, ends, shape, described, context, *numbers):
    """A call of what kernels.c has for all entries of a tensor."""
    fields = (f"&{context.constants.descriptor(*pair)}" for pair in described.items())
    given = (*ends, str(math.prod(shape)), *numbers, *fields)
    return f"{function}({', '.join(given)});"


def _of_two(op, context):
    a, b, output = (context.encoding(name) for name in (*op.inputs, op.output))
    if isinstance(op, p.Maximum):
        kind = "smaller" if isinstance(op, p.Minimum) else "larger"
        values = f"{converted('{a}', a, output)}, {converted('{b}', b, output)}"
        return f"{kind}({values})" if output is None else f"(uint8_t){kind}_int({values})"
    if isinstance(op, p.Multiply):
        if context.program.in_floats(op):
            return clamped("{a} * {b}", op.clip)
        product = f"{steps('{a}', a)} * {steps('{b}', b)}"
        return requantized(product, multiplier([a, b], output), output, op.clip)
    sign = "-" if op.minus else "+"
    if context.program.in_floats(op):
        return clamped(f"{{a}} {sign} {{b}}", op.clip)
    first, second, factor = arithmetic.addition(a, b, output)
    terms = f"{steps('{a}', a)} * {first} {sign} {steps('{b}', b)} * {second}"
    return requantized(terms, c_text.literal(factor), output, op.clip)


def clip(op: p.Clip, context: Context) -> str:
    encoding, output = context.encoding(op.inputs[0]), context.encoding(op.output)
    bounds = op.low, op.high
    if output is None:
        value = clamped("{x}", bounds)
    elif encoding == output:
        low, high = arithmetic.bounds(output, bounds)
        value = f"limit({{x}}, {low}, {high})"
    else:
        value = requantized(steps("{x}", encoding), multiplier([encoding], output), output, bounds)
    return _moved(op, context, f"{{y}} = {value}")


def convert(op: p.Convert, context: Context) -> str:
    if memory.is_view(context.program, op):
        return ""
    encoding, output = context.encoding(op.inputs[0]), context.encoding(op.output)
    if encoding is None:
        ends = (operand.pointer for operand in context.pair(op).values())
        factor = c_text.literal(np.float32(1) / np.float32(output.scale))
        described, shape = {"Result": result(output)}, context.shape(op.output)
        return _call("quantize_all", ends, shape, described, context, factor)
    return _moved(op, context, f"{{y}} = {converted('{x}', encoding, output)}")


def concatenate(op: p.Concatenate, context: Context) -> str:
    y, texts, start = context.operand(op.output), [], 0
    for name in op.inputs:
        shape, x = context.shape(name), context.operand(name)
        part = y._replace(offset=y.offset + start * y.strides[op.axis])
        value = converted("{x}", context.encoding(name), context.encoding(op.output))
        if x == part:  # it is made there
            pass
        elif value == "{x}" and context.encoding(name) and x.strides == part.strides:
            texts.append(_call("copy", (part.pointer, x.pointer), shape, {}, context))
        else:
            texts.append(c_text.each(shape, {"x": x, "y": part}, f"{{y}} = {value}"))
        start += shape[op.axis]
    return "\n".join(texts)


def transpose(op: p.Transpose, context: Context) -> str:
    return _moved(op, context, x=context.operand(op.inputs[0]).axes(op.permutation))


def broadcast(op: p.Broadcast, context: Context) -> str:
    (name,) = op.inputs
    return _moved(op, context, x=context.operand(name).repeated(context.shape(name)))


def slices(op: p.Slice, context: Context) -> str:
    if memory.is_view(context.program, op):
        return ""
    x = context.operand(op.inputs[0]).shifted(op.starts)
    strides = (s * step for s, step in zip(x.strides, op.strides, strict=True))
    return _moved(op, context, x=x._replace(strides=tuple(strides)))


def gather(op: p.Gather, context: Context) -> str:
    x, y = context.pair(op).values()
    axis, indices, step = op.axis, op.indices, x.strides[op.axis]
    apart = {after - before for before, after in itertools.pairwise(indices)}
    even = step * apart.pop() if len(apart) == 1 else 0
    strides = (*x.strides[:axis], even, *x.strides[axis + 1 :])
    if not apart:
        x = x._replace(offset=x.offset + step * indices[0], strides=strides)
        return _moved(op, context, x=x)
    places = context.constants.array("places", np.int32(indices) * np.int32(step))
    strides = (*x.strides[:axis], 0, *x.strides[axis + 1 :])
    along = tuple(int(i == axis) for i in range(len(x.strides)))
    operands = {"x": x._replace(strides=strides), "y": y, "p": c_text.Operand(places, 0, along)}

    def entry(at):
        x = at["x"]._replace(terms=(*at["x"].terms, at["p"].entry))
        return f"{at['y'].entry} = {x.entry};"

    return c_text.each(context.shape(op.output), operands, entry)


def pad(op: p.Pad, context: Context) -> str:
    x, y = context.pair(op).values()
    fill = c_text.literal(op.fill(context.encoding(op.output)))
    whole = c_text.each(context.shape(op.output), {"y": y}, f"{{y}} = {fill}")
    shape = [
        n + min(before, 0) + min(after, 0)
        for n, (before, after) in zip(context.shape(op.inputs[0]), op.padding, strict=True)
    ]
    x = x.shifted([max(-before, 0) for before, _ in op.padding])
    y = y.shifted([max(before, 0) for before, _ in op.padding])
    return f"{whole}\n{c_text.each(shape, {'x': x, 'y': y}, EQUAL)}"


def _moved(op, context, statement=EQUAL, x=None):
    """A loop over all entries of the output, and those of the input beside them."""
    operands = context.pair(op) | ({} if x is None else {"x": x})
    return c_text.each(context.shape(op.output), operands, statement)


def mean(op: p.Mean, context: Context) -> str:
    (name,) = op.inputs
    encoding, output = context.encoding(name), context.encoding(op.output)
    count = op.count(context.shape(name))
    if context.program.in_floats(op):
        lines = "double sum = 0.0;", ("sum += {x}",), f"{{y}} = (float)(sum / {count});"
    else:
        value = requantized("sum", multiplier([encoding], output, count), output)
        lines = "int32_t sum = 0;", (f"sum += {steps('{x}', encoding)}",), f"{{y}} = {value};"
    return _along(op, context, op.axes, lines)


def largest(op: p.Largest, context: Context) -> str:
    if context.program.in_floats(op):
        start, pick = "float most = {x};", "most = larger({x}, most)"
    else:
        start, pick = "uint8_t most = {x};", "most = {x} > most ? {x} : most"
    return _along(op, context, op.axes, (start, (pick,), "{y} = most;"))


def softmax(op: p.Softmax, context: Context) -> str:
    axis = op.axis % len(context.shape(op.output))
    lines = (
        "float most = {x};",
        ("most = larger({x}, most)",),
        "double sum = 0.0;",
        ("{y} = expf({x} - most)", "sum += {y}"),
        ("{y} = (float)({y} / sum)",),
    )
    return _along(op, context, (axis,), lines)


def normalize(op: p.Normalize, context: Context) -> str:
    count = math.prod(context.shape(op.output)[axis] for axis in op.axes)
    epsilon = c_text.literal(np.float32(op.epsilon))
    lines = (
        "double sum = 0.0, squares = 0.0;",
        ("sum += {x}",),
        f"const float mean = (float)(sum / {count});",
        ("squares += (double)({x} - mean) * ({x} - mean)",),
        f"const float factor = 1.0f / sqrtf((float)(squares / {count}) + {epsilon});",
        ("{y} = ({x} - mean) * factor",),
    )
    return _along(op, context, op.axes, lines)


def _along(op, context, axes, lines):
    """For each entry of the other axes these lines; those in tuples are loops over the axes."""
    (x, y), shape = context.pair(op).values(), context.shape(op.inputs[0])
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    # A reduced result has none of the axes.
    whole = {"x": x, "y": y} if len(y.strides) == len(shape) else {"x": x}

    def entry(at):
        along = {k: at[k]._replace(strides=own.axes(axes).strides) for k, own in whole.items()}
        sizes = [shape[axis] for axis in axes]
        first = {k: operand.entry for k, operand in at.items()}
        return "\n".join(
            line.format(**first)
            if isinstance(line, str)
            else c_text.each(sizes, along, ";\n".join(line), "k")
            for line in lines
        )

    outer = {"x": x, "y": y} | {k: operand.axes(kept) for k, operand in whole.items()}
    return c_text.each([shape[axis] for axis in kept], outer, entry)


def matmul(op: p.MatMul, context: Context) -> str:
    a, b, y = (context.operand(name) for name in (*op.inputs, op.output))
    encodings = [context.encoding(name) for name in op.inputs]
    output, inner = context.encoding(op.output), context.shape(op.inputs[0])[-1]
    if context.program.in_floats(op):
        start, step, value = "float sum = 0.0f;", "sum += {a} * {b}", "sum"
    else:
        arithmetic.check_product(op.output, *encodings, inner)
        left, right = (steps(*pair) for pair in zip(("{a}", "{b}"), encodings, strict=True))
        start, step = "int32_t sum = 0;", f"sum += {left} * {right}"
        value = requantized("sum", multiplier(encodings, output), output)
    outer = {
        "a": a._replace(strides=(*a.strides[:-1], 0)),
        "b": b._replace(strides=(*b.strides[:-2], 0, b.strides[-1])),
        "y": y,
    }

    def entry(at):
        along = {
            "a": at["a"]._replace(strides=a.strides[-1:]),
            "b": at["b"]._replace(strides=b.strides[-2:-1]),
        }
        loop = c_text.each((inner,), along, step, "k")
        return "\n".join([start, loop, f"{at['y'].entry} = {value};"])

    return c_text.each(context.shape(op.output), outer, entry)
