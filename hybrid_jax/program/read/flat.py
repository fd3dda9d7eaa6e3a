"""A function as one flat list of equations, and what of it comes from parameters alone."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from hybrid_jax import core
from hybrid_jax.core import interpreter
from hybrid_jax.core.functions import FUNCTIONS, SAME

EXAMPLES = 3
"""Examples that a function is traced with: what mixes them, or takes one for all, shows."""


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """A value that comes from parameters or constants alone."""

    value: np.ndarray  # the array, with length 1 along the axes that it is the same along
    sizes: tuple[int, ...]  # the traced value's lengths
    static: bool  # whether no parameter is in it

    @property
    def varying(self) -> tuple[int, ...]:
        """The axes along which it varies."""
        return tuple(axis for axis, n in enumerate(np.shape(self.value)) if n > 1)

    @property
    def number(self) -> float | None:
        """The one number that it is, if that is no parameter's."""
        if self.static and np.size(self.value) == 1:
            return np.asarray(self.value).reshape(()).item()
        return None

    def whole(self) -> Any:
        """The traced value."""
        return np.broadcast_to(self.value, self.sizes)


def traced(fn: Callable[..., Any], params: Any, inputs: Sequence[Any]) -> core.Graph:
    """The graph of the function with all inner calls inlined and scans unrolled.

    Derivative rules go: what is deployed is not differentiated.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), params)
    like = [jax.ShapeDtypeStruct((EXAMPLES, *np.shape(x)[1:]), x.dtype) for x in inputs]

    def flat(params, *inputs):
        closed = interpreter.inline(jax.make_jaxpr(fn)(params, *inputs))
        return jex.jaxpr_as_fun(closed)(*jax.tree.leaves((params, *inputs)))

    return core.trace(flat, shapes, *like)


def known_values(graph: core.Graph, leaves: Sequence[Any]) -> dict[Any, Known]:
    """What comes from parameters alone and is read by something else, computed in one go."""
    jaxpr = graph.jaxpr.jaxpr
    given = [*jaxpr.constvars, *jaxpr.invars[: len(graph.parameters)]]
    static = dict.fromkeys(jaxpr.constvars, True) | dict.fromkeys(
        given[len(jaxpr.constvars) :], False
    )
    varies: dict[Any, tuple[bool, ...]] = {
        var: tuple(n > 1 for n in var.aval.shape) for var in given
    }
    for var, const in zip(jaxpr.constvars, graph.jaxpr.consts, strict=True):
        varies[var] = _variation(const)
    wanted, steps = [], []
    for eqn in jaxpr.eqns:
        operands = [atom for atom in eqn.invars if not isinstance(atom, jex.Literal)]
        if all(atom in static for atom in operands):
            along = _axes(
                eqn, [varies.get(a) if not isinstance(a, jex.Literal) else None for a in eqn.invars]
            )
            for var in eqn.outvars:
                static[var] = all(static[atom] for atom in operands)
                varies[var] = along if along is not None else tuple(n > 1 for n in var.aval.shape)
            steps.append(eqn)
        else:
            wanted += [atom for atom in operands if atom in static]
    wanted += [a for a in jaxpr.outvars if not isinstance(a, jex.Literal) and a in static]
    wanted = list(dict.fromkeys(wanted))

    def compute(values, keep):
        env = dict(zip(given, values, strict=True))
        for eqn in steps:
            operands = [a.val if isinstance(a, jex.Literal) else env.get(a) for a in eqn.invars]
            if not any(operand is None for operand in operands):
                env.update(zip(eqn.outvars, interpreter.bind(eqn, operands), strict=True))
        return [_compressed(env[var], varies[var]) for var in keep]

    consts = list(graph.jaxpr.consts)
    fixed = [var for var in wanted if static[var]]
    moving = [var for var in wanted if not static[var]]
    nothing = [None] * (len(given) - len(consts))
    numbers = jax.jit(lambda consts: compute([*consts, *nothing], fixed))(consts)
    arrays = jax.jit(lambda leaves: compute([*consts, *leaves], moving))(list(leaves))
    found = dict(zip([*fixed, *moving], map(np.asarray, [*numbers, *arrays]), strict=True))
    return {var: Known(v, tuple(var.aval.shape), static[var]) for var, v in found.items()}


def literal(atom: jex.Literal) -> Known:
    """A literal of an equation."""
    value = np.asarray(atom.val)
    return Known(value.reshape((1,) * value.ndim), value.shape, True)


def _variation(const):
    """Along which axes a constant differs; of a large one, along all."""
    if np.size(const) > 10**6 or jnp.issubdtype(const.dtype, jax.dtypes.extended):
        return tuple(n > 1 for n in np.shape(const))
    const = np.asarray(const)
    return tuple(
        n > 1 and not np.array_equal(const, np.broadcast_to(const.take([0], axis), const.shape))
        for axis, n in enumerate(const.shape)
    )


def _axes(eqn, operands):
    """Along which axes the result of an equation of known values may differ; None is all."""
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    first = operands[0] if operands else None
    if name == "broadcast_in_dim":
        along = [False] * len(shape)
        for axis, place in enumerate(eqn.params["broadcast_dimensions"]):
            along[place] = bool(first) and first[axis]
        return tuple(along)
    if name == "transpose" and first is not None:
        return tuple(first[axis] for axis in eqn.params["permutation"])
    if name in ("reshape", "squeeze") and first is not None:
        before = eqn.invars[0].aval.shape
        long = [own for own, n in zip(first, before, strict=True) if n != 1]
        if [n for n in before if n != 1] == [n for n in shape if n != 1]:
            each = iter(long)
            return tuple(n != 1 and next(each) for n in shape)
    if name == "iota":
        return tuple(axis == eqn.params["dimension"] for axis in range(len(shape)))
    if (name in FUNCTIONS or name in SAME) and len(eqn.outvars) == 1:
        whole = [own for own in operands if own is not None and len(own) == len(shape)]
        return tuple(any(own[axis] for own in whole) for axis in range(len(shape)))
    return None


def _compressed(value, along):
    if all(own or n == 1 for own, n in zip(along, jnp.shape(value), strict=True)):
        return value
    return value[tuple(slice(None) if own else slice(0, 1) for own in along)]


def sources(eqns: Mapping[int, jex.JaxprEqn]) -> Mapping[Any, jex.JaxprEqn]:
    """{variable: the equation that makes it}."""
    return {var: eqn for eqn in eqns.values() for var in eqn.outvars}
