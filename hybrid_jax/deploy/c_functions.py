"""Functions of each value in C: tables of integers, and expressions of floats step by step."""

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import program as p
from hybrid_jax.deploy import c_text
from hybrid_jax.deploy.c_context import Context
from hybrid_jax.program import arithmetic, functions


def function(op: p.Function, context: Context) -> str:
    """A table of what is encoded, an expression of floats."""
    return _expression(op, context) if context.program.in_floats(op) else _table(op, context)


def _table(op, context):
    encodings = [context.encoding(name) for name in (*op.inputs, op.output)]
    values = arithmetic.table(op.steps, op.constants, *encodings)
    # Of channels that differ each has 256 entries, one after the other.
    name = context.constants.array("table", np.ascontiguousarray(values.T))
    shape = context.shape(op.output)
    along = [0] * len(shape)
    if values.ndim == 2:
        along[-1] = 256
    operands = context.pair(op) | {"t": c_text.Operand(name, 0, tuple(along))}

    def entry(at):
        table = at["t"]._replace(terms=(*at["t"].terms, at["x"].entry))
        return f"{at['y'].entry} = {table.entry};"

    return c_text.each(shape, operands, entry)


def _expression(op, context):
    shape = context.shape(op.output)
    lines, result = _lines(op)
    operands = {"y": context.operand(op.output)}
    for i, value in enumerate([*op.inputs, *op.constants]):
        if f"{{v{i}}}" in "".join([*lines, result]):
            operands[f"v{i}"] = _given(value, len(shape), context)

    def entry(at):
        entries = {letter: operand.entry for letter, operand in at.items()}
        text = [line.format(**entries) for line in lines]
        return "\n".join([*text, f"{entries['y']} = {result.format(**entries)};"])

    return c_text.each(shape, operands, entry)


def _given(value, rank, context):
    """An input, or a constant along the last axis; lengths of 1 broadcast."""
    if isinstance(value, str):
        return context.operand(value).repeated(context.shape(value))
    array = context.constants.array("constant", np.asarray(value))
    return c_text.Operand(array, 0, (0,) * (rank - 1) + (int(len(value) > 1),))


def _lines(op):
    """A declaration for each step that counts, and the expression of the result."""
    given = [*op.inputs, *op.constants]
    names = [f"a{i}" if _varies(value) else _number(value) for i, value in enumerate(given)]
    names += [f"s{i}" for i in range(len(op.steps))]
    if not op.steps:
        return [], "{v0}"
    dtypes, needed, lines = _dtypes(op), {len(names) - 1}, []
    for i in reversed(range(len(names))):
        if i not in needed:
            continue
        if i >= len(given):
            step = op.steps[i - len(given)]
            needed |= set(step.operands)
            value = _written(op, step, [(names[k], dtypes[k]) for k in step.operands], dtypes[i])
        elif _varies(given[i]):
            value = f"{{v{i}}}"
        else:
            continue
        lines.append(f"const {_type(op, dtypes[i])} {names[i]} = {value};")
    return lines[::-1], names[-1]


def _varies(value):
    return isinstance(value, str) or np.ndim(value) > 0


def _number(value):
    number = value.item()
    return c_text.literal(int(number) if isinstance(number, bool) else number)


def _dtypes(op):
    def every(*inputs):
        made = [*inputs, *map(jnp.asarray, op.constants)]
        for step in op.steps:
            made.append(functions.evaluate([step], made))
        return made

    inputs = [jax.ShapeDtypeStruct((1,), np.float32)] * len(op.inputs)
    return [value.dtype for value in jax.eval_shape(every, *inputs)]


def _type(op, dtype):
    name = np.dtype(dtype).name
    if name not in c_text.TYPES:
        raise ValueError(f"function {op.output!r} must be in float32 or integers in C, got {name}")
    return c_text.TYPES[name]


def _written(op, step, operands, dtype):
    """The C expression of a step; operands are (text, dtype) pairs."""
    texts, kinds = zip(*operands, strict=True)
    options = dict(step.options)
    kind = kinds[-1]
    floating = np.issubdtype(kind, np.floating)
    template = (_FLOATS if floating else _INTEGERS).get(step.name)
    if step.name == "convert_element_type":
        return _cast(texts[0], kind, np.dtype(dtype), _type(op, dtype))
    if step.name == "select_n":
        which, *cases = texts
        *choices, last = reversed(cases) if len(cases) == 2 else cases
        for i, case in reversed(list(enumerate(choices))):
            condition = which if len(cases) == 2 else f"{which} <= {i}"
            last = f"({condition} ? {case} : {last})"
        return last
    if step.name == "not":
        template = "!{0}" if kind == np.bool_ else "(T)~{0}"
    if step.name == "round":
        even = options["rounding_method"] == "TO_NEAREST_EVEN"
        template = "rintf({0})" if even else "roundf({0})"
    if step.name == "integer_pow":
        power = options["y"]
        if floating:
            template = f"powf({{0}}, {c_text.literal(float(power))})"
        elif power > 0:
            template = "(T)(" + " * ".join(["(uint32_t){0}"] * power) + ")"
    if step.name == "pow" and not np.issubdtype(kinds[0], np.floating):
        template = None
    if template is None:
        raise ValueError(
            f"function {op.output!r} must be of steps that C has, got {step.name!r} of "
            f"{' and '.join(str(kind) for kind in kinds)}"
        )
    return template.replace("(T)", f"({_type(op, dtype)})").format(*texts)


def _cast(text, kind, dtype, c_type):
    if dtype == np.bool_:
        return f"{text} != 0"
    if np.issubdtype(kind, np.floating) and np.issubdtype(dtype, np.integer):
        return f"({c_type}){whole(text, dtype)}"
    return text if kind == dtype else f"({c_type}){text}"


def whole(text: str, dtype: np.dtype) -> str:
    """A float as the nearest integer towards zero that a dtype has."""
    limits = np.iinfo(dtype)
    return f"truncated({text}, {c_text.literal(limits.min)}, {c_text.literal(limits.max)})"


_LIBRARY = (
    *("exp", "exp2", "log", "log1p", "expm1", "sqrt", "cbrt", "tanh", "sin", "cos", "tan", "sinh"),
    *("cosh", "asin", "acos", "atan", "asinh", "acosh", "atanh", "erf", "erfc", "floor", "ceil"),
)
_EITHER = {
    **{"eq": "{0} == {1}", "ne": "{0} != {1}", "lt": "{0} < {1}", "le": "{0} <= {1}"},
    **{"gt": "{0} > {1}", "ge": "{0} >= {1}"},
}
_FLOATS = _EITHER | {
    **{name: f"{name}f({{0}})" for name in _LIBRARY},
    "abs": "fabsf({0})",
    "sign": "({0} > 0.0f ? 1.0f : {0} < 0.0f ? -1.0f : {0})",
    "square": "{0} * {0}",
    "atan2": "atan2f({0}, {1})",
    "rsqrt": "1.0f / sqrtf({0})",
    "neg": "-({0})",
    "logistic": "1.0f / (1.0f + expf(-({0})))",
    "is_finite": "{0} - {0} == 0.0f",
    "pow": "powf({0}, {1})",
    **{"add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}"},
    "rem": "fmodf({0}, {1})",
    **{"max": "larger({0}, {1})", "min": "smaller({0}, {1})"},
    "clamp": "smaller(larger({1}, {0}), {2})",
}
# Sums that leave the type wrap around, as in JAX.
_INTEGERS = _EITHER | {
    **{"and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}"},
    "abs": "(T)({0} < 0 ? 0u - (uint32_t){0} : (uint32_t){0})",
    "sign": "(T)(({0} > 0) - ({0} < 0))",
    "neg": "(T)(0u - (uint32_t){0})",
    "square": "(T)((uint32_t){0} * (uint32_t){0})",
    "add": "(T)((uint32_t){0} + (uint32_t){1})",
    "sub": "(T)((uint32_t){0} - (uint32_t){1})",
    "mul": "(T)((uint32_t){0} * (uint32_t){1})",
    "div": "(T)({1} ? (int64_t){0} / {1} : 0)",
    "rem": "(T)({1} ? (int64_t){0} % {1} : {0})",
    "max": "({0} > {1} ? {0} : {1})",
    "min": "({0} < {1} ? {0} : {1})",
    "clamp": "({1} < {0} ? {0} : {1} > {2} ? {2} : {1})",
    "pow": "powf({0}, (float){1})",
}
