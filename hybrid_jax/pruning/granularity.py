"""Granularities: which weights leave together, and which compete for being kept.

A unit is what leaves as a whole: a weight, a channel, a block. Units of a row compete.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from hybrid_jax import core

Leaves = dict[str, Any]
Units = dict[str, jax.Array]
Kernels = Mapping[str, core.Kernel]

REDUCTIONS = {
    "sum": lambda entries: entries.sum(axis=-1),
    "mean": lambda entries: entries.mean(axis=-1),
    "max": lambda entries: entries.max(axis=-1),
    "l2": lambda entries: entries.__array_namespace__().sqrt((entries * entries).sum(axis=-1)),
}
"""How the scores of a unit's weights, on the last axis, make that of the unit."""


@dataclasses.dataclass(frozen=True)
class Granularity:
    """A pytree of scores seen as rows of units, and back. Rows have a name, or share one.

    `leaves` are {path: scores, or `optax.MaskedNode()`}, arrays of NumPy where they are known.
    `paths(leaves) -> {name: path}` are of all there is to prune: the leaves, each with its own path
    for a name, or the groups of channels by theirs, with the paths of their kernels. `split(leaves,
    names) -> {name: (rows, n) scores of units}` and `merge({name: (rows, n) bool}, leaves) ->
    {path: mask}`. A row loses `max_sparsity` at most, keeps `at_least` units, and in whole steps of
    `multiple`.
    """

    name: str
    paths: Callable[[Leaves], dict[str, str]]
    split: Callable[[Leaves, Iterable[str]], Units]
    merge: Callable[[Units, Leaves], Leaves]
    max_sparsity: float = 1.0
    at_least: int = 0
    multiple: int = 1


def unstructured(at_least: int = 0) -> Granularity:
    """Every weight is a unit of its own; each leaf keeps `at_least`, whatever the sparsity."""
    return within_leaves(
        "unstructured",
        lambda path, leaf: leaf.reshape(1, -1, 1),
        lambda path, weights, shape: weights.reshape(shape),
        at_least=at_least,
    )


GRANULARITIES: dict[str, Callable[[core.Graph], Granularity]] = {
    "unstructured": lambda graph: unstructured(),
}
"""Every granularity by name, for a graph; open to users."""


def within_leaves(
    name: str,
    arrange: Callable[[str, jax.Array], jax.Array],
    restore: Callable[[str, jax.Array, tuple[int, ...]], jax.Array],
    reduce: str = "sum",
    at_least: int = 0,
    **attributes: Any,
) -> Granularity:
    """Units of a leaf: arrange(path, leaf) is (rows, n, a unit); restore(path, it, shape)."""
    core.check_choice("reduce", reduce, REDUCTIONS)
    core.check_integer("at_least", at_least, 0)

    def units(path, leaf):
        return REDUCTIONS[reduce](arrange(path, leaf))

    def mask(path, kept, shape):
        size = math.prod(shape) // kept.size
        xp = kept.__array_namespace__()
        return restore(path, xp.broadcast_to(kept[..., None], (*kept.shape, size)), shape)

    return Granularity(
        name,
        lambda leaves: {p: p for p, leaf in leaves.items() if not core.is_masked_node(leaf)},
        split=lambda leaves, names: {path: units(path, leaves[path]) for path in names},
        merge=lambda kept, leaves: {p: mask(p, x, leaves[p].shape) for p, x in kept.items()},
        at_least=at_least,
        **attributes,
    )
