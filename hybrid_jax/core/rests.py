"""What masked channels would hold, where it is known only as the program runs, and counts.

In Σ (x - mean)² over channels every masked one adds mean². The small network has no such channels,
and adds what one of them would, as often as there were any.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from hybrid_jax.core import interpreter
from hybrid_jax.core.labels import UNIFORM, Value
from hybrid_jax.core.primitives import PRIMITIVES
from hybrid_jax.core.primitives.reduce import counting


class Rests:
    """Of the arrays of one run, the slice of length 1 that each masked channel of an axis is."""

    def __init__(self):
        self._slices: dict[tuple[Any, int], Callable[[], jax.Array]] = {}

    def follow(
        self,
        eqn: jex.JaxprEqn,
        values: Sequence[Any],
        ins: Sequence[Value],
        outs: Sequence[Value],
        keep: Sequence[np.ndarray],
    ) -> None:
        """Notes how to make the slices of an equation's result that are UNIFORM."""
        for axis, rest in enumerate(outs[0].rest):
            if rest is not UNIFORM or keep[axis].all():
                continue
            if eqn.primitive.name == "broadcast_in_dim":
                sizes = enumerate(zip(eqn.params["shape"], keep, strict=True))
                shape = [n if k.all() else 1 if a == axis else int(k.sum()) for a, (n, k) in sizes]
                make = functools.partial(interpreter.bind, eqn, values, shape=tuple(shape))
            else:
                make = functools.partial(self._elementwise, eqn, values, ins, axis, len(keep[axis]))
            self._slices[eqn.outvars[0], axis] = functools.cache(lambda make=make: make()[0])

    def made_up(
        self,
        eqn: jex.JaxprEqn,
        values: Sequence[Any],
        known: Value,
        keep: Sequence[np.ndarray],
        result: jax.Array,
    ) -> list[jax.Array]:
        """A reduction of what is left, with the masked channels that count."""
        made_up = PRIMITIVES[eqn.primitive.name].made_up
        for axis in counting(eqn.primitive.name, eqn.params["axes"], known):
            if not keep[axis].all():
                own = self._slice(eqn.invars[0], values[0], known.rest[axis], axis)
                (rest,) = interpreter.bind(eqn, [own])
                result = made_up(result, rest, int((~keep[axis]).sum()))
        return [result]

    def _slice(self, atom, value, rest, axis):
        if rest is UNIFORM:
            return self._slices[atom, axis]()
        shape = [1 if a == axis else n for a, n in enumerate(value.shape)]
        return jnp.full(shape, rest, value.dtype)

    def _elementwise(self, eqn, values, ins, axis, size):
        """The equation on the slices of its operands; one without the axis is its own."""
        slices = [
            self._slice(atom, value, known.rest[axis], axis)
            if known.labels and len(known.labels[axis]) == size
            else value
            for atom, value, known in zip(eqn.invars, values, ins, strict=True)
        ]
        return interpreter.bind(eqn, slices)
