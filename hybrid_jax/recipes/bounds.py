"""What a value of the configuration may be: each bound checks values, and its text says which.

Nothing here imports JAX. Bounds that are `late` import what they look up in the library when they
check a value, or are written out.
"""

import dataclasses
import difflib
import importlib
import numbers
import re
from typing import Any


class Bound:
    """What every bound has: `check`, and a text that ends the sentence 'it must be …'."""

    late = False

    def check(self, name: str, value: Any) -> Any:
        """Returns `value`, of the type that was declared; `name` is what an error calls it.

        Example:
          >>> Each(Integer(2, 8), range(1, 4)).check('bits', [4, 8])
          (4, 8)
          >>> Each(Integer(2, 8), range(1, 4)).check('bits', [4, 9])
          Traceback (most recent call last):
          ...
          ValueError: bits[1] must be an integer in [2, 8], got 9
        """
        if not self._takes(value):
            raise ValueError(f"{name} must be {self}, got {value!r}{self._hint(value)}")
        return self._made(name, value)

    def _takes(self, value):
        return True

    def _made(self, name, value):
        return value

    def _hint(self, value):
        return ""


@dataclasses.dataclass(frozen=True)
class Integer(Bound):
    """An integer in [low, high], of Python or NumPy; not a bool, not a float."""

    low: int
    high: int

    def __str__(self):
        return f"an integer in [{self.low:_}, {self.high:_}]"

    def _takes(self, value):
        return _is(value, numbers.Integral) and self.low <= value <= self.high

    def _made(self, name, value):
        return int(value)


@dataclasses.dataclass(frozen=True)
class Real(Bound):
    """A number from `low` to `high`, an end counting where `ends` has '[' or ']' there."""

    low: float
    high: float
    ends: str = "[]"

    def __str__(self):
        return f"a number in {self.ends[0]}{self.low:_}, {self.high:_}{self.ends[1]}"

    def _takes(self, value):
        if not _is(value, numbers.Real):
            return False
        above = value > self.low or (value == self.low and self.ends[0] == "[")
        return above and (value < self.high or (value == self.high and self.ends[1] == "]"))

    def _made(self, name, value):
        return float(value)


@dataclasses.dataclass(frozen=True)
class Truth(Bound):
    """True or False."""

    def __str__(self):
        return "true or false"

    def _takes(self, value):
        return isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Text(Bound):
    """Any text, or what a regular expression matches as a whole and `expected` describes."""

    pattern: str = r"(?s).*"
    expected: str = "any text"

    def __str__(self):
        return self.expected

    def _takes(self, value):
        return isinstance(value, str) and re.fullmatch(self.pattern, value) is not None


@dataclasses.dataclass(frozen=True)
class Choice(Bound):
    """One of some names: given, or those of a registry of the library as 'package.module:NAME'.

    The registry is a mapping, or a function that returns the names; `none` adds '' to it.

    Example:
      >>> Choice(('soft', 'top_1', 'top_k')).check('routing', 'tpo_k')
      Traceback (most recent call last):
      ...
      ValueError: routing must be one of soft, top_1, top_k, got 'tpo_k'; did you mean top_k?
      >>> Choice('hybrid_jax.pruning:ALLOCATIONS').check('allocation', 'erk')
      'erk'
    """

    of: tuple[str, ...] | str
    none: bool = False

    @property
    def late(self):
        """Whether the names stand in the library."""
        return isinstance(self.of, str)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that there are now: a registry is open to users."""
        if not self.late:
            return self.of
        found = _of_library(self.of)
        return (*[""] * self.none, *(found() if callable(found) else found))

    def __str__(self):
        return "one of " + ", ".join(name or "''" for name in self.names)

    def _takes(self, value):
        return isinstance(value, str) and value in self.names

    def _hint(self, value):
        close = difflib.get_close_matches(str(value), self.names, n=1)
        return f"; did you mean {close[0]}?" if close else ""


@dataclasses.dataclass(frozen=True)
class Each(Bound):
    """A tuple, or a list that becomes one, of what one bound takes; `count` is how many of it."""

    of: Bound
    count: range | tuple[int, ...]
    distinct: bool = False

    @property
    def late(self):
        """As of its entries."""
        return self.of.late

    def __str__(self):
        ends = f"{self.count[0]} to {self.count[-1]:_}"
        many = ends if isinstance(self.count, range) else " or ".join(map(str, self.count))
        kind = "different entries" if self.distinct else "entries"
        return f"a tuple of {many} {kind}, each {self.of}"

    def _takes(self, value):
        if not isinstance(value, list | tuple) or len(value) not in self.count:
            return False
        return not self.distinct or all(value.index(v) == i for i, v in enumerate(value))

    def _made(self, name, value):
        return tuple(self.of.check(f"{name}[{i}]", entry) for i, entry in enumerate(value))


@dataclasses.dataclass(frozen=True)
class Joined(Bound):
    """Different names joined by +, or no text for none of them."""

    of: Choice

    def __str__(self):
        return f"'', or different ones of {', '.join(self.of.names)} joined by +"

    def _takes(self, value):
        return isinstance(value, str) and len(set(value.split("+"))) == len(value.split("+"))

    def _made(self, name, value):
        for part in value.split("+") if value else ():
            self.of.check(name, part)
        return value


@dataclasses.dataclass(frozen=True)
class Either(Bound):
    """What the first or else the second bound takes."""

    first: Bound
    second: Bound

    def __str__(self):
        return f"{self.first} or {self.second}"

    def _takes(self, value):
        return self.first._takes(value) or self.second._takes(value)

    def _made(self, name, value):
        taken = self.first if self.first._takes(value) else self.second
        return taken.check(name, value)


@dataclasses.dataclass(frozen=True)
class Checked(Bound):
    """What a function of the library takes, `by` as 'package.module:name': it raises ValueError.

    It is called as function(name, value).
    """

    by: str
    expected: str
    late = True

    def __str__(self):
        return self.expected

    def _made(self, name, value):
        _of_library(self.by)(name, value)
        return value


def _is(value, kind):
    """Whether it is such a number: a bool is none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _of_library(name):
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
