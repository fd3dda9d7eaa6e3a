"""Peak activation memory, by the liveness of values in the traced program."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core as jex

from hybrid_jax import core
from hybrid_jax.core import versions

# Equations that read an input after they began to write the output cannot run in place.
_MOVING = ("conv_general_dilated", "dot_general", "reduce_window", "concatenate", "transpose")

OUTPUT = None
"""The reader of what the model returns, which is stored in 32 bits."""


@dataclasses.dataclass(eq=False)
class Activation:
    """A value that depends on an input.

    Attributes:
      size: Elements for one example, as they were measured.
      axes: Labels of each axis.
      readers: Names of the sites that it flows to next, and `OUTPUT`; it is stored as wide as the
        one that reads it widest. Empty if nothing reads it: then it takes no place.
      last: The last step that reads it.
    """

    size: Any
    axes: tuple[Any, ...]
    readers: set[str | None] = dataclasses.field(default_factory=set)
    last: int = -1


Moment = list[tuple[int, Activation]]
"""What is stored at one time: (how often it counts, value); −1 for what a loop's body shares."""


class _Step(NamedTuple):
    """One equation: its name, what it reads and makes, its site if any, moments inside it."""

    name: str
    reads: list[Activation]
    makes: list[Activation]
    site: core.Site | None
    inside: list[Moment]


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
    `activation_bits` is {site name: bits}, 32 where missing.

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
    bits = {site.name: 32 for site in graph.sites} | {OUTPUT: 32} | dict(activation_bits or {})

    def stored(value):
        width = max((bits[reader] for reader in value.readers), default=0)
        return -(-value.size * width // 8)

    def elements(axes):
        return -(-math.prod(map(len, axes)) // graph.batch)

    found = moments(graph, elements)
    return max(sum(times * stored(value) for times, value in moment) for moment in found)


def moments(graph: core.Graph, measure: Callable[[tuple[Any, ...]], Any]) -> list[Moment]:
    """What is stored at each time, by the rules that `peak_activation_bytes` states.

    From the labels of each axis of a value `measure` makes its size, of any type with equality: a
    result can take the place of an operand whose size is equal.
    """
    arguments = graph.arguments[len(graph.parameters) :]
    inputs = [Activation(measure(value.labels), value.labels) for value in arguments]
    reads = [None] * len(graph.parameters) + inputs
    return _moments(graph, measure, graph.jaxpr.jaxpr, reads, ())


def _moments(graph, measure, jaxpr: jex.Jaxpr, reads: Sequence[Any], path) -> list[Moment]:
    steps: list[_Step] = []
    for value in _steps(graph, measure, jaxpr, reads, path, steps):
        if value:
            value.readers.add(OUTPUT)
            value.last = len(steps)
    for i, step in reversed(list(enumerate(steps))):
        made = {reader for value in step.makes for reader in value.readers}
        for value in step.reads:
            value.readers |= {step.site.name} if step.site else made
            value.last = max(value.last, i)
    live = {value for value in reads if value and value.last >= 0}
    found = [[(1, value) for value in live]]
    for i, step in enumerate(steps):
        room = {*live, *step.makes}
        if step.name not in _MOVING:
            free = [value.size for value in {*step.reads} if value.last == i]
            for value in step.makes:
                if value.size in free:
                    free.remove(value.size)
                    room.discard(value)
        now = [(1, value) for value in room]
        found += [now, *(now + inside for inside in step.inside)]
        live = {value for value in {*live, *step.makes} if value.last > i}
    return found


def _steps(graph, measure, jaxpr: jex.Jaxpr, reads, path, steps: list[_Step]) -> list[Any]:
    """Appends what depends on an input, calls inlined; gives the outputs, None for the others."""
    env = dict(zip(jaxpr.invars, reads, strict=True))

    def read(atom):
        return None if isinstance(atom, jex.Literal) else env.get(atom)

    for index, eqn in enumerate(jaxpr.eqns):
        here = (*path, index)
        values = [read(atom) for atom in eqn.invars]
        if not any(values):
            continue
        bodies = list(_bodies(eqn, values, measure))
        if eqn.primitive.name not in versions.CONTROL and bodies:
            [(name, called, _)] = bodies
            outs = _steps(graph, measure, called, values, (*here, name), steps)
        else:
            made = graph.analysis.equations[here][1]
            outs = [Activation(measure(value.labels), value.labels) for value in made]
            inside = []
            for name, body, arguments in bodies:
                shared = [(-1, value) for value in arguments if value]
                found = _moments(graph, measure, body, arguments, (*here, name))
                inside += [moment + shared for moment in found]
            known = [value for value in values if value]
            steps.append(_Step(eqn.primitive.name, known, outs, graph.site_at.get(here), inside))
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bodies(eqn, values, measure) -> Iterator[tuple[str, jex.Jaxpr, list[Activation | None]]]:
    """Name, jaxpr and arguments of each jaxpr that an equation runs."""
    found = versions.jaxprs(eqn)
    if eqn.primitive.name == "cond":
        values = values[1:]
    if eqn.primitive.name == "while":
        del found["cond"]
        values = values[versions.while_counts(eqn.params)[0] :]
    for name, body in found.items():
        arguments = []
        for atom, value in zip(body.jaxpr.invars, values, strict=True):
            # A scan hands on a slice of what it runs over: the last axes.
            axes = value.axes[len(value.axes) - atom.aval.ndim :] if value else ()
            arguments.append(Activation(measure(axes), axes) if value else None)
        yield name, body.jaxpr, arguments
