"""Channel labels: what is known of an array while a program is walked.

Every index of every axis of an array carries a label, an integer. Two labels that an equation
*ties* can only be removed together. Label 0 is never removed; a *frozen* label is not either, and
says why. Next to its labels an axis knows its `rest`: the value that the array holds at an index
whose channel is masked (its parameters zero). It is NaN where that value is not finite, UNIFORM
where it is the same for all masked channels but known only as the program runs (the mean that a
normalization takes off), and None where it may differ from channel to channel. What is reduced over
may lose an index where the rest is neutral, as in Σ x with rest 0, or can be made up for.
"""

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

INPUT, TANGENT = "input", "tangent"
Origin = frozenset[str] | str
"""Paths of the parameters that an array is computed from alone, or INPUT, or TANGENT."""

UNIFORM = "uniform"
Rest = float | str | None

FIXED = "is tied to an axis of the input or of fixed length"
"""Why label 0 is never removed."""

Factor = tuple[int, int, int]
"""(axis of a parameter, n, step): n of its indices, `step` apart."""
Factors = tuple[Factor, ...]


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Which entries of a parameter an array holds, element by element.

    `count` of them are in the array and its `stack`, factors that are not in the array (the layers
    of a scan around it); `start` is the index of the first. `axes` are the factors of each axis,
    the slowest first; None where a removal has left no even ones.
    """

    path: str
    count: int
    start: tuple[int, ...]
    stack: Factors
    axes: tuple[Factors, ...] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """What is known of an array: per axis its labels (int32[n]) and rest, and where it is from."""

    labels: tuple[np.ndarray, ...]
    rest: tuple[Rest, ...]
    origin: Origin
    constant: float | None = None
    arrangement: Arrangement | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return tuple(len(labels) for labels in self.labels)

    def plain(self) -> "Value":
        """The value where nothing keeps track of what is UNIFORM."""
        rest = tuple(None if rest is UNIFORM else rest for rest in self.rest)
        return dataclasses.replace(self, rest=rest)


def sizes(shape: Sequence[Any]) -> tuple[int, ...]:
    """A shape with 1 for every symbolic dimension: as no channel axis is one, it has no labels."""
    return tuple(int(n) if isinstance(n, int | np.integer) else 1 for n in shape)


class Labels:
    """The labels given out so far, the pairs tied, and the labels frozen with the reason.

    `products` are (labels of elements [n, m, …], labels of the n, of the m, …): axes that a reshape
    makes one, or one that it splits. An element leaves with its index on one of the axes; on which
    one is decided when all of the program is known. The first `given` labels are the parameters'.
    """

    def __init__(self):
        self.count = self.given = 1
        self.edges: list[tuple[np.ndarray, np.ndarray]] = []
        self.frozen: list[tuple[np.ndarray, str]] = []
        self.products: list[tuple[np.ndarray, list[np.ndarray]]] = []

    def copy(self) -> "Labels":
        """The same labels, to tie and freeze more of them."""
        same = copy.copy(self)
        same.edges, same.frozen = list(self.edges), list(self.frozen)
        return same

    def fresh(self, n: int) -> np.ndarray:
        """Gives n labels that nothing carries yet."""
        labels = np.arange(self.count, self.count + n, dtype=np.int32)
        self.count += n
        return labels

    def axis(self, n: int) -> np.ndarray:
        """Labels of a new axis; the only index of an axis is never removed."""
        return np.zeros(1, np.int32) if n == 1 else self.fresh(n)

    def freeze(self, labels: np.ndarray, reason: str) -> None:
        """These may not be removed."""
        if labels.any():
            self.frozen.append((labels, reason))

    def tie(self, a: np.ndarray, b: np.ndarray):
        """a[i] and b[i] can only be removed together."""
        if a is b or not (a.any() or b.any()):
            return
        both = (a != 0) & (b != 0)
        self.edges.append((a[both], b[both]))
        self.freeze(a[b == 0], FIXED)
        self.freeze(b[a == 0], FIXED)

    def merge(self, axes: Sequence[np.ndarray]) -> np.ndarray:
        """Labels of the elements of these axes in one, the last axis running fastest."""
        shape, live = [len(a) for a in axes], [i for i, a in enumerate(axes) if a.any()]
        if len(live) == 1:
            elements = axes[live[0]]
        else:
            elements = self.fresh(math.prod(shape[i] for i in live))
            elements = elements.reshape([shape[i] for i in live])
            self.products.append((elements, [axes[i] for i in live]))
        spread = elements.reshape([n if i in live else 1 for i, n in enumerate(shape)])
        return np.broadcast_to(spread, shape).reshape(-1)

    def split(self, elements: np.ndarray, shape: Sequence[int]) -> list[np.ndarray]:
        """Labels of the axes of this shape that the elements of one axis become."""
        if len(shape) == 1:
            return [elements]
        axes = [self.fresh(n) for n in shape]
        self.products.append((elements.reshape(shape), axes))
        return axes

    def value(self, shape: Sequence[int], origin: Origin, rest=None, constant=None) -> Value:
        """A value with fresh labels on every axis."""
        labels = tuple(self.axis(n) for n in sizes(shape))
        return Value(labels, (rest,) * len(shape), origin, constant)


def barrier(labels: Labels, eqn: jex.JaxprEqn, values: list[Value], reason: str) -> list[Value]:
    """Freezes every input; outputs are computed in full and may be sliced."""
    for value in values:
        for axis in value.labels:
            labels.freeze(axis, reason)
    return [labels.value(v.aval.shape, join_origins(values)) for v in eqn.outvars]


def join_origins(values: Sequence[Value]) -> Origin:
    """Where something computed from all these comes from."""
    origins = [value.origin for value in values]
    for strong in (TANGENT, INPUT):
        if strong in origins:
            return strong
    return frozenset().union(*origins)


def common(values: Sequence[Any]) -> Any:
    """The one value they all have, or None."""
    first = values[0] if values else None
    return first if all(value == first for value in values) else None


def literal(value: Any, labels: Labels) -> Value:
    """The value of a constant known while tracing."""
    known = not isinstance(value, jax.core.Tracer) and np.ndim(value) == 0
    known = known and jnp.issubdtype(jnp.result_type(value), jnp.number)
    constant = float(value) if known and np.isrealobj(value) else None
    return labels.value(np.shape(value), frozenset(), constant=constant)
