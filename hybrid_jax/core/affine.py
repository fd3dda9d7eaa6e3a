"""Which equations after a site are affine in its result, alike for every entry of a channel."""

import collections
from collections.abc import Mapping

import jax.numpy as jnp
from jax.extend import core as jex

from hybrid_jax.core import interpreter
from hybrid_jax.core.elementwise import ELEMENTWISE
from hybrid_jax.core.graph import Graph

Chains = Mapping[interpreter.Path, tuple[interpreter.Path, ...]]
"""{path of a site's equation: paths of the affine equations that follow it, in order}."""

REMAT = ("remat", "remat2", "checkpoint")
SAME = ("convert_element_type", "copy", "stop_gradient", "reduce_precision")


def affine_chains(graph: Graph) -> Chains:
    """The affine equations that follow each site, and of which nothing else reads the result.

    Sites in loops, branches and custom derivatives are left out.
    """
    found: dict[interpreter.Path, tuple[interpreter.Path, ...]] = {}

    def level(jaxpr, path):
        makers = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
        readers = collections.defaultdict(list)
        for index, eqn in enumerate([*jaxpr.eqns, None]):
            for atom in jaxpr.outvars if eqn is None else eqn.invars:
                if not isinstance(atom, jex.Literal):
                    readers[atom].append((index, eqn))
        for index, eqn in enumerate(jaxpr.eqns):
            here = (*path, index)
            if eqn.primitive.name in REMAT:
                level(eqn.params["jaxpr"], (*here, "body"))
            if here not in graph.site_at or not _floating(eqn.outvars[0]):
                continue
            axes, var, links = set(graph.site_at[here].output_axes), eqn.outvars[0], []
            while len(readers[var]) == 1:
                ((index, reader),) = readers[var]
                link = (*path, index)
                if reader is None or not _is_affine(graph, link, reader, var, axes, makers):
                    break
                links.append(link)
                (var,) = reader.outvars
            found[here] = tuple(links)

    level(graph.jaxpr.jaxpr, ())
    return found


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
