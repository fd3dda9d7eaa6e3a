"""Expressions in the making: terms by number, of which equal ones are one."""

from typing import Any

import numpy as np

from hybrid_jax.program.functions import Step
from hybrid_jax.program.operations import Function


class Terms:
    """The edges, constants and steps that expressions are made of.

    A term is ('edge', name), ('constant', array), or a `Step` whose operands are numbers of terms.
    """

    def __init__(self):
        self._terms: list[Any] = []
        self._numbers: dict[Any, int] = {}

    def edge(self, name: str) -> int:
        """The values of an edge."""
        return self._number(("edge", name))

    def constant(self, value: Any) -> int:
        """A number, or one for each channel; every one is a term of its own."""
        self._terms.append(("constant", np.asarray(value)))
        return len(self._terms) - 1

    def step(self, name: str, *operands: int, options: tuple = ()) -> int:
        """A step of terms."""
        return self._number(Step(name, operands, options))

    def bases(self, number: int) -> frozenset[str]:
        """The edges that a term is computed from."""
        return frozenset(self._terms[i][1] for i in self._below(number) if self._is(i, "edge"))

    def function(self, number: int) -> Function:
        """The operation that computes a term."""
        below = self._below(number)
        edges, constants = (
            [i for i in below if self._is(i, kind)] for kind in ("edge", "constant")
        )
        steps = [i for i in below if isinstance(self._terms[i], Step)]
        places = {own: place for place, own in enumerate([*edges, *constants, *steps])}
        return Function(
            tuple(self._terms[i][1] for i in edges),
            "",
            tuple(
                self._terms[i]._replace(operands=tuple(places[o] for o in self._terms[i].operands))
                for i in steps
            ),
            tuple(self._terms[i][1] for i in constants),
        )

    def _number(self, term):
        if term not in self._numbers:
            self._numbers[term] = len(self._terms)
            self._terms.append(term)
        return self._numbers[term]

    def _is(self, number, kind):
        return self._terms[number][0] == kind and not isinstance(self._terms[number], Step)

    def _below(self, number):
        """The numbers of the terms that a term consists of, operands first."""
        order: dict[int, None] = {}
        left = [number]
        while left:
            term = self._terms[left[-1]]
            open_ = [o for o in getattr(term, "operands", ()) if o not in order]
            left.extend(open_)
            if not open_:
                order[left.pop()] = None
        return list(order)
