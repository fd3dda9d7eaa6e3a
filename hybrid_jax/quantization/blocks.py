"""Blocks: the part of a model between some of its sites and what the sites after them see."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

from hybrid_jax import core

_MARK = "input of site "


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A piece of a jaxpr: all that depends on the kernels of some sites, up to the next sites.

    Attributes:
      sites: Names of its sites, in the order in which they run.
      kernels: Paths of their kernels.
      streams: What it takes that depends on the model's inputs.
      constants: What it takes that does not, kernels excluded.
      taps: What it gives: for each, the names of the later sites of which it is the input, and the
        indices of the outputs of the model that it is.
      body: The jaxpr (*streams, *constants, *kernels) -> taps.
    """

    sites: tuple[str, ...]
    kernels: tuple[str, ...]
    streams: tuple[jex.Var, ...]
    constants: tuple[jex.Var, ...]
    taps: tuple[tuple[str | int, ...], ...]
    body: jex.Jaxpr

    def __call__(self, streams, constants, kernels):
        """Runs it on arrays; returns the list of taps."""
        run = jex.jaxpr_as_fun(jex.ClosedJaxpr(self.body, ()))
        return run(*streams, *constants, *kernels)


def marked(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with the input of every site named in its jaxpr, for `cut` to find."""

    def rule(site, x, kernel, apply):
        return apply(checkpoint_name(x, _MARK + site.name), kernel), None

    named = core.at_sites(fn, rule)
    return lambda params, *inputs: named(params, *inputs)[0]


def cut(
    jaxpr: jex.Jaxpr,
    sites: Sequence[str],
    kernels: Mapping[str, jex.Var],
    inputs: Sequence[jex.Var],
) -> Block:
    """Cuts the block of `sites` out of the jaxpr of a `marked` function.

    `kernels` is {path: argument of the jaxpr} of the kernels of the sites; `inputs` are the
    arguments that are the model's inputs. A block holds every site between its own,
    none in a loop or branch.
    """
    inside, seen = set(sites), set()
    varying, moved, beyond = set(inputs), set(kernels.values()), set()
    body = []
    taps: dict[jex.Var, list[str | int]] = {}
    for eqn in jaxpr.eqns:
        atoms = [atom for atom in eqn.invars if not isinstance(atom, jex.Literal)]
        site = _marked_site(eqn)
        seen |= {site} & inside
        if not varying.isdisjoint(atoms):
            varying.update(eqn.outvars)
        if not beyond.isdisjoint(atoms):
            beyond.update(eqn.outvars)
        elif moved.isdisjoint(atoms):
            continue
        elif site is not None and site not in inside:
            taps.setdefault(atoms[0], []).append(site)
            beyond.update(eqn.outvars)
        else:
            body.append(eqn)
            moved.update(eqn.outvars)
    for index, atom in enumerate(jaxpr.outvars):
        if not isinstance(atom, jex.Literal) and atom in moved:
            taps.setdefault(atom, []).append(index)
    taken = list(dict.fromkeys(_inputs(body)))
    missing = [site for site in sites if site not in seen]
    if missing:
        raise ValueError(f"sites must lie outside loops and branches, got {missing[0]!r}")
    cut_off = [path for path, kernel in kernels.items() if kernel not in taken]
    if cut_off:
        raise ValueError(
            f"a block must hold every site that lies between its own, got {cut_off[0]!r} cut off "
            f"in the block of {', '.join(sites)}"
        )
    owned = set(kernels.values())
    streams = tuple(v for v in taken if v in varying and v not in owned)
    constants = tuple(v for v in taken if v not in varying and v not in owned)
    return Block(
        sites=tuple(sites),
        kernels=tuple(kernels),
        streams=streams,
        constants=constants,
        taps=tuple(map(tuple, taps.values())),
        body=jaxpr.replace(
            constvars=[],
            invars=[*streams, *constants, *kernels.values()],
            eqns=body,
            outvars=list(taps),
        ),
    )


class Seen(NamedTuple):
    """What a block takes on one batch of inputs, and what it is to give."""

    streams: tuple[jax.Array, ...]
    constants: tuple[jax.Array, ...]
    targets: tuple[jax.Array, ...]


def observed(
    fn: Callable[..., Any], closed: jex.ClosedJaxpr, blocks: Sequence[Block]
) -> Callable[..., Seen]:
    """Makes the function that runs the model and picks out what a block takes and is to give.

    `fn` is the float model, whose taps are the targets; the arguments of `closed`, which the blocks
    are cut from, are leaves of (params, ranges, *inputs). One compilation serves all blocks. The
    result is observe(block, float params, params, ranges, batch) -> Seen.
    """
    taken = list(dict.fromkeys(v for b in blocks for v in (*b.streams, *b.constants)))
    taps = list(dict.fromkeys(tap for b in blocks for tap, *_ in b.taps))
    watched = core.at_sites(fn, lambda site, x, kernel, apply: (apply(x, kernel), x))
    inner = jex.jaxpr_as_fun(jex.ClosedJaxpr(closed.jaxpr.replace(outvars=taken), closed.consts))

    @jax.jit
    def run(float_params, params, ranges, batch):
        outs, inputs = watched(float_params, *batch)
        outs = jax.tree.leaves(outs)
        targets = [inputs[tap] if isinstance(tap, str) else outs[tap] for tap in taps]
        return inner(*jax.tree.leaves((params, ranges, *batch))), targets

    def observe(block, float_params, params, ranges, batch):
        values, targets = run(float_params, params, ranges, batch)
        values, targets = dict(zip(taken, values)), dict(zip(taps, targets))
        return Seen(
            tuple(values[v] for v in block.streams),
            tuple(values[v] for v in block.constants),
            tuple(targets[tap] for tap, *_ in block.taps),
        )

    return observe


def _marked_site(eqn):
    name = eqn.params.get("name") if eqn.primitive.name == "name" else None
    return name.removeprefix(_MARK) if name and name.startswith(_MARK) else None


def _inputs(eqns):
    """What the equations take from outside, in order."""
    made = set()
    for eqn in eqns:
        yield from (v for v in eqn.invars if not isinstance(v, jex.Literal) and v not in made)
        made.update(eqn.outvars)
