"""Joins: where tensors that each come from an input meet, and leave as one.

A device that computes in integers stores in few bits, too, what meets in a residual sum, a product
of two activations, a concatenation or a mean over an image, though no kernel takes it. A join is
such a place, as a site is the place of a kernel. What is stored so is what all read.
"""

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core as jex

from hybrid_jax.core import interpreter, versions
from hybrid_jax.core.sites import Site

_KINDS = {
    "add": "add",
    "sub": "add",
    "mul": "multiply",
    "concatenate": "concatenate",
    "reduce_sum": "mean",
    "reduce_window_sum": "mean",
}
# What they make are entries of the tensor that they take, and zeros: it is stored alike.
_MOVES = {
    "pad",
    "reduce_max",
    "reduce_window_max",
    "reshape",
    "rev",
    "slice",
    "squeeze",
    "transpose",
}
# Parts of a softmax, whose differences and sum are no joins; what carries one on. A sum that is
# divided is a mean.
_PARTS = {
    "reduce_max": "greatest",
    "exp": "exponential",
    "reduce_sum": "sum",
    "reduce_window_sum": "sum",
}
_CARRIES = {"max", "stop_gradient", "broadcast_in_dim", "reshape", "reduce_sum", "log"}
# How random numbers meet a tensor in dropout, in stochastic depth or as Gaussian noise.
_NOISE = {"add", "div", "mul", "select_n", "sub"}


@dataclasses.dataclass(frozen=True)
class Join:
    """A tensor that takes part in a join.

    Attributes:
      name: The site that ran last of those it comes from (or 'input'), the kind of the join and, in
        a sum or product, which of the two it is: 'block_1/conv/kernel/add/0'; used again 'name#2'.
      kind: 'add', 'multiply', 'concatenate' or 'mean' (also a sum over places, or a pool).
      operand: Its position among the operands; None for a result: that of a concatenation, which is
        one tensor, and that of a mean, 'name/mean/result', if more than a site takes it. Of a
        concatenation, what else reads is an operand too: 'name/concatenate/0'.
      site: The first site that takes the same tensor, moved or pooled perhaps, or None.
    """

    name: str
    kind: str
    operand: int | None
    site: str | None


class _Seen(NamedTuple):
    """What is known of a value."""

    token: int  # which one it is
    entries: int  # which one's entries it has
    examples: bool = False  # whether it has a row for each example
    last: int = -1  # the place of the last site before it
    part: str | None = None  # of a softmax, or the sum of a mean
    random: bool = False  # whether it is made of random numbers, and of no example
    noisy: bool = False  # whether it is a tensor with noise that no number makes up for yet
    scaled: tuple[int, tuple[interpreter.Path, int]] | None = None  # entries that a number scales


class Joins(NamedTuple):
    """The joins of a program.

    Attributes:
      own: {path of an equation: its joins}, in running order. A tensor that takes part in several
        is that of the first.
      at: The same, and where something else reads such a tensor its join again, with the operand
        that it is there: all places where tensors are to be rounded.
      reads: {path of an equation: {operand: join}} wherever the tensor of a join is read.
      first_takers: {site: the first site that takes the same tensor, moved or pooled perhaps};
        without sites in a `while` or in a function with a derivative rule of its own.
    """

    own: dict[interpreter.Path, tuple[Join, ...]]
    at: dict[interpreter.Path, tuple[Join, ...]]
    reads: dict[interpreter.Path, dict[int, Join]]
    first_takers: dict[str, str]


def find_joins(
    closed: jex.ClosedJaxpr, batched: Sequence[bool], site_at: Mapping[interpreter.Path, Site]
) -> Joins:
    """Finds the joins of a traced program.

    Training and evaluation have the same: statistics over the batch, as BatchNorm takes them in
    training, are not among them, and a tensor with noise is the tensor itself, so that dropout and
    the number that makes up for it do not count as readers. Neither is the sum in a softmax a join,
    nor what a function with a derivative rule of its own computes.
    `batched` says for each argument whether its leading axis is that of the examples.
    """
    names = [s.name for path, s in site_at.items() if not interpreter.in_derivative(path)]
    found: dict[interpreter.Path, list[tuple[str, int | None, _Seen]]] = {}
    takers: dict[int, str] = {}
    readers: dict[int, list[tuple[interpreter.Path, int]]] = collections.defaultdict(list)
    first_takers: dict[str, str] = {}
    tokens = itertools.count()
    loops: set[interpreter.Path] = set()
    disturbed: list[_Seen] = []

    def fresh(entries=None, **known):
        token = next(tokens)
        return _Seen(token, token if entries is None else entries, **known)

    def looped(path):
        """Whether what is known of a value may hold for the first iteration alone."""
        return any(path[:n] in loops for n in range(1, len(path)))

    def walk(jaxpr, args, path):
        env: dict[Any, _Seen] = {var: fresh() for var in jaxpr.constvars}
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atom):
            return fresh() if isinstance(atom, jex.Literal) else env[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            values = [read(atom) for atom in eqn.invars]
            env.update(zip(eqn.outvars, step(eqn, values, (*path, index)), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def step(eqn, values, here):
        name = eqn.primitive.name
        inner = {} if name in versions.CUSTOM else interpreter.subjaxprs(eqn, here)
        if name not in versions.CONTROL and inner:
            return walk(inner["body"].jaxpr, values, (*here, "body"))
        last = max((value.last for value in values), default=-1)
        clean = _without_noise(eqn, values)
        if name in ("while", "scan"):
            loops.add(here)
        for branch, body in inner.items():
            if name != "while":
                args = values[1:] if name == "cond" else values
                ends = walk(body.jaxpr, args, (*here, branch))
                last = max([last, *(end.last for end in ends)])
        if here in site_at:
            site = site_at[here]
            taken = values[1 - site.kernel_operand].entries
            first_takers[site.name] = takers.setdefault(taken, site.name)
            last = names.index(site.name)
        elif clean:
            disturbed.append(clean)
        elif name not in (*_MOVES, *interpreter.REBUILD) and not looped(here):
            for operand, value in enumerate(values):
                readers[value.entries].append((here, operand))
        joined = _joined(eqn, values)
        examples = any(v.examples for v in values) and not _over_examples(eqn, values)
        random = not examples and (name == "random_bits" or any(v.random for v in values))
        entries = values[0].entries if name in _MOVES else None
        part = _PARTS.get(name)
        if name in _CARRIES:
            part = next((value.part for value in values if value.part), part)
        made = [fresh(examples=examples, last=last, random=random) for _ in eqn.outvars]
        if clean:
            entries = clean.scaled[0] if clean.scaled else clean.entries
            noisy = not (clean.noisy or clean.scaled)
            return [fresh(entries, examples=True, last=last, noisy=noisy)]
        if made:
            known = {"examples": examples, "last": last, "part": part, "random": random}
            made[0] = fresh(entries, scaled=_scaled(eqn, values, here), **known)
        if joined:
            whole = [(None, made[0])] if name == "concatenate" else []
            found[here] = [(_KINDS[name], *one) for one in [*joined, *whole]]
        elif name in ("div", "mul") and [v.part for v in values if v.examples] == ["sum"]:
            found[here] = [("mean", None, made[0])]
        return made

    walk(closed.jaxpr, [fresh(examples=own) for own in batched], ())
    for value in disturbed:
        if value.scaled and not readers[value.entries]:
            entries, reader = value.scaled
            readers[entries] = [one for one in readers[entries] if one != reader]
    return Joins(*_places(names, found, takers, readers, looped), first_takers)


def _places(names, found, takers, readers, looped):
    """`own`, `at` and `reads` of `Joins`, of the tensors that were found to meet."""
    counts: collections.Counter[str] = collections.Counter()

    def join(kind, operand, value):
        name = f"{names[value.last] if value.last >= 0 else 'input'}/{kind}"
        if kind in ("add", "multiply") or (kind == "concatenate" and operand is not None):
            name = f"{name}/{operand}"
        if kind == "mean" and operand is None:
            name = f"{name}/result"
        counts[name] += 1
        unique = name if counts[name] == 1 else f"{name}#{counts[name]}"
        return Join(unique, kind, operand, takers.get(value.entries))

    def is_own(kind, operand, value):
        """Whether a tensor is one of its own, rather than a site's or part of a concatenation."""
        elsewhere = value.entries in takers
        if kind == "concatenate" and operand is not None:
            return elsewhere or len(readers[value.entries]) > 1
        return kind != "mean" or operand is not None or (readers[value.entries] and not elsewhere)

    at: dict[interpreter.Path, dict[int | None, Join]] = collections.defaultdict(dict)
    stored: dict[int, Join] = {}
    for path, joined in found.items():
        for kind, operand, value in joined:
            new = looped(path) or value.entries not in stored
            if new and is_own(kind, operand, value):
                at[path][operand] = join(kind, operand, value)
                if not looped(path):
                    stored[value.entries] = at[path][operand]
    own = {path: tuple(joined.values()) for path, joined in at.items()}
    reads: dict[interpreter.Path, dict[int, Join]] = collections.defaultdict(dict)
    for entries, one in stored.items():
        for path, operand in readers[entries]:
            reads[path][operand] = dataclasses.replace(one, operand=operand)
            if one.operand is not None:  # a result is rounded before it is read
                at[path].setdefault(operand, reads[path][operand])
    whole = {path: tuple(joined.values()) for path, joined in at.items()}
    return own, whole, reads


def _joined(eqn, values):
    """The (position, value) of the operands that meet in an equation; none if it is no join."""
    name = eqn.primitive.name
    own = [(i, value) for i, value in enumerate(values) if value.examples]
    if name not in _KINDS or _over_examples(eqn, values):
        return []
    parts = {value.part for _, value in own} - {None}
    if _KINDS[name] == "mean":
        return [] if "exponential" in parts else own
    if name == "sub" and parts:
        return []
    return own if len({value.token for _, value in own}) > 1 else []


def _without_noise(eqn, values):
    """The tensor that random numbers meet, or that a number scales for them; None if none does."""
    own = [value for value in values if value.examples]
    if eqn.primitive.name not in _NOISE or len(own) != 1:
        return None
    meets = any(v.random for v in values) or (own[0].noisy and _scaled(eqn, values, ()))
    return own[0] if meets else None


def _scaled(eqn, values, here):
    """The entries that an equation multiplies with a number, and where it reads them; or None."""
    own = [i for i, value in enumerate(values) if value.examples]
    numbers = [i for i, atom in enumerate(eqn.invars) if not atom.aval.shape]
    if (eqn.primitive.name, own, numbers) not in (
        ("mul", [0], [1]),
        ("mul", [1], [0]),
        ("div", [0], [1]),
    ):
        return None
    (operand,) = own
    # The number that divides a sum makes it a mean.
    return None if values[operand].part == "sum" else (values[operand].entries, (here, operand))


def _over_examples(eqn, values):
    """Whether what an equation makes is of several examples, no longer of each."""
    name, params = eqn.primitive.name, eqn.params
    if name.startswith("reduce_window"):
        return params["window_dimensions"][0] > 1
    if name.startswith("reduce_"):
        return 0 in params.get("axes", ())
    if name == "concatenate":
        return params["dimension"] == 0
    if name == "dot_general":
        summed = params["dimension_numbers"][0]
        return any(v.examples and 0 in axes for v, axes in zip(values, summed, strict=True))
    return False
