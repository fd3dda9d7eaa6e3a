"""Channels: scores of whole coupled groups, and which channels are kept."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core
from hybrid_jax.pruning.selection import check_sparsity, is_traced, removed_count

_REDUCTIONS = {
    "sum": lambda entries: jnp.sum(entries, axis=1),
    "mean": lambda entries: jnp.mean(entries, axis=1),
    "max": lambda entries: jnp.max(entries, axis=1),
    "l2": lambda entries: jnp.sqrt(jnp.sum(jnp.square(entries), axis=1)),
}
_NORMALIZATIONS = {
    "none": lambda scores: jnp.ones((), scores.dtype),
    "mean": jnp.mean,
    "max": jnp.max,
}


def group_scores(
    scores: Any, groups: Sequence[Any], reduce: str = "sum", normalize: str = "mean"
) -> dict[str, jax.Array]:
    """Scores each channel by all the weights that leave with it.

    For a unit of a coupled group these are, in every member, the entries at its indices on the
    member's axis: the filters that make it, the normalization that scales it, the weights that
    read it. Members without scores (biases, say) do not count. The group's scores are divided by
    their mean, so that groups of different fan-in and size compare under global allocation. G.
    Fang et al., DepGraph: Towards Any Structural Pruning (arXiv 2301.12900).

    Args:
      scores: Pytree of scores that a criterion gives.
      groups: The coupled groups, `core.trace(...).groups`.
      reduce: 'sum', 'mean', 'max' or 'l2' over the entries of a unit.
      normalize: 'mean' or 'max' of the group's n scores to divide by, or 'none'.

    Returns:
      {group name: (n,) float32}.

    Raises:
      ValueError: If there is no group, a group has no member with scores, a member's path is not
        in `scores`, `reduce` or `normalize` is unknown, or scores are not finite (unless traced).

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from hybrid_jax import core
      >>> params = {'a': jnp.ones((1, 2)), 'b': jnp.array([[1.0], [5.0]])}
      >>> index = np.array([[0], [1]])
      >>> hidden = core.Group('a', 2, (core.Member('a', 1, index), core.Member('b', 0, index)))
      >>> group_scores(params, [hidden])  # (1 + 1, 1 + 5) / 4
      {'a': Array([0.5, 1.5], dtype=float32)}
    """
    core.check_choice("reduce", reduce, _REDUCTIONS)
    core.check_choice("normalize", normalize, _NORMALIZATIONS)
    if not groups:
        raise ValueError("groups must hold a coupled group to prune, got none")
    if not is_traced(scores):
        core.check_finite("scores", scores)
    flat = core.flatten_paths(scores)

    def score(group):
        entries = [_unit_entries(flat, member) for member in group.members]
        entries = [entry for entry in entries if entry is not None]
        if not entries:
            raise ValueError(
                f"scores must cover a member of group {group.name!r}, got none of: "
                f"{', '.join(member.path for member in group.members)}"
            )
        reduced = _REDUCTIONS[reduce](jnp.concatenate(entries, axis=1))
        size = _NORMALIZATIONS[normalize](reduced)
        return reduced / jnp.where(size > 0, size, 1.0)

    return {group.name: score(group) for group in groups}


def keep_channels(
    scores: dict[str, jax.Array],
    sparsity: float | jax.Array,
    allocation: str = "uniform",
    multiple: int = 1,
    exempt: Sequence[str] = (),
) -> dict[str, jax.Array]:
    """Chooses the channels to keep, with exact counts.

    With `allocation='uniform'` a group of n channels loses floor(sparsity · n + ½), with
    'global' all groups together lose that of all their channels. The highest scores stay; of
    equal scores the lower index, and the group first by name. Widths are whole multiples of
    `multiple`, or n itself; a group is kept or removed in such steps, best channels first, to
    the nearest count (half a step up), and always keeps its first step. Uniform widths depend on
    no score: experts cut by different criteria have equal shapes, and stack.

    Args:
      scores: {group name: (n,) scores}, of `group_scores`.
      sparsity: () fraction of channels removed, in [0, 1], maybe traced.
      allocation: 'uniform' or 'global'.
      multiple: Step of the widths, from 1.
      exempt: Regular expressions on whole group names; those groups keep every channel, and do
        not count.

    Returns:
      {group name: (n,) bool}, True where kept.

    Raises:
      ValueError: If an argument is outside its bounds, an exempt pattern matches nothing, no
        group is left, or scores are not finite (unless traced).

    Example:
      >>> import jax.numpy as jnp
      >>> scores = {'a': jnp.array([1.0, 3.0, 2.0, 4.0]), 'b': jnp.array([9.0, 8.0])}
      >>> {name: keep.tolist() for name, keep in keep_channels(scores, 0.5).items()}
      {'a': [False, True, False, True], 'b': [True, False]}
      >>> {name: int(keep.sum()) for name, keep in keep_channels(scores, 0.5, 'global').items()}
      {'a': 1, 'b': 2}
    """
    check_sparsity(sparsity)
    core.check_choice("allocation", allocation, ("uniform", "global"))
    core.check_integer("multiple", multiple, 1)
    if not is_traced(scores):
        core.check_finite("scores", scores)
    left_out = core.match_rules([(pattern, True) for pattern in exempt], scores, default=False)
    # By name, the order in which `jit` hands a dict on: equal scores fall alike in both.
    chosen = {n: jnp.asarray(scores[n], jnp.float32) for n in sorted(scores) if not left_out[n]}
    if not chosen:
        raise ValueError("scores must hold a group to prune, got none that is not exempt")
    if allocation == "uniform":
        kept = [_keep_steps((s,), sparsity, multiple)[0] for s in chosen.values()]
    else:
        kept = _keep_steps(tuple(chosen.values()), sparsity, multiple)
    kept = dict(zip(chosen, kept, strict=True))
    return {name: kept.get(name, jnp.ones(np.shape(s), bool)) for name, s in scores.items()}


def _unit_entries(flat: dict[str, Any], member: Any) -> jax.Array | None:
    """Scores of each unit in one member as (n, entries), or None where it has none."""
    if member.path not in flat:
        raise ValueError(f"scores must have the paths of the groups, got none at {member.path!r}")
    scores = flat[member.path]
    if core.is_masked_node(scores):
        return None
    units = jnp.moveaxis(jnp.asarray(scores, jnp.float32), member.axis, 0)[member.index]
    return units.reshape(len(member.index), -1)


@functools.partial(jax.jit, static_argnames="multiple")
def _keep_steps(
    groups: tuple[jax.Array, ...], sparsity: float | jax.Array, multiple: int
) -> list[jax.Array]:
    """Ranks steps of `multiple` channels over the groups, and keeps the best that fit."""
    total = sum(scores.size for scores in groups)
    kept = total - removed_count(sparsity, total)

    sizes = [np.bincount(np.arange(scores.size) // multiple) for scores in groups]
    first = np.concatenate([np.arange(len(size)) == 0 for size in sizes])
    means = jnp.concatenate([_step_means(s, n) for s, n in zip(groups, sizes, strict=True)])
    order = jnp.argsort(-jnp.where(first, jnp.inf, means), stable=True)
    size = jnp.asarray(np.concatenate(sizes), jnp.int32)[order]
    before = jnp.cumsum(size) - size
    stays = (2 * (kept - before) >= size) | jnp.asarray(first)[order]

    stays = jnp.zeros_like(stays).at[order].set(stays)
    parts = jnp.split(stays, np.cumsum([len(size) for size in sizes])[:-1])
    ranks = [jnp.argsort(jnp.argsort(-scores, stable=True)) for scores in groups]
    return [part[rank // multiple] for part, rank in zip(parts, ranks, strict=True)]


def _step_means(scores: jax.Array, sizes: np.ndarray) -> jax.Array:
    """Mean score of each step of the channels, best first."""
    falling = jnp.sort(scores, descending=True)
    step = np.repeat(np.arange(len(sizes)), sizes)
    means = jax.ops.segment_sum(falling, step, len(sizes)) / jnp.asarray(sizes, scores.dtype)
    # Rounding must not lift a later step of equal scores above an earlier one.
    return jax.lax.cummin(means)
