"""The operations of a program as C, by one table of rules: calls of kernels.c, and plain loops."""

import math
import re
from collections.abc import Callable, Mapping
from types import NoneType
from typing import NamedTuple

import numpy as np

from hybrid_jax import program as p
from hybrid_jax.deploy import c_arguments, c_context, c_entries, c_functions, c_text, c_windows
from hybrid_jax.deploy.c_context import Context
from hybrid_jax.program import bands, memory


class Body(NamedTuple):
    """The statements of a function, the bytes of the arena that it works in, its kernels' bits."""

    text: str
    ram: int
    kernel_bits: set[int]


def body(program: p.Program, constants: c_text.Constants, pack: bool) -> Body:
    """The statements that compute the outputs of a program from its inputs, with their `constants`.

    With `pack` integer weights of up to 4 bits lie two to a byte.
    """
    inputs, outputs = c_arguments.inputs(program), c_arguments.outputs(program)
    program = bands.in_bands(c_context.stored(program), _scratch)
    in_integers = [op for op in program.weighted if not program.in_floats(op)]
    packed = {
        op.output
        for op in in_integers
        if pack and c_windows.packs(op, program.encoding(op.inputs[0]))
    }
    plan = memory.plan(program, _scratch(program))
    context = Context(program, inputs, outputs, constants, plan, packed)
    texts = []
    for op in program.operations:
        _check(op, context)
        text = RULES[type(op)](op, context)
        if text:
            texts.append(c_text.comment(f"{type(op).__name__} {op.output}") + "\n" + text)
    texts += _returned(context)
    code = re.sub(r"/\*.*?\*/", "", "\n".join(texts))
    names = ["arena", *(argument.name for argument in inputs)]
    texts += [f"(void){name};" for name in names if not re.search(rf"\b{name}\b", code)]
    bits = {4 if op.output in packed else 8 for op in in_integers}
    bits |= {32 for op in program.weighted if op not in in_integers}
    return Body("\n".join(texts), plan.size, bits)


def _scratch(program):
    """{output of a layer: bytes in which its windows are laid out}."""
    needs = {}
    for op in program.weighted:
        if not program.in_floats(op):
            axes, each, beside = c_windows.scratch(op, program.tensors[op.output].shape)
            needs[op.output] = math.prod(op.weights.values.shape[:axes]) * each + beside
    return {name: size for name, size in needs.items() if size}


def _check(op, context):
    """Raises ValueError if the edges of an operation are not stored as its rule takes them."""
    if isinstance(
        op, p.Convert | p.Concatenate | p.Maximum | p.Constant | p.Call
    ) or context.program.in_floats(op):
        return
    *inputs, output = (context.encoding(name) for name in (*op.inputs, op.output))
    wanted = None
    if not op.integral:
        wanted = "floats, as what it reads must be"
    elif None in inputs or (output is None and not op.returns_floats):
        wanted = "all floats or all encoded, it and what it reads"
    elif op.same_encoding and inputs[0] != output:
        wanted = f"encoded as {op.inputs[0]!r}"
    if wanted:
        kind = type(op).__name__
        raise ValueError(f"tensor {op.output!r} of a {kind} must be {wanted}, got {inputs, output}")


def _refused(op, context):
    raise op.refused("C")


def _view(op, context):
    """Nothing: it lies where its input lies, or among the constants."""
    return ""


def _returned(context):
    """Copies of outputs that are not made where the caller wants them, in their dtypes."""
    program, texts = context.program, []
    for i, argument in enumerate(context.outputs):
        name, dtype = program.outputs[i], np.dtype(argument.dtype)
        made = context.plan.ends.get(name) == name and program.outputs.index(name) == i
        if made and not isinstance(program.makers.get(name), p.Constant | NoneType):
            continue
        x = context.operand(name)
        value = c_context.converted("{x}", context.encoding(name), None)
        if dtype != np.float32:
            value = f"({value}) != 0.0f" if dtype == np.bool_ else c_functions.whole(value, dtype)
        y = c_text.Operand.whole(argument.name, 0, argument.shape)
        loop = c_text.each(argument.shape, {"x": x, "y": y}, f"{{y}} = {value}")
        texts.append(f"{c_text.comment(f'Output {name}')}\n{loop}")
    return texts


Rule = Callable[[p.Operation, Context], str]

RULES: Mapping[type[p.Operation], Rule] = {
    p.Conv: c_windows.weighted,
    p.Dense: c_windows.weighted,
    p.MaxPool: c_windows.max_pool,
    p.AveragePool: c_windows.average_pool,
    p.MatMul: c_entries.matmul,
    p.Add: c_entries.two,
    p.Multiply: c_entries.two,
    p.Maximum: c_entries.two,
    p.Minimum: c_entries.two,
    p.Clip: c_entries.clip,
    p.Convert: c_entries.convert,
    p.Function: c_functions.function,
    p.Mean: c_entries.mean,
    p.Largest: c_entries.largest,
    p.Softmax: c_entries.softmax,
    p.Normalize: c_entries.normalize,
    p.Concatenate: c_entries.concatenate,
    p.Transpose: c_entries.transpose,
    p.Broadcast: c_entries.broadcast,
    p.Pad: c_entries.pad,
    p.Slice: c_entries.slices,
    p.Gather: c_entries.gather,
    p.Reshape: _view,
    p.Constant: _view,
    p.Call: _refused,
}
"""{operation: rule(op, context) -> statements}."""
