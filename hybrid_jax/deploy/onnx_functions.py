"""Expressions of values in ONNX, step by step: floats, booleans and integers of up to 32 bits.

A value is (name, dtype). Runtimes have kernels for few dtypes, so an integer is an int32 in the
file, whatever it is in the traced function, and is wrapped around as that would be.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from hybrid_jax import program as p
from hybrid_jax.deploy.onnx_graph import Graph, along

Typed = tuple[Any, np.dtype]
FLOAT, INT, BOOL = (np.dtype(kind) for kind in ("float32", "int32", "bool"))


def expression(graph: Graph, op: p.Function) -> str:
    """The value of an expression of floats, in floats; ValueError if ONNX has no form of a step."""
    rank = len(graph.shape(op.output))
    values: list[Typed] = [(graph.floats(name), FLOAT) for name in op.inputs]
    for constant in op.constants:
        constant = np.asarray(constant)
        values.append((along(constant.astype(_held(constant.dtype)), rank), constant.dtype))
    for step in op.steps:
        operands = [values[place] for place in step.operands]
        refusal = _refusal(step, operands)
        if refusal:
            raise ValueError(
                f"functions must be of steps that ONNX has, got {refusal} in {op.output!r}; write "
                "the model without it, or quantize the tensor if it is a function of one: then it "
                "is a table"
            )
        values.append(_STEPS[step.name](graph, operands, **dict(step.options)))
    name, dtype = values[-1] if op.steps else values[0]
    return name if dtype == FLOAT else graph.cast(name, FLOAT)


def _refusal(step, operands):
    """What of a step ONNX has no form of; None if it has one of all."""
    dtypes = [dtype for _, dtype in operands]
    dtypes += [np.dtype(value) for name, value in step.options if name == "new_dtype"]
    if step.name not in _STEPS:
        return repr(step.name)
    wide = [dtype for dtype in dtypes if dtype.kind in "iu" and not np.can_cast(dtype, INT)]
    # Logic is of booleans alone, and arithmetic never.
    of_bits = step.name in _LOGIC and dtypes[0] != BOOL
    of_booleans = dtypes[-1] == BOOL and step.name not in (*_LOGIC, *_OF_ALL)
    if wide or of_bits or of_booleans:
        return f"{step.name!r} of {(wide or dtypes)[-1]}"
    return None


def _held(dtype):
    return {"b": BOOL, "i": INT, "u": INT}.get(np.dtype(dtype).kind, FLOAT)


def _wrapped(graph, value, dtype):
    """An int32 as an integer of fewer bits has it."""
    if dtype.kind not in "iu" or dtype == INT:
        return value
    limits, count = np.iinfo(dtype), np.int32(2 ** (8 * dtype.itemsize))
    above = graph.node("Mod", [graph.node("Sub", [value, np.int32(limits.min)]), count])
    return graph.node("Add", [above, np.int32(limits.min)])


def _as(kind: str, result: np.dtype | None = None) -> Callable[..., Typed]:
    """The rule of a step that is a node; see `_of`."""
    return _of(lambda node, *operands: node(kind, *operands), result)


def _of(write: Callable[..., str], result: np.dtype | None = None) -> Callable[..., Typed]:
    """The rule of a step that is nodes, whose result is of that dtype or of its operands'."""

    def rule(graph, operands, **options):
        dtype = result or operands[0][1]
        names = [name for name, _ in operands]
        made = write(
            lambda kind, *inputs, **more: graph.node(kind, inputs, **more), *names, **options
        )
        return _wrapped(graph, made, dtype), dtype

    return rule


def _log1p(node, x):
    """What 1 + x rounds away is made good by a factor (Kahan): x over (1 + x) − 1."""
    whole = node("Add", x, np.float32(1))
    rest = node("Sub", whole, np.float32(1))
    factor = node("Where", node("Equal", rest, x), np.float32(1), node("Div", x, rest))
    none = node("Equal", rest, np.float32(0))
    return node("Where", none, x, node("Mul", node("Log", whole), factor))


def _expm1(node, x):
    """Near zero 2 t / (1 − t), with t = tanh(x / 2)."""
    half = node("Tanh", node("Mul", x, np.float32(0.5)))
    near = node("Div", node("Add", half, half), node("Sub", np.float32(1), half))
    is_near = node("Less", node("Abs", x), np.float32(1))
    return node("Where", is_near, near, node("Sub", node("Exp", x), np.float32(1)))


def _round(node, x, rounding_method):
    if rounding_method == "TO_NEAREST_EVEN":
        return node("Round", x)
    away = node("Floor", node("Add", node("Abs", x), np.float32(0.5)))
    return node("Mul", node("Sign", x), away)


def _integer_pow(graph, operands, y):
    ((x, dtype),) = operands
    made = graph.node("Pow", [x, np.asarray(y, _held(dtype))])
    return _wrapped(graph, made, dtype), dtype


def _select(graph, operands):
    """The case of that number; of two cases the second where it is true."""
    (which, kind), *cases = operands
    made, dtype = cases[-1]
    for i, (case, _) in reversed(list(enumerate(cases[:-1]))):
        later = which if kind == BOOL else graph.node("Greater", [which, np.int32(i)])
        if dtype == BOOL:
            parts = ["And", [later, made]], ["And", [graph.node("Not", [later]), case]]
            made = graph.node("Or", [graph.node(*part) for part in parts])
        else:
            made = graph.node("Where", [later, made, case])
    return made, dtype


def _convert(graph, operands, new_dtype):
    ((x, dtype),) = operands
    return converted(graph, x, dtype, np.dtype(new_dtype)), np.dtype(new_dtype)


def converted(graph: Graph, x: Any, dtype: np.dtype, new: np.dtype) -> str:
    """A value in another dtype, floats towards zero and within its limits, NaN as zero."""
    held = _held(new)
    if held != INT:
        return x if _held(dtype) == held else graph.cast(x, held)
    if _held(dtype) == BOOL:
        return graph.cast(x, INT)
    limits = np.iinfo(new)
    if _held(dtype) == INT:
        known = np.iinfo(dtype)
        within = limits.min <= known.min and known.max <= limits.max
        return x if within else _wrapped(graph, x, new)
    x = graph.node("Where", [graph.node("Equal", [x, x]), x, np.float32(0)])
    # The greatest integer of 32 bits is no float of 32.
    top = np.float32(min(limits.max, 2**31 - 128))
    inside = graph.cast(graph.node("Clip", [x, np.float32(limits.min), top]), INT)
    above = graph.node("Greater", [x, top])
    return graph.node("Where", [above, np.int32(limits.max), inside])


_OF_ALL = ("eq", "ne", "select_n", "convert_element_type")
_LOGIC = {"and": "And", "or": "Or", "xor": "Xor", "not": "Not"}
_COMPARISONS = {
    "eq": "Equal",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
}
_NODES = {
    **{"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min"},
    **{"logistic": "Sigmoid", "pow": "Pow"},
    **{
        name: name.capitalize()
        for name in (
            *("abs", "sign", "neg", "floor", "ceil", "exp", "log", "sqrt", "erf", "tanh", "sin"),
            *("cos", "tan", "sinh", "cosh", "asin", "acos", "atan", "asinh", "acosh", "atanh"),
        )
    },
}
_STEPS: dict[str, Callable[..., Typed]] = {
    **{name: _as(kind) for name, kind in (_NODES | _LOGIC).items()},
    **{name: _as(kind, BOOL) for name, kind in _COMPARISONS.items()},
    "ne": _of(lambda node, x, y: node("Not", node("Equal", x, y)), BOOL),
    "is_finite": _of(lambda node, x: node("Less", node("Abs", x), np.float32(np.inf)), BOOL),
    "rsqrt": _of(lambda node, x: node("Reciprocal", node("Sqrt", x))),
    "square": _of(lambda node, x: node("Mul", x, x)),
    "exp2": _of(lambda node, x: node("Pow", np.float32(2), x)),
    "erfc": _of(lambda node, x: node("Sub", np.float32(1), node("Erf", x))),
    "rem": _of(lambda node, x, y: node("Mod", x, y, fmod=1)),
    "clamp": _of(lambda node, low, x, high: node("Min", node("Max", x, low), high)),
    "log1p": _of(_log1p),
    "expm1": _of(_expm1),
    "cbrt": _of(
        lambda node, x: node("Mul", node("Sign", x), node("Pow", node("Abs", x), np.float32(1 / 3)))
    ),
    "round": _of(_round),
    "integer_pow": _integer_pow,
    "select_n": _select,
    "convert_element_type": _convert,
}
"""{step: what writes it}: of `core.functions.FUNCTIONS` all but 'atan2'."""
