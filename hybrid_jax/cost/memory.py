"""Peak activation memory, by the liveness of values in the traced program."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from jax.extend import core as jex

from hybrid_jax import core

# Equations that read an input after they began to write the output cannot run in place.
_MOVING = ("conv_general_dilated", "dot_general", "reduce_window", "concatenate", "transpose")
_LOOPS = ("scan", "while", "cond")


@dataclasses.dataclass(eq=False)
class _Value:
    """A value that depends on an input: elements for one example, bits, last step that reads it."""

    size: int
    bits: int = 0
    last: int = -1

    @property
    def bytes(self) -> int:
        return -(-self.size * self.bits // 8)


class _Step(NamedTuple):
    """One equation: its name, what it reads and makes, its site if any, bytes needed inside it."""

    name: str
    reads: list[_Value]
    makes: list[_Value]
    site: core.Site | None
    inside: int


def peak_activation_bytes(
    graph: core.Graph, activation_bits: Mapping[str, int] | None = None
) -> int:
    """The most bytes that activations of one example take at any time.

    Equations run in the order traced. A value lives from the equation that makes it to the last
    one that reads it; inputs live from the start, outputs to the end. An element-wise result takes
    the place of an operand of its size that is not read again; a convolution, product, pool,
    transpose or concatenation needs room beside its operands. What is computed from parameters
    alone is no activation. A value is stored as wide as the sites that it flows to next read it,
    in whole bytes for all its elements; values that reach no site take 32 bits.

    Args:
      graph: A traced model.
      activation_bits: {site name: bits}; 32 where missing.

    Returns:
      Bytes for one example.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> fn = lambda params, x: jax.nn.relu(x @ params['a']) @ params['b']
      >>> shapes = {'a': jnp.ones((4, 10)), 'b': jnp.ones((10, 2))}
      >>> graph = core.trace(fn, shapes, jnp.ones((1, 4)))
      >>> peak_activation_bytes(graph)  # (4 + 10) · 4; the relu is in place; then (10 + 2) · 4
      56
      >>> peak_activation_bytes(graph, {'a': 8, 'b': 8})  # 4 + 10 bytes, then 10 + 2 · 4
      18
    """
    bits = {site.name: 32 for site in graph.sites} | dict(activation_bits or {})
    inputs = [_value(graph, v.shape) for v in graph.arguments[len(graph.parameters) :]]
    reads = [None] * len(graph.parameters) + inputs
    return _peak(graph, bits, graph.jaxpr.jaxpr, reads, ())


def _peak(graph, bits, jaxpr: jex.Jaxpr, reads: Sequence[_Value | None], path) -> int:
    steps: list[_Step] = []
    outputs = _steps(graph, bits, jaxpr, reads, path, steps)
    for value in outputs:
        if value:
            value.bits, value.last = 32, len(steps)
    for i, step in reversed(list(enumerate(steps))):
        made = max((value.bits for value in step.makes), default=0)
        for value in step.reads:
            value.bits = max(value.bits, bits[step.site.name] if step.site else made)
            value.last = max(value.last, i)
    live = {value for value in reads if value and value.last >= 0}
    peak = sum(value.bytes for value in live)
    for i, step in enumerate(steps):
        room = sum(value.bytes for value in {*live, *step.makes})
        dying = {value for value in step.reads if value.last == i}
        if step.name not in _MOVING:
            free = [value.size for value in dying]
            for value in step.makes:
                if value.size in free:
                    free.remove(value.size)
                    room -= value.bytes
        peak = max(peak, room + step.inside)
        live = {value for value in {*live, *step.makes} if value.last > i}
    return peak


def _steps(graph, bits, jaxpr: jex.Jaxpr, reads, path, steps: list[_Step]) -> list[_Value | None]:
    """Appends the equations that depend on an input, calls inlined; returns the outputs.

    None stands for a value that depends on parameters alone.
    """
    env = dict(zip(jaxpr.invars, reads, strict=True))

    def read(atom):
        return None if isinstance(atom, jex.Literal) else env.get(atom)

    for index, eqn in enumerate(jaxpr.eqns):
        here = (*path, index)
        values = [read(atom) for atom in eqn.invars]
        if not any(values):
            continue
        bodies = list(_bodies(eqn, values))
        if eqn.primitive.name not in _LOOPS and bodies:
            [(name, called, _)] = bodies
            outs = _steps(graph, bits, called, values, (*here, name), steps)
        else:
            outs = [_value(graph, v.shape) for v in graph.analysis.equations[here][1]]
            inside = 0
            for name, body, arguments in bodies:
                peak = _peak(graph, bits, body, arguments, (*here, name))
                inside = max(inside, peak - sum(v.bytes for v in arguments if v))
            known = [value for value in values if value]
            steps.append(_Step(eqn.primitive.name, known, outs, graph.site_at.get(here), inside))
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bodies(eqn, values) -> Iterator[tuple[str, jex.Jaxpr, list[_Value | None]]]:
    """Name, jaxpr and arguments of each jaxpr that an equation runs."""
    params, name = eqn.params, eqn.primitive.name
    if name == "cond":
        found = [(str(i), closed, values[1:]) for i, closed in enumerate(params["branches"])]
    elif name == "while":
        found = [("body", params["body_jaxpr"], values[params["cond_nconsts"] :])]
    elif name == "scan":
        whole, length = params["num_consts"] + params["num_carry"], max(params["length"], 1)
        rows = [value and _Value(-(-value.size // length)) for value in values[whole:]]
        found = [("body", params["jaxpr"], [*values[:whole], *rows])]
    else:
        found = [("body", params.get("jaxpr", params.get("call_jaxpr")), values)]
    for name, body, values in found:
        if body is not None:
            yield name, getattr(body, "jaxpr", body), [v and _Value(v.size) for v in values]


def _value(graph: core.Graph, shape: tuple[int, ...]) -> _Value:
    return _Value(-(-math.prod(shape) // graph.batch))
