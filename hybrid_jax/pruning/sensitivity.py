"""Sensitivity: the loss with one layer, or one group of channels, pruned and all others whole."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hybrid_jax import core
from hybrid_jax.pruning.allocation import keep_units, uniform
from hybrid_jax.pruning.granularity import Granularity, unstructured
from hybrid_jax.pruning.masking import apply_masks, check_kind, check_scores
from hybrid_jax.pruning.selection import check_sparsity, rankable

# One object for all calls: what is compiled is found again by it.
_WEIGHTS = unstructured()


def sensitivity(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    scores: Any,
    sparsities: Sequence[float] | jax.Array,
    *args: Any,
    granularity: Granularity | None = None,
    batch_size: int = 1,
) -> dict[str, jax.Array]:
    """Loss for each leaf, or each group of channels, pruned alone to each of S sparsities.

    With `channels(groups)` a group's channels are masked in all they touch: what the shrunk network
    computes. Compiled once, for all names and sparsities, and not again as long as `loss_fn` and
    `granularity` are the same objects. H. Li et al., Pruning Filters for Efficient ConvNets (arXiv
    1608.08710), section 3.2.

    loss_fn(params, *args) -> () is a loss or any other measure; `scores` and `granularity` are as
    for `masks`. `batch_size` evaluations run at once, under `vmap`; one at a time is fastest on a
    CPU.

    Returns:
      {path of a leaf, or name of a group: (S,) losses}.

    Example:
      >>> from hybrid_jax.pruning import channels, magnitude
      >>> params = {'a': jnp.array([[1.0, 2.0]]), 'b': jnp.array([[3.0], [4.0]])}
      >>> fn = lambda params, x: jax.nn.relu(x @ params['a']) @ params['b']
      >>> loss, x = lambda params, x: jnp.sum(fn(params, x)), jnp.ones((1, 1))
      >>> graph = core.trace(fn, params, x)
      >>> scores = magnitude(graph.kernels, params)
      >>> hidden = channels(graph.groups)
      >>> sensitivity(loss, params, scores, [0.5], x, granularity=hidden)
      {'a': Array([8.], dtype=float32)}
    """
    granularity = _WEIGHTS if granularity is None else granularity
    check_kind("granularity", granularity, Granularity, "unstructured()")
    core.check_integer("batch_size", batch_size, 1)
    core.check_same_paths("scores", scores, "params", params)
    leaves = check_scores(scores)
    names = tuple(granularity.paths(leaves))
    if not names:
        raise ValueError("scores must have a leaf to prune, got none")
    most = granularity.max_sparsity
    if not core.is_traced(sparsities):
        sparsities = [check_sparsity(s, "sparsities", most) for s in sparsities]
    sparsities = jnp.minimum(jnp.asarray(sparsities, jnp.float32), jnp.float32(most))
    if sparsities.ndim != 1 or not sparsities.size:
        raise ValueError(f"sparsities must have shape (S,), got {sparsities.shape}")
    # Rows of a sparsity for each name, one of which is not zero.
    rows = jnp.eye(len(names))[:, None] * sparsities[None, :, None]
    rows, count = rows.reshape(-1, len(names)), len(names) * len(sparsities)
    size = min(batch_size, count)
    rows = jnp.pad(rows, ((0, -count % size), (0, 0)))
    starts = range(0, count, size)
    parts = [jax.lax.dynamic_slice_in_dim(rows, start, size) for start in starts]
    losses = [_losses(loss_fn, granularity, names, params, leaves, args, part) for part in parts]
    losses = jnp.concatenate(losses)[:count].reshape(len(names), -1)
    found = dict(zip(names, losses, strict=True))
    if not core.is_traced(losses):
        core.check_finite("losses", found)
    return found


@functools.partial(jax.jit, static_argnames=("loss_fn", "granularity", "names"))
def _losses(loss_fn, granularity, names, params, leaves, args, rows):
    """The loss for each of (R, L) rows, of a sparsity for each of L names: (R,) float32."""
    units = granularity.split(leaves, names)

    def keep(name, sparsity):
        own = {name: rankable(units[name])}
        return jax.lax.cond(
            sparsity > 0,
            lambda: keep_units(
                own, {}, sparsity, uniform(), granularity.at_least, granularity.multiple
            )[name],
            lambda: jnp.ones(own[name].shape, bool),
        )

    def loss(row):
        kept = {name: keep(name, sparsity) for name, sparsity in zip(names, row, strict=True)}
        merged = granularity.merge(kept, leaves)
        masks = core.map_with_path(lambda path, _: merged.get(path, optax.MaskedNode()), params)
        value = jnp.asarray(loss_fn(apply_masks(params, masks), *args))
        if value.shape:
            raise ValueError(f"loss_fn must return a scalar, got shape {value.shape}")
        return value.astype(jnp.float32)

    # Without `vmap` a mask that nothing is asked of is not computed.
    return loss(rows[0])[None] if len(rows) == 1 else jax.vmap(loss)(rows)
