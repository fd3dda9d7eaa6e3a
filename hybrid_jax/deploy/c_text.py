"""Pieces of C text: numbers, constant arrays and descriptors, loops over tensors."""

import dataclasses
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_WORD = 4  # Bytes of an int32, a float and a pointer on a 32-bit microcontroller.
_PER_LINE = 20
TYPES = {
    "float32": "float",
    "bool": "uint8_t",
    **{name: f"{name}_t" for name in ("int8", "int16", "int32", "uint8", "uint16", "uint32")},
}
"""{dtype: its type in C}."""


@dataclasses.dataclass
class Constants:
    """What lies in flash: arrays and descriptors, equal ones once."""

    # {(type, contents): (name, declaration)}
    declarations: dict[tuple[str, Any], tuple[str, str]] = dataclasses.field(default_factory=dict)
    flash: int = 0  # bytes, with words of 32 bits

    def array(self, kind: str, values: np.ndarray) -> str:
        """The name of a constant array."""
        c_type = TYPES[values.dtype.name]
        key = c_type, values.tobytes()
        if key not in self.declarations:
            numbers = [literal(value) for value in values.ravel().tolist()]
            lines = [
                ", ".join(numbers[i : i + _PER_LINE]) for i in range(0, len(numbers), _PER_LINE)
            ]
            self._add(key, kind, f"[{values.size}]", lines, values.nbytes)
        return self.declarations[key][0]

    def descriptor(self, kind: str, fields: Mapping[str, Any]) -> str:
        """The name of a constant struct."""
        lines = [f".{key} = {_initializer(value)}" for key, value in fields.items()]
        key = kind, tuple(lines)
        if key not in self.declarations:
            self._add(key, kind.lower(), "", lines, _WORD * _leaves(fields))
        return self.declarations[key][0]

    def _add(self, key, kind, length, lines, size):
        name, inside = f"{kind}_{len(self.declarations)}", ",\n    ".join(lines)
        text = f"static const {key[0]} {name}{length} = {{\n    {inside}}};"
        self.declarations[key] = name, text
        self.flash += size


class Operand(NamedTuple):
    """Entry (i, j, …) is array[offset + i · strides[0] + j · strides[1] + …]."""

    array: str  # A C expression
    offset: int  # in entries
    strides: tuple[int, ...]  # one for each axis
    terms: tuple[str, ...] = ()  # what the indices of loops around add to the offset

    @classmethod
    def whole(cls, array: str, offset: int, shape: Sequence[int]) -> "Operand":
        """A tensor that lies row by row."""
        strides = (math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return cls(array, offset, tuple(strides))

    @property
    def index(self) -> str:
        """Of the first entry."""
        offset = [str(self.offset)] if self.offset or not self.terms else []
        return " + ".join([*offset, *self.terms])

    @property
    def entry(self) -> str:
        """The first entry."""
        return f"{self.array}[{self.index}]"

    @property
    def pointer(self) -> str:
        """To the first entry."""
        return self.array if self.index == "0" else f"{self.array} + {self.index}"

    def shifted(self, starts: Sequence[int]) -> "Operand":
        """The same from the entry `starts` on."""
        offset = sum(start * s for start, s in zip(starts, self.strides, strict=True))
        return self._replace(offset=self.offset + offset)

    def axes(self, axes: Sequence[int]) -> "Operand":
        """These axes of it alone, in this order."""
        return self._replace(strides=tuple(self.strides[axis] for axis in axes))

    def repeated(self, shape: Sequence[int]) -> "Operand":
        """Where it has a length of 1, of its own shape, it has no stride: it broadcasts."""
        steps = zip(self.strides, shape, strict=True)
        return self._replace(strides=tuple(0 if n == 1 else step for step, n in steps))


def each(
    shape: Sequence[int],
    operands: Mapping[str, Operand],
    body: str | Callable[[dict[str, Operand]], str],
    index: str = "i",
) -> str:
    """Loops over every index of `shape`, axes that step alike made one.

    `operands` are {letter: tensor}, `body` a statement with '{letter}' for the entry at the index,
    without semicolon, or what makes statements of {letter: the operand there, without axes}.
    `index` is the letter of the indices, another one inside of other loops.

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
        elif n != 1:
            axes.append((n, tuple(steps)))
    there = {}
    for k, (letter, operand) in enumerate(operands.items()):
        used = [(steps[k], f"{index}{i}") for i, (_, steps) in enumerate(axes) if steps[k]]
        terms = (i if step == 1 else f"{step} * {i}" for step, i in used)
        there[letter] = operand._replace(strides=(), terms=(*operand.terms, *terms))
    if isinstance(body, str):
        text = body.format(**{letter: operand.entry for letter, operand in there.items()}) + ";"
    else:
        text = body(there)
    if not axes and "\n" in text:
        return block(text)
    for i, (n, _) in reversed(list(enumerate(axes))):
        i = f"{index}{i}"
        text = f"for (int32_t {i} = 0; {i} < {n}; {i}++) {{\n{_indented(text)}\n}}"
    return text


def block(*lines: str) -> str:
    """Declarations and statements in braces."""
    return "{\n" + _indented("\n".join(lines)) + "\n}"


def comment(text: str) -> str:
    """Text that is printable and cannot end its comment."""
    return f"/* {re.sub(r'[^ -~]|[*/]', '.', text)} */"


def literal(value: float | int) -> str:
    """A number in C; a float by its bits, not by its digits.

    Example:
      >>> literal(3), literal(np.float32(0.1)), literal(0.0), literal(-math.inf)
      ('3', '0x1.99999ap-4f', '0x0p+0f', '-INFINITY')
    """
    if isinstance(value, int | np.integer):
        # The least int32 is no literal: it would be the negative of what is none.
        return str(value) if value != -(2**31) else f"({value + 1} - 1)"
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
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
