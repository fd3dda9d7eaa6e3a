"""Sensitivity: the loss with one layer, or one group of channels, pruned and all others whole."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core
from hybrid_jax.pruning.coupling import keep_channels
from hybrid_jax.pruning.granularity import Granularity
from hybrid_jax.pruning.masking import apply_masks, masks
from hybrid_jax.pruning.selection import check_sparsity, is_traced

Losses = dict[str, jax.Array]


def sensitivity(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    scores: Any,
    sparsities: Sequence[float] | jax.Array,
    *args: Any,
    granularity: Granularity | None = None,
    batch_size: int = 1,
) -> Losses:
    """Loss for each leaf, pruned alone to each of S sparsities.

    Compiled once, for all layers and sparsities, and not again for other sparsities or parameters
    as long as `loss_fn` is the same function. H. Li et al., Pruning Filters for Efficient ConvNets
    (arXiv 1608.08710), section 3.2.

    Args:
      loss_fn: loss_fn(params, *args) -> (), a loss or any other measure, the same for all examples
        in `args`.
      params: Pytree of parameters.
      scores: Pytree of scores like `params` with `optax.MaskedNode()` where nothing is pruned.
      sparsities: (S,) fractions removed, in [0, 1], maybe traced.
      *args: Handed to `loss_fn`: images and labels, say.
      granularity: As for `masks`.
      batch_size: How many evaluations run at once, under `vmap`, each with its own parameters and
        activations. One at a time is fastest on a CPU, where a vmapped convolution is slow.

    Returns:
      {path of a leaf: (S,) losses}, in tree order.

    Raises:
      ValueError: If there is nothing to prune, an argument is out of its bounds or of another
        structure, `loss_fn` gives no scalar, or a loss is not finite (unless traced).

    Example:
      >>> from hybrid_jax.pruning import magnitude
      >>> params = {'a': jnp.array([[1.0, 2.0]]), 'b': jnp.array([[3.0, 4.0]])}
      >>> total = lambda params: sum(jnp.sum(leaf) for leaf in params.values())
      >>> losses = sensitivity(total, params, magnitude(params), [0.0, 0.5, 1.0])
      >>> {path: loss.tolist() for path, loss in losses.items()}
      {'a': [10.0, 9.0, 7.0], 'b': [10.0, 7.0, 3.0]}
    """
    flat = core.flatten_paths(scores)
    names = [path for path, leaf in flat.items() if not core.is_masked_node(leaf)]
    if not names:
        raise ValueError("scores must have a leaf to prune, got none")
    for path in core.flatten_paths(params).keys() ^ flat.keys():
        raise ValueError(f"scores must have the paths of params, got {path!r} in one of them only")
    if not is_traced(scores):
        core.check_finite("scores", scores)
    evaluate = functools.partial(_prune_weights, loss_fn, granularity, params, scores, args)
    most = 1.0 if granularity is None else granularity.max_sparsity
    return _sweep(evaluate, names, sparsities, batch_size, most)


def channel_sensitivity(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    scores: Mapping[str, jax.Array],
    groups: Sequence[core.Group],
    sparsities: Sequence[float] | jax.Array,
    *args: Any,
    multiple: int = 1,
    batch_size: int = 1,
) -> Losses:
    """Loss for each group of channels, removed alone to each of S sparsities.

    As `sensitivity`, with the channels of a group masked in all the parameters they touch: the
    network computes what the shrunk one would.

    Args:
      loss_fn: loss_fn(params, *args) -> ().
      params: Pytree with all that the groups touch (in Linen, the whole variables dict).
      scores: {group name: (n,) scores}, of `group_scores`; only these groups are tried.
      groups: The coupled groups, `core.trace(...).groups`.
      sparsities: (S,) fractions of a group's channels removed, in [0, 1], maybe traced.
      *args: Handed to `loss_fn`.
      multiple: As for `keep_channels`.
      batch_size: As for `sensitivity`.

    Returns:
      {group name: (S,) losses}, in the order of `scores`.

    Raises:
      ValueError: If `scores` is empty or has a group that `groups` has not, an argument is out of
        its bounds, `loss_fn` gives no scalar, or a loss is not finite (unless traced).

    Example:
      >>> from hybrid_jax.pruning import group_scores, magnitude
      >>> fn = lambda params, x: jax.nn.relu(x @ params['a']) @ params['b']
      >>> params = {'a': jnp.array([[1.0, 2.0]]), 'b': jnp.array([[3.0], [4.0]])}
      >>> x = jnp.ones((1, 1))
      >>> groups = core.trace(fn, params, x).groups
      >>> scores = group_scores(magnitude(params), groups)
      >>> loss = lambda params, x: jnp.sum(fn(params, x))
      >>> channel_sensitivity(loss, params, scores, groups, [0.0, 0.5], x)['a'].tolist()
      [11.0, 8.0]
    """
    by_name = {group.name: group for group in groups}
    if not scores:
        raise ValueError("scores must hold a group to prune, got none")
    for name in scores:
        core.check_choice("group of scores", name, by_name)
    if not is_traced(scores):
        core.check_finite("scores", scores)
    chosen = tuple(by_name[name] for name in scores)
    evaluate = functools.partial(
        _remove_channels, loss_fn, chosen, multiple, params, dict(scores), args
    )
    return _sweep(evaluate, list(scores), sparsities, batch_size)


def sensitive(losses: Mapping[str, Any], limit: float) -> tuple[str, ...]:
    r"""Names of the layers that go beyond a loss of `limit`, as patterns for `exempt`.

    Args:
      losses: {name: (S,) losses}, of `sensitivity` or `channel_sensitivity`.
      limit: The most that the loss may be, at every sparsity.

    Raises:
      ValueError: If there are no losses, or all layers go beyond the limit.

    Example:
      >>> sensitive({'conv#2': jnp.array([1.0, 3.0]), 'head': jnp.array([1.0, 1.5])}, limit=2.0)
      ('conv\\#2',)
    """
    if not losses:
        raise ValueError("losses must hold those of a layer, got none")
    beyond = tuple(re.escape(name) for name, own in losses.items() if np.max(own) > limit)
    if len(beyond) == len(losses):
        least = min(float(np.max(own)) for own in losses.values())
        raise ValueError(f"limit must leave a layer to prune: at least {least:g}, got {limit}")
    return beyond


@functools.partial(jax.jit, static_argnames=("loss_fn", "granularity"))
def _prune_weights(loss_fn, granularity, params, scores, args, rows):
    flat = core.flatten_paths(scores)
    prunable = {path: leaf for path, leaf in flat.items() if not core.is_masked_node(leaf)}

    def mask(path, sparsity):
        return jax.lax.cond(
            sparsity > 0,
            lambda: masks({path: prunable[path]}, sparsity, granularity)[path],
            lambda: jnp.ones(prunable[path].shape, bool),
        )

    def loss(row):
        made = {path: mask(path, sparsity) for path, sparsity in zip(prunable, row, strict=True)}
        pruned = apply_masks(params, core.map_with_path(made.get, scores))
        return loss_fn(pruned, *args)

    return _losses(loss, rows)


@functools.partial(jax.jit, static_argnames=("loss_fn", "groups", "multiple"))
def _remove_channels(loss_fn, groups, multiple, params, scores, args, rows):
    def loss(row):
        keep = {}
        for group, sparsity in zip(groups, row, strict=True):
            own = {group.name: scores[group.name]}
            keep |= keep_channels(own, sparsity, multiple=multiple)
        return loss_fn(apply_masks(params, core.expand(keep, groups, params)), *args)

    return _losses(loss, rows)


def _sweep(
    evaluate: Callable[[jax.Array], jax.Array],
    names: Sequence[str],
    sparsities: Sequence[float] | jax.Array,
    batch_size: int,
    most: float = 1.0,
) -> Losses:
    """Evaluates rows of L sparsities, one of which is not zero, `batch_size` rows in a call."""
    core.check_integer("batch_size", batch_size, 1)
    if not is_traced(sparsities):
        sparsities = [check_sparsity(s, "sparsities", most) for s in sparsities]
    sparsities = jnp.asarray(sparsities, jnp.float32)
    if sparsities.ndim != 1 or not sparsities.size:
        raise ValueError(f"sparsities must have shape (S,), got {sparsities.shape}")
    rows = jnp.eye(len(names))[:, None] * sparsities[None, :, None]
    rows, count = rows.reshape(-1, len(names)), len(names) * len(sparsities)
    size = min(batch_size, count)
    rows = jnp.pad(rows, ((0, -count % size), (0, 0)))
    parts = [
        evaluate(jax.lax.dynamic_slice_in_dim(rows, start, size)) for start in range(0, count, size)
    ]
    losses = jnp.concatenate(parts)[:count].reshape(len(names), -1)
    found = dict(zip(names, losses, strict=True))
    if not is_traced(losses):
        core.check_finite("losses", found)
    return found


def _losses(loss: Callable[[jax.Array], jax.Array], rows: jax.Array) -> jax.Array:
    def scalar(row):
        value = jnp.asarray(loss(row))
        if value.shape:
            raise ValueError(f"loss_fn must return a scalar, got shape {value.shape}")
        return value.astype(jnp.float32)

    # Without `vmap` a mask that nothing is asked of is not computed.
    return scalar(rows[0])[None] if len(rows) == 1 else jax.vmap(scalar)(rows)
