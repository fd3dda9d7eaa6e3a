"""What every rule of the C target needs: where tensors lie, and expressions of numbers."""

import dataclasses
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from hybrid_jax import program as p
from hybrid_jax.deploy import c_arguments, c_text
from hybrid_jax.program import UNBOUNDED, arithmetic, memory, operations

_ONE = p.Encoding(1.0)


class Context(NamedTuple):
    """A program on its way to C."""

    program: p.Program  # as `stored` makes it
    inputs: list[c_arguments.Argument]  # what the function takes, in the program's order
    outputs: list[c_arguments.Argument]  # what it fills, alike
    constants: c_text.Constants  # takes up what statements refer to
    plan: memory.Plan  # where its tensors lie
    packed: Collection[str]  # the outputs of layers of which a byte holds two weights

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an edge, without the batch."""
        return self.program.tensors[name].shape

    def encoding(self, name: str) -> p.Encoding | None:
        """Of an edge."""
        return self.program.encoding(name)

    def operand(self, name: str) -> c_text.Operand:
        """An edge: in the arena, in an argument, or in flash."""
        kind, width = ("floats", 4) if self.encoding(name) is None else ("bytes", 1)
        ends = self.plan.ends
        array = self._end(ends[name]) if name in ends else f"arena->{kind}"
        return c_text.Operand.whole(array, self.plan.offsets[name] // width, self.shape(name))

    def pair(self, op: p.Operation) -> dict[str, c_text.Operand]:
        """The only input as x, the output as y."""
        (x,) = op.inputs
        return {"x": self.operand(x), "y": self.operand(op.output)}

    def _end(self, name):
        program = self.program
        if name in program.inputs:
            return self.inputs[program.inputs.index(name)].name
        maker = program.makers[name]
        if isinstance(maker, p.Constant):
            stored = operations.compute(maker, [], [], self.encoding(name))
            return self.constants.array("constant", np.asarray(stored))
        return self.outputs[program.outputs.index(name)].name


def stored(program: p.Program) -> p.Program:
    """The program with its inputs as they come: uint8 is encoded with a scale of 1, else floats.

    Where they are stored otherwise they are converted first.
    """
    tensors, operations, renamed = dict(program.tensors), [], {}
    for name in program.inputs:
        raw = _ONE if tensors[name].dtype == "uint8" else None
        if tensors[name].encoding != raw:
            tensors[name] = dataclasses.replace(tensors[name], encoding=raw)
            renamed[name] = f"{name} as it is stored"
            while renamed[name] in program.tensors:
                renamed[name] += " here"

    def get(name, converts):
        # What converts floats may as well convert the integers that they are.
        new = renamed.get(name)
        if new is None or (converts and program.encoding(name) is None):
            return name
        if new not in tensors:
            tensors[new] = program.tensors[name]
            operations.append(p.Convert((name,), new))
        return new

    for op in program.operations:
        inputs = tuple(get(name, isinstance(op, p.Convert)) for name in op.inputs)
        operations.append(dataclasses.replace(op, inputs=inputs))
    outputs = tuple(get(name, True) for name in program.outputs)
    return dataclasses.replace(
        program, tensors=tensors, operations=tuple(operations), outputs=outputs
    )


def multiplier(encodings: list[p.Encoding], output: p.Encoding | None, count: int = 1) -> str:
    """That of a product of values of these encodings, or of a sum of `count` of them."""
    scales = (encoding.scale for encoding in encodings)
    return c_text.literal(arithmetic.multiplier(*scales, output=output or _ONE, count=count))


def result(output: p.Encoding | None, clip: tuple[float, float] = UNBOUNDED) -> dict[str, int]:
    """The fields of a Result."""
    if output is None:
        return {"low": 0, "high": 0, "zero": 0, "encoded": 0}
    low, high = (int(end) - output.zero_point for end in arithmetic.bounds(output, clip))
    return {"low": low, "high": high, "zero": output.zero_point, "encoded": 1}


def clamped(value: str, clip: tuple[float, float]) -> str:
    """A float between bounds."""
    low, high = (c_text.literal(np.float32(end)) for end in clip)
    if low == "-INFINITY":
        return value if high == "INFINITY" else f"smaller({value}, {high})"
    return f"larger({value}, {low})" if high == "INFINITY" else f"clamp({value}, {low}, {high})"


def requantized(
    total: str, factor: str, output: p.Encoding | None, clip: tuple[float, float] = UNBOUNDED
) -> str:
    """A result from its int32 sum; a float where it has no encoding."""
    if output is None:
        return clamped(f"(float)({total}) * {factor}", clip)
    low, high, zero, _ = result(output, clip).values()
    return f"requantize({total}, {factor}, {low}, {high}, {zero})"


def steps(entry: str, encoding: p.Encoding) -> str:
    """An int32 from zero."""
    zero = encoding.zero_point
    return f"(int32_t)({entry} - {zero})" if zero else f"(int32_t){entry}"


def converted(entry: str, encoding: p.Encoding | None, output: p.Encoding | None) -> str:
    """An entry in another encoding."""
    if encoding == output:
        return entry
    if encoding is None:
        factor = c_text.literal(np.float32(1) / np.float32(output.scale))
        low, high, zero, _ = result(output).values()
        ends = ", ".join(c_text.literal(np.float32(end)) for end in (low, high))
        return f"quantize({entry}, {factor}, {ends}, {zero})"
    return requantized(steps(entry, encoding), multiplier([encoding], output), output)
