"""Which equations are affine, alike for every entry of a channel, after a site or a join."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from hybrid_jax.core import interpreter, versions
from hybrid_jax.core.elementwise import ELEMENTWISE
from hybrid_jax.core.graph import Graph
from hybrid_jax.core.joins import Join

Chains = Mapping[interpreter.Path, tuple[interpreter.Path, ...]]
"""{path of a site's equation: paths of the affine equations that follow it, in order}."""

SAME = ("convert_element_type", "copy", "stop_gradient", "reduce_precision")


class Affine(NamedTuple):
    """What becomes of a value y: scale · y + shift.

    Attributes:
      axes: Those of its channels.
      sizes: Of y along each of these.
      scale: float32, a scalar or one entry for each channel.
      shift: float32, alike.
    """

    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    scale: jax.Array
    shift: jax.Array

    @classmethod
    def start(cls, axes: Sequence[int], shape: Sequence[int]) -> "Affine":
        """A value of that shape itself."""
        sizes = tuple(shape[axis] for axis in axes)
        return cls(tuple(axes), sizes, jnp.float32(1), jnp.float32(0))

    def then(self, name: str, place: int, values: Sequence[Any]) -> "Affine":
        """After one more affine equation of that name, of which operand `place` is this one."""
        if name in SAME:
            return self
        scale, shift = self.scale, self.shift
        if name == "neg":
            return self._replace(scale=-scale, shift=-shift)
        other = self._one_each(jnp.asarray(values[1 - place]).astype(jnp.float32))
        if name == "mul":
            return self._replace(scale=scale * other, shift=shift * other)
        if name == "div":
            return self._replace(scale=scale / other, shift=shift / other)
        if name == "add":
            return self._replace(shift=shift + other)
        if place == 0:
            return self._replace(shift=shift - other)
        return self._replace(scale=-scale, shift=other - shift)

    def each(self, value: jax.Array) -> jax.Array:
        """The scale or the shift in the shape of the channels."""
        if value.ndim:
            value = value.reshape([value.shape[axis] for axis in self.axes])
        return jnp.broadcast_to(value, self.sizes)

    def along(self, value: jax.Array, rank: int) -> jax.Array:
        """A value in the shape of the channels, to be broadcast to one of that rank."""
        sizes = dict(zip(self.axes, self.sizes, strict=True))
        return value.reshape([sizes.get(axis, 1) for axis in range(rank)])

    def _one_each(self, operand: jax.Array) -> jax.Array:
        """One entry for each channel of an operand that does not vary along other axes."""
        for axis in range(operand.ndim):
            if axis not in self.axes:
                operand = jax.lax.slice_in_dim(operand, 0, 1, axis=axis)
        return operand


def affine_chains(graph: Graph) -> Chains:
    """The affine equations after each site of which nothing else reads the result; not in loops."""
    found: dict[interpreter.Path, tuple[interpreter.Path, ...]] = {}
    for path, eqn, level in _levels(graph):
        if path in graph.site_at and _floating(eqn.outvars[0]):
            axes = set(graph.site_at[path].output_axes)
            found[path] = level.follow(eqn.outvars[0], axes)
    return found


class Stored(NamedTuple):
    """A chain that follows the tensor of a join.

    Attributes:
      operand: Which of its first equation is the tensor.
      axis: That of the channels.
    """

    join: Join
    operand: int
    axis: int
    links: tuple[interpreter.Path, ...]


def stored_chains(graph: Graph) -> Mapping[interpreter.Path, Stored]:
    """{path of the first equation: an affine chain that follows the tensor of a join}.

    It is affine alike for every entry along all axes but one, that of the channels; what scales all
    alike is taken to belong to the last axis.
    """
    found: dict[interpreter.Path, Stored] = {}
    for path, eqn, level in _levels(graph):
        reads = graph.found_joins.reads.get(path, {})
        if len(reads) == 1 and len(eqn.invars) == 2:
            ((operand, join),) = reads.items()
            var, other = eqn.invars[operand], eqn.invars[1 - operand]
            last = len(var.aval.shape) - 1
            axes = _varying(other, level.makers) or {last}
            if len(axes) == 1 and _is_affine(graph, path, eqn, var, axes, level.makers):
                links = (path, *level.follow(eqn.outvars[0], axes))
                found[path] = Stored(join, operand, *axes, links)
    return found


class _Level:
    """What makes and reads the variables of one jaxpr."""

    def __init__(self, graph, jaxpr, path):
        self.graph, self.path = graph, path
        self.makers = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
        self.readers = collections.defaultdict(list)
        for index, eqn in enumerate([*jaxpr.eqns, None]):
            for atom in jaxpr.outvars if eqn is None else eqn.invars:
                if not isinstance(atom, jex.Literal):
                    self.readers[atom].append((index, eqn))

    def follow(self, var, axes) -> tuple[interpreter.Path, ...]:
        """The paths of the affine equations after a variable."""
        links: list[interpreter.Path] = []
        while len(self.readers[var]) == 1:
            ((index, reader),) = self.readers[var]
            link = (*self.path, index)
            if reader is None or not _is_affine(self.graph, link, reader, var, axes, self.makers):
                break
            links.append(link)
            (var,) = reader.outvars
        return tuple(links)


def _levels(graph):
    """(path, equation, its level) of all equations that are not in a loop, branch or derivative."""

    def walk(jaxpr, path):
        level = _Level(graph, jaxpr, path)
        for index, eqn in enumerate(jaxpr.eqns):
            here = (*path, index)
            if eqn.primitive.name in (*versions.CALLS, *versions.REMAT):
                yield from walk(versions.body(eqn).jaxpr, (*here, "body"))
            yield here, eqn, level

    return walk(graph.jaxpr.jaxpr, ())


def _is_affine(graph, path, eqn, var, axes, makers) -> bool:
    """Whether an equation is affine in `var`, differing only along `axes`."""
    name = eqn.primitive.name
    if name in (*SAME, "neg"):
        return _floating(eqn.outvars[0])
    if name not in ("add", "sub", "mul", "div") or (name == "div" and eqn.invars[0] is not var):
        return False
    place = 1 if eqn.invars[0] is var else 0
    known = graph.analysis.equations[path][0][place]
    if not isinstance(known.origin, frozenset) or eqn.outvars[0].aval.shape != var.aval.shape:
        return False
    return _varying(eqn.invars[place], makers) <= axes


def _varying(atom, makers) -> set[int]:
    """The axes along which an array may have different entries."""
    shape = atom.aval.shape
    maker = None if isinstance(atom, jex.Literal) else makers.get(atom)
    if maker is not None and maker.primitive.name == "broadcast_in_dim":
        where = maker.params["broadcast_dimensions"]
        return {where[axis] for axis in _varying(maker.invars[0], makers)}
    if maker is not None and maker.primitive.name in ELEMENTWISE:
        return set().union(*(_varying(operand, makers) for operand in maker.invars))
    return {axis for axis, n in enumerate(shape) if n != 1}


def _floating(var) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.floating)
