"""Channels: scores of whole coupled groups, and which channels are kept."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hybrid_jax import core
from hybrid_jax.pruning.allocation import Allocation, keep_units, uniform
from hybrid_jax.pruning.granularity import GRANULARITIES, REDUCTIONS, Granularity
from hybrid_jax.pruning.masking import check_kind
from hybrid_jax.pruning.selection import check_sparsity, rankable

_NORMALIZATIONS = {
    "none": lambda scores, finite: np.float32(1.0),
    "mean": lambda scores, finite: scores.sum(where=finite) / finite.sum(dtype=scores.dtype),
    "max": lambda scores, finite: scores.max(where=finite, initial=0.0),
}


def channels(
    groups: Sequence[core.Group],
    reduce: str = "sum",
    normalize: str = "mean",
    multiple: int = 1,
    at_least: int = 1,
) -> Granularity:
    """Coupled channels leave as a whole, with every parameter that they touch.

    `masks(scores, sparsity, channels(groups), global_())` is
    `expand(keep_channels(group_scores(scores, groups), sparsity, global_()), groups, params)`, for
    any allocation, and in `prune_by_schedule`. Each of the `groups` of `core.trace(...)` is a row
    and keeps `at_least` channels whatever the sparsity: one that loses all cuts the network in two.
    `reduce` and `normalize` are as for `group_scores`, `multiple` as for `keep_channels`.
    """
    if isinstance(groups, core.Graph):
        raise ValueError("groups must be the groups of a graph, graph.groups, got the graph")
    _check_scoring(groups, reduce, normalize)
    core.check_integer("multiple", multiple, 1)
    core.check_integer("at_least", at_least, 0)
    # By name, as in `keep_channels`: equal scores fall alike in both.
    by_name = {group.name: group for group in sorted(groups, key=lambda group: group.name)}

    def split(leaves, names):
        found = _group_scores(leaves, [by_name[name] for name in names], reduce, normalize)
        return {name: scores[None] for name, scores in found.items()}

    def merge(kept, leaves):
        del leaves
        keep = {name: rows[0] for name, rows in kept.items()}
        touched = {m.path: m.shape for name in keep for m in by_name[name].members}
        params = {p: jax.ShapeDtypeStruct(shape, np.float32) for p, shape in touched.items()}
        return core.expand(keep, groups, params)

    return Granularity(
        "channels",
        lambda leaves: {name: _maker(group).path for name, group in by_name.items()},
        split,
        merge,
        at_least=at_least,
        multiple=multiple,
    )


GRANULARITIES["channels"] = lambda graph: channels(graph.groups)


def group_scores(
    scores: Any, groups: Sequence[Any], reduce: str = "sum", normalize: str = "mean"
) -> dict[str, jax.Array]:
    """Scores each channel, {group name: (n,)}, by all the weights that leave with it.

    In every member of a group these are the entries at the unit's indices: the filters that make
    it, the normalization that scales it, the weights that read it. Members without scores (biases,
    say) do not count. Divided by the group's mean, scores of groups of different fan-in and size
    compare. G. Fang et al., DepGraph: Towards Any Structural Pruning (arXiv 2301.12900).

    `reduce` is 'sum', 'mean', 'max' or 'l2' over the entries of a unit, `normalize` 'mean' or 'max'
    of the group's n scores to divide by, or 'none'.
    """
    _check_scoring(groups, reduce, normalize)
    if not core.is_traced(scores):
        core.check_finite("scores", scores)
    xp = core.namespace(scores)
    leaves = {
        path: leaf if core.is_masked_node(leaf) else xp.asarray(leaf, np.float32)
        for path, leaf in core.flatten_paths(scores).items()
    }
    return core.on_device(_group_scores(leaves, groups, reduce, normalize))


def keep_channels(
    scores: dict[str, jax.Array],
    sparsity: float | jax.Array,
    allocation: Allocation | None = None,
    multiple: int = 1,
    exempt: Sequence[str] = (),
) -> dict[str, jax.Array]:
    """Chooses the channels to keep of each group, {name: (n,) bool}, with exact counts.

    The choice that `masks` makes with `channels`, from `scores` {group name: (n,)} made by other
    means. With `uniform()` a group of n channels loses floor(sparsity · n + ½), with `global_()`
    all together lose that of all their channels. Widths are whole multiples of `multiple`, or n
    itself: a group is kept in such steps, best channels first, to the nearest count (half a step
    up), and always keeps its first. Of equal scores the lower index stays, and the group first by
    name. Uniform widths depend on no score: experts cut by different criteria stack. Groups whose
    whole name matches one of `exempt` keep every channel, and do not count.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = {'a': jnp.array([1.0, 3.0, 2.0, 4.0]), 'b': jnp.array([9.0, 8.0])}
      >>> {name: keep.tolist() for name, keep in keep_channels(scores, 0.5).items()}
      {'a': [False, True, False, True], 'b': [True, False]}
    """
    check_sparsity(sparsity)
    allocation = uniform() if allocation is None else allocation
    check_kind("allocation", allocation, Allocation, "uniform()")
    core.check_integer("multiple", multiple, 1)
    if not core.is_traced(scores):
        core.check_finite("scores", scores)
    left_out = core.match_rules([(pattern, True) for pattern in exempt], scores, default=False)
    xp = core.namespace(scores, sparsity)
    # By name, the order in which `jit` hands a dict on: equal scores fall alike in both.
    units = {n: rankable(xp.asarray(scores[n]))[None] for n in sorted(scores) if not left_out[n]}
    if not units:
        raise ValueError("scores must hold a group to prune, got none that is not exempt")
    paths = {n: n.partition("#")[0] for n in units}  # of the kernels that groups are named after
    kept = keep_units(units, paths, sparsity, allocation, 1, multiple)
    whole = {n: np.ones(np.shape(own), bool) for n, own in scores.items() if left_out[n]}
    return core.on_device({n: whole[n] if n in whole else kept[n][0] for n in scores})


def _check_scoring(groups: Sequence[core.Group], reduce: str, normalize: str) -> None:
    core.check_choice("reduce", reduce, REDUCTIONS)
    core.check_choice("normalize", normalize, _NORMALIZATIONS)
    if not groups:
        raise ValueError("groups must hold a coupled group to prune, got none")


def _group_scores(
    leaves: dict[str, Any], groups: Sequence[core.Group], reduce: str, normalize: str
) -> dict[str, jax.Array]:
    """{group name: (n,)} scores from {path: scores in float32}."""

    @np.errstate(over="ignore", invalid="ignore")
    def score(group):
        entries = [_unit_entries(leaves, member) for member in group.members]
        entries = [entry for entry in entries if entry is not None]
        if not entries:
            raise ValueError(
                f"scores must cover a member of group {group.name!r}, got none of: "
                f"{', '.join(member.path for member in group.members)}"
            )
        xp = entries[0].__array_namespace__()
        reduced = REDUCTIONS[reduce](xp.concatenate(entries, axis=1))
        size = _NORMALIZATIONS[normalize](reduced, xp.isfinite(reduced))
        return reduced / xp.where(size > 0, size, np.float32(1.0))

    return {group.name: score(group) for group in groups}


def _unit_entries(leaves: dict[str, Any], member: core.Member) -> jax.Array | None:
    """Scores of each unit in one member as (n, entries), or None where it has none."""
    if member.path not in leaves:
        raise ValueError(f"scores must have the paths of the groups, got none at {member.path!r}")
    scores = leaves[member.path]
    if core.is_masked_node(scores):
        return None
    if scores.shape != member.shape:
        raise ValueError(
            f"scores must have shape {member.shape} at {member.path!r}, got {scores.shape}"
        )
    units = scores.__array_namespace__().moveaxis(scores, member.axis, 0)[member.index]
    return units.reshape(len(member.index), -1)


def _maker(group: core.Group) -> core.Member:
    """The member that the group is named after: the kernel that makes its channels."""
    named = (m for m in group.members if f"{group.name}#".startswith(f"{m.path}#"))
    return next(named, group.members[0])
