"""Masks from scores, and onto parameters."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hybrid_jax import core
from hybrid_jax.pruning import allocation as allocations
from hybrid_jax.pruning import granularity as granularities
from hybrid_jax.pruning.selection import check_sparsity, is_traced


def masks(
    scores: Any,
    sparsity: float | jax.Array | None = None,
    granularity: granularities.Granularity | None = None,
    allocation: allocations.Allocation | None = None,
    exempt: Sequence[str] = (),
) -> Any:
    """Marks which weights are kept, with exact counts.

    The lowest scores leave; of equal scores the lower index is kept. Compiled and eager masks
    are the same. `sparsity` may be traced, so that one compilation serves a sweep, or under
    `jax.vmap` a stack of experts.

    Args:
      scores: Pytree of floating scores with `optax.MaskedNode()` where nothing is pruned: what a
        criterion gives.
      sparsity: () fraction removed, in [0, 1]; None for the largest that `granularity` allows.
      granularity: `unstructured()` (default) or `n_m(n, m)`.
      allocation: `uniform()` (default), `erk()` or `global_()`.
      exempt: Regular expressions on whole paths of leaves to leave alone.

    Returns:
      Pytree of bool like `scores`, True where kept; `optax.MaskedNode()` where exempt.

    Raises:
      ValueError: If there is nothing to prune; if `sparsity` is outside [0, 1] or more than
        `granularity` allows; if scores are not finite (unless traced); if an exempt pattern
        matches nothing; if granularity and allocation, or a leaf, do not go together.

    Example:
      >>> import jax.numpy as jnp
      >>> masks({'w': jnp.array([[4.0, 1.0], [3.0, 2.0]])}, 0.25)
      {'w': Array([[ True, False],
             [ True,  True]], dtype=bool)}
    """
    granularity = granularities.unstructured() if granularity is None else granularity
    allocation = allocations.uniform() if allocation is None else allocation
    most = granularity.max_sparsity
    sparsity = check_sparsity(most if sparsity is None else sparsity, most=most)
    sparsity = jnp.minimum(jnp.asarray(sparsity, jnp.float32), jnp.float32(most))
    if not is_traced(scores):
        core.check_finite("scores", scores)

    flat = {p: s for p, s in core.flatten_paths(scores).items() if not core.is_masked_node(s)}
    left_out = core.match_rules([(p, True) for p in exempt], flat, default=False)
    flat = {path: leaf for path, leaf in flat.items() if not left_out[path]}
    if not flat:
        raise ValueError("scores must have a leaf to prune, got none that is not exempt")
    flat = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in flat.items()}
    units = {path: granularity.split(path, leaf) for path, leaf in flat.items()}
    kept = allocation(units, {path: leaf.shape for path, leaf in flat.items()}, sparsity)

    def mask(path, leaf):
        if path not in kept:
            return optax.MaskedNode()
        return granularity.merge(path, kept[path], leaf.shape)

    return core.map_with_path(mask, scores)


def apply_masks(params: Any, masks: Any) -> Any:
    """Sets to exactly zero what the masks remove.

    Args:
      params: Pytree of parameters, or anything shaped like them (averages, moments).
      masks: Pytree of bool, True where kept, with `optax.MaskedNode()` where nothing is pruned.

    Returns:
      Pytree like `params`; what is NaN or infinite under the mask is zero too.

    Raises:
      ValueError: If a mask has another shape than its parameter, or another structure.

    Example:
      >>> import jax.numpy as jnp
      >>> apply_masks({'w': jnp.array([1.0, 2.0])}, {'w': jnp.array([True, False])})
      {'w': Array([1., 0.], dtype=float32)}
    """
    check_masks(params, masks)

    def apply(path, mask, leaf):
        del path
        return leaf if core.is_masked_node(mask) else jnp.where(mask, leaf, jnp.zeros_like(leaf))

    return core.map_with_path(apply, masks, params)


def check_masks(params: Any, masks: Any) -> None:
    """Raises ValueError unless every mask is bool and of its parameter's path and shape."""
    leaves, flat = core.flatten_paths(params), core.flatten_paths(masks)
    for path in [*leaves, *flat]:
        if path not in flat or path not in leaves:
            raise ValueError(
                f"masks must have the structure of params, got {path!r} in one of them only"
            )
        mask, leaf = flat[path], leaves[path]
        if core.is_masked_node(mask):
            continue
        if mask.shape != leaf.shape or mask.dtype != jnp.bool_:
            raise ValueError(
                f"masks must have bool{list(leaf.shape)} at {path!r}, "
                f"got {mask.dtype}{list(mask.shape)}"
            )
