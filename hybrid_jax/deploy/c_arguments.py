"""What the C function of a program takes and fills: one array for each input and output."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hybrid_jax import program as p
from hybrid_jax.deploy import artifact, c_text


class Argument(NamedTuple):
    """An array of one example, row by row."""

    name: str  # in C: 'input' or 'output', of several with the name of the edge behind it
    dtype: str  # of its entries
    shape: tuple[int, ...]  # without the batch
    order: str = ""  # where the channels of an image are, as a remark; empty of what is none

    @property
    def type(self) -> str:
        """Of an entry in C; a bool is 0 or 1 in a byte."""
        return c_text.TYPES[self.dtype]

    @property
    def size(self) -> int:
        """Entries."""
        return math.prod(self.shape)

    @property
    def description(self) -> str:
        """Shape, dtype and order."""
        shape = " x ".join(map(str, self.shape)) or "1"
        return f"{shape} {self.dtype}{self.order}"


def inputs(program: p.Program) -> list[Argument]:
    """One for each input: uint8 where the traced function takes that, else float32."""
    (names, _), tensors = _names(program), program.tensors
    dtypes = ["uint8" if tensors[edge].dtype == "uint8" else "float32" for edge in program.inputs]
    return [
        Argument(name, dtype, tensors[edge].shape, _order(program, edge))
        for name, edge, dtype in zip(names, program.inputs, dtypes, strict=True)
    ]


def outputs(program: p.Program) -> list[Argument]:
    """One for each output, of the traced function's dtype; of floats float32."""
    (_, names), tensors = _names(program), program.tensors
    dtypes = [tensors[edge].dtype for edge in program.outputs]
    return [
        Argument(name, dtype if dtype in c_text.TYPES else "float32", tensors[edge].shape)
        for name, edge, dtype in zip(names, program.outputs, dtypes, strict=True)
    ]


def signature(taken: Sequence[Argument], made: Sequence[Argument]) -> str:
    """The parameters of the function."""
    inputs = (f"const {argument.type} *{argument.name}" for argument in taken)
    return ", ".join([*inputs, *(f"{argument.type} *{argument.name}" for argument in made)])


def _names(program):
    alone, several = ("input", "output"), ("input_", "output_")
    return artifact.end_names(program.inputs, program.outputs, alone, several)


def _order(program, edge):
    """How the first operations that need to know take an image."""
    if len(program.tensors[edge].shape) != 3:
        return ""
    for op in _takers(program, edge):
        if isinstance(op, p.Conv | p.MaxPool | p.AveragePool):
            return ", channels last"
        if isinstance(op, p.Transpose) and op.permutation == (1, 2, 0):
            return ", channels first"
    return ""


def _takers(program, edge) -> Iterator:
    """What reads an edge, or what comes of it entry by entry in the same order of axes."""
    readers, todo = program.readers, [edge]
    for name in todo:
        for op in readers[name]:
            yield op
            same = program.tensors[op.output].shape == program.tensors[edge].shape
            if op.in_place and same and op.output not in todo:
                todo.append(op.output)
