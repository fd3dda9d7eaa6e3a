"""Softmax and normalization, which have parts that no integers hold: recognized exactly or not.

An equation is the end of one only if every part of it is there: the same variable, the same axes,
nothing between them. Where each entry meets which sum is compared entry by entry.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core as jex

from hybrid_jax.core.functions import SAME
from hybrid_jax.program.operations import Normalize, Softmax
from hybrid_jax.program.read.node import Builder, Node

_VIEWS = (*SAME, "broadcast_in_dim", "reshape", "squeeze")
Sources = Mapping[Any, jex.JaxprEqn]
"""{variable: the equation that makes it}."""


class Found(NamedTuple):
    """What an equation is the end of."""

    x: Any  # the variable, or a reshape of it in which axes are summed
    axes: tuple[int, ...]  # along which
    epsilon: float | None = None  # what is added to the variance; None of a softmax
    factor: Any = None  # atom of a known factor of the result, or None


class Facts(NamedTuple):
    """What is known of atoms."""

    sources: Sources  # {variable: the equation that makes it}
    # number(atom) -> the one static number that it is, or None
    number: Callable[[Any], float | None]
    known: Callable[[Any], bool]  # known(atom) -> whether it comes from parameters alone

    def made(self, atom: Any, *names: str) -> Any:
        """The equation that makes an atom, if it is of these primitives."""
        eqn = None if isinstance(atom, jex.Literal) else self.sources.get(atom)
        return eqn if eqn is not None and eqn.primitive.name in names else None

    def behind(self, atom: Any, names: tuple[str, ...] = SAME, bound: float | None = None) -> Any:
        """What an atom is a view of; with `bound` also behind a maximum with that number."""
        while not isinstance(atom, jex.Literal) and atom in self.sources:
            eqn = self.sources[atom]
            numbers = [self.number(a) for a in eqn.invars]
            if eqn.primitive.name == "max" and bound is not None and bound in numbers:
                atom = eqn.invars[1 - numbers.index(bound)]
            elif eqn.primitive.name in names:
                atom = eqn.invars[0]
            else:
                return atom
        return atom

    def cells(self, atom: Any, total: jex.JaxprEqn) -> np.ndarray | None:
        """For each entry of an atom the number of the sum of `total` in it; None if unclear."""
        chain = []
        while atom is not total.outvars[0]:
            if isinstance(atom, jex.Literal) or atom not in self.sources:
                return None
            eqn = self.sources[atom]
            chain.append(eqn)
            # Of what is combined with others the first is followed.
            atom = next(
                (a for a in eqn.invars if self.number(a) is None and not self.known(a)), None
            )
        shape = total.outvars[0].aval.shape
        held = np.arange(math.prod(shape)).reshape(shape)
        for eqn in reversed(chain):
            name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
            if name == "broadcast_in_dim":
                wide = [1] * len(shape)
                for axis, place in enumerate(eqn.params["broadcast_dimensions"]):
                    wide[place] = held.shape[axis]
                held = held.reshape(wide)
            if name in ("reshape", "squeeze"):
                held = held.reshape(shape)
            elif np.ndim(held) != len(shape):
                return None
            held = np.broadcast_to(held, shape)
        return held

    def meets(self, atom: Any, total: jex.JaxprEqn, shape: tuple[int, ...]) -> bool:
        """Whether entries of that shape meet in `atom` the sum that they are part of."""
        summed = total.invars[0].aval.shape
        axes = total.params["axes"]
        cells = np.arange(math.prod(n for i, n in enumerate(summed) if i not in axes))
        wide = [1 if i in axes else n for i, n in enumerate(summed)]
        own = np.broadcast_to(cells.reshape(wide), summed).reshape(shape)
        held = self.cells(atom, total)
        if held is None or held.ndim != len(shape):
            return False
        return np.array_equal(np.broadcast_to(held, shape), own)


def softmax(eqn: jex.JaxprEqn, facts: Facts) -> Found | None:
    """exp(x − max x) / Σ exp(x − max x) along one axis."""
    if eqn.primitive.name != "div":
        return None
    power = facts.made(facts.behind(eqn.invars[0]), "exp")
    total = facts.made(facts.behind(eqn.invars[1], _VIEWS), "reduce_sum")
    if power is None or total is None or facts.behind(total.invars[0]) is not power.outvars[0]:
        return None
    shifted = facts.made(facts.behind(power.invars[0]), "sub")
    if shifted is None or facts.known(shifted.invars[0]):
        return None
    x, shape = shifted.invars[0], eqn.outvars[0].aval.shape
    greatest = facts.made(facts.behind(shifted.invars[1], _VIEWS, -math.inf), "reduce_max")
    if greatest is None or facts.behind(greatest.invars[0]) is not facts.behind(x):
        return None
    axes = tuple(total.params["axes"])
    if tuple(greatest.params["axes"]) != axes or len(axes) != 1 or x.aval.shape != shape:
        return None
    whole = facts.meets(shifted.invars[1], greatest, shape)
    return Found(x, axes) if whole and facts.meets(eqn.invars[1], total, shape) else None


def normalization(eqn: jex.JaxprEqn, facts: Facts) -> Found | None:
    """(x − mean x) / √(var x + ε), perhaps times what is known."""
    if eqn.primitive.name not in ("div", "mul"):
        return None
    pairs = [eqn.invars] if eqn.primitive.name == "div" else [eqn.invars, eqn.invars[::-1]]
    for centred, scale in pairs:
        difference = facts.made(facts.behind(centred), "sub")
        mean = difference and _mean_of(difference.invars[1], facts)
        if not mean or facts.known(difference.invars[0]):
            continue
        x, shape = difference.invars[0], eqn.outvars[0].aval.shape
        summed, axes = mean.invars[0], tuple(mean.params["axes"])
        viewed = facts.behind(summed, (*SAME, "reshape")) is facts.behind(x, (*SAME, "reshape"))
        if (
            not viewed
            or x.aval.shape != shape
            or not facts.meets(difference.invars[1], mean, shape)
        ):
            continue
        inverse, factor = facts.behind(scale, _VIEWS), None
        product = facts.made(inverse, "mul")
        if product is not None and eqn.primitive.name == "mul":
            # Scaled before it meets the values, as Flax does.
            sides = [atom for atom in product.invars if not facts.known(atom)]
            others = [atom for atom in product.invars if facts.known(atom)]
            if len(sides) != 1 or len(others) != 1 or scale is not product.outvars[0]:
                continue
            (side,), (factor,) = sides, others
            inverse = facts.behind(side, _VIEWS)
        root = facts.made(inverse, "rsqrt" if eqn.primitive.name == "mul" else "sqrt")
        raised = root and facts.made(facts.behind(root.invars[0], _VIEWS), "add")
        epsilon = raised and facts.number(raised.invars[1])
        if epsilon is None:
            continue
        total = _variance_of(raised.invars[0], summed, axes, facts)
        if total is not None and facts.meets(scale, total, shape):
            return Found(summed, axes, epsilon, factor)
    return None


def _mean_of(atom, facts):
    """The sum that an atom is the mean of, whatever views lie between."""
    divided = facts.made(facts.behind(atom, _VIEWS), "div", "mul")
    if divided is None:
        return None
    total = facts.made(facts.behind(divided.invars[0], _VIEWS), "reduce_sum")
    count = facts.number(divided.invars[1])
    if total is None or count is None:
        return None
    size = math.prod(total.invars[0].aval.shape[axis] for axis in total.params["axes"])
    wanted = size if divided.primitive.name == "div" else 1 / size
    return total if math.isclose(count, wanted, rel_tol=1e-6) else None


def _variance_of(atom, x, axes, facts):
    """The sum of squares in the variance of x that an atom is: in two passes, or of two means."""
    inner = facts.behind(atom, _VIEWS, 0.0)
    same = facts.behind(x)
    direct = _mean_of(inner, facts)
    if direct is not None:
        square = _square_of(direct.invars[0], facts)
        difference = square and facts.made(facts.behind(square), "sub")
        mean = difference and _mean_of(difference.invars[1], facts)
        right = (
            mean
            and tuple(direct.params["axes"]) == tuple(mean.params["axes"]) == axes
            and facts.behind(difference.invars[0]) is facts.behind(mean.invars[0]) is same
            and facts.meets(difference.invars[1], mean, x.aval.shape)
        )
        return direct if right else None
    fast = facts.made(inner, "sub")
    if fast is None:
        return None
    whole = _mean_of(fast.invars[0], facts)
    own = _square_of(facts.behind(fast.invars[1], _VIEWS), facts)
    mean = own and _mean_of(own, facts)
    squared = whole and _square_of(whole.invars[0], facts)
    if not mean or squared is None:
        return None
    cells = [facts.cells(a, t) for a, t in zip(fast.invars, (whole, mean), strict=True)]
    right = (
        tuple(whole.params["axes"]) == tuple(mean.params["axes"]) == axes
        and facts.behind(squared) is facts.behind(mean.invars[0]) is same
        and None not in [None if c is None else 0 for c in cells]
        and np.array_equal(*cells)
    )
    return whole if right else None


def _square_of(atom, facts):
    eqn = facts.made(facts.behind(atom), "square", "integer_pow", "mul")
    if eqn is None:
        return None
    name = eqn.primitive.name
    if name == "square" or (name == "integer_pow" and eqn.params["y"] == 2):
        return eqn.invars[0]
    return eqn.invars[0] if name == "mul" and eqn.invars[0] is eqn.invars[1] else None


def applied(builder: Builder, node: Node, axes: tuple[int, ...], epsilon: float | None) -> Node:
    """The softmax of a node, or with an epsilon its normalization over axes."""
    order = node.natural
    name = builder.placed(node, order)
    places = tuple(sorted(order.index(axis) - 1 for axis in axes))
    ends = (name,), ""
    op = Softmax(*ends, *places) if epsilon is None else Normalize(*ends, places, float(epsilon))
    made = builder.add(op, builder.tensors[name].shape)
    return builder.node(made, order, node.sizes, node.dtype).replace(merged=node.merged)
