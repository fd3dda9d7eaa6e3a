"""Pieces of C text: numbers, constant arrays and descriptors, loops over tensors."""

import dataclasses
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_WORD = 4  # Bytes of an int32, a float and a pointer on a 32-bit microcontroller.
_PER_LINE = 20
_TYPES = {"float32": "float", "int8": "int8_t", "int32": "int32_t", "uint8": "uint8_t"}


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
            numbers = [literal(value) for value in values.ravel().tolist()]
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
        inside = ",\n    ".join(f".{key} = {_initializer(v)}" for key, v in fields.items())
        return f"static const {kind} {kind.lower()} = {{\n    {inside}}};"


class Operand(NamedTuple):
    """Entry (i, j, …) is array[offset + i · strides[0] + j · strides[1] + …]."""

    array: str
    offset: int
    strides: tuple[int, ...]

    @classmethod
    def whole(cls, array: str, offset: int, shape: Sequence[int]) -> "Operand":
        """A tensor that lies row by row.

        Example:
          >>> Operand.whole('arena', 5, (2, 3, 4))
          Operand(array='arena', offset=5, strides=(12, 4, 1))
        """
        strides = (math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return cls(array, offset, tuple(strides))

    def shifted(self, starts: Sequence[int]) -> "Operand":
        """The same from the entry `starts` on."""
        offset = sum(start * s for start, s in zip(starts, self.strides, strict=True))
        return self._replace(offset=self.offset + offset)


def each(shape: Sequence[int], operands: Mapping[str, Operand], statement: str) -> str:
    """Loops over every index of `shape`, axes that step alike made one.

    Args:
      shape: How far each index goes.
      operands: {letter: tensor}.
      statement: With '{letter}' for the entry at the index, no semicolon.

    Example:
      >>> x, y = Operand('in', 3, (8, 1)), Operand.whole('out', 0, (2, 4))
      >>> print(each((2, 4), {'x': x, 'y': y}, '{y} = {x}'))
      for (int32_t i0 = 0; i0 < 2; i0++) {
          for (int32_t i1 = 0; i1 < 4; i1++) {
              out[4 * i0 + i1] = in[3 + 8 * i0 + i1];
          }
      }
    """
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
        text = f"for (int32_t i{i} = 0; i{i} < {n}; i{i}++) {{\n{_indented(text)}\n}}"
    return text


def block(*lines: str) -> str:
    """Declarations and statements in braces."""
    return "{\n" + _indented("\n".join(lines)) + "\n}"


def comment(text: str) -> str:
    """Text that is printable and cannot end its comment.

    Example:
      >>> comment('stem */ größe')
      '/* stem .. gr..e */'
    """
    return f"/* {re.sub(r'[^ -~]|[*/]', '.', text)} */"


def literal(value: float | int) -> str:
    """A number in C; a float by its bits, not by its digits.

    Example:
      >>> literal(3), literal(np.float32(0.1)), literal(0.0)
      ('3', '0x1.99999ap-4f', '0x0p+0f')
    """
    if isinstance(value, int | np.integer):
        return str(value)
    digits, exponent = float(value).hex().split("p")
    return f"{digits.rstrip('0').rstrip('.')}p{exponent}f"


def _initializer(value):
    if isinstance(value, Mapping):
        return "{" + ", ".join(f".{key} = {_initializer(v)}" for key, v in value.items()) + "}"
    return value if isinstance(value, str) else literal(value)


def _leaves(value):
    return sum(map(_leaves, value.values())) if isinstance(value, Mapping) else 1


def _indented(text):
    return textwrap.indent(text, "    ")
