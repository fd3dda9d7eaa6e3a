"""Masks from scores, and onto parameters."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_jax import core
from hybrid_jax.pruning.allocation import Allocation, keep_units, uniform
from hybrid_jax.pruning.granularity import Granularity, unstructured
from hybrid_jax.pruning.selection import check_sparsity, rankable


def masks(
    scores: Any,
    sparsity: float | jax.Array | None = None,
    granularity: Granularity | None = None,
    allocation: Allocation | None = None,
    exempt: Sequence[str] = (),
    previous: Any = None,
) -> Any:
    """Marks which weights are kept, with exact counts.

    The units of lowest score leave; of equal scores the lower index is kept. Compiled and eager
    masks are the same. `scores` are floats, with `optax.MaskedNode()` where nothing is pruned; of
    traced ones NaN and −∞ rank lowest, ∞ highest. `sparsity`, () the fraction of the units removed,
    may be traced, so that one compilation serves a sweep or, under `jax.vmap`, a stack of experts;
    None is the most that the granularity allows. `granularity` is `unstructured()`, or
    `channels(groups)`, which masks all that leaves with a channel, biases too; `allocation` is
    `uniform()`, `erk(kernels)` or `global_()`. What matches one of `exempt`, regular expressions on
    whole paths of leaves, or names of groups with `channels`, is left alone and does not count. A
    unit that `previous` masks remove ranks below all others.

    Returns:
      Pytree of bool like the parameters, True where kept, with `MaskedNode` as in `scores`.

    Example:
      >>> import jax.numpy as jnp
      >>> masks({'w': jnp.array([[4.0, 1.0], [3.0, 2.0]])}, 0.25)
      {'w': Array([[ True, False],
             [ True,  True]], dtype=bool)}
    """
    granularity = unstructured() if granularity is None else granularity
    allocation = uniform() if allocation is None else allocation
    check_kind("granularity", granularity, Granularity, "unstructured()")
    check_kind("allocation", allocation, Allocation, "uniform()")
    most = granularity.max_sparsity
    if most < 1 and not allocation.by_row:
        raise ValueError(
            f"allocation must be uniform() with {granularity.name}, of which every row loses "
            f"equally many, got {allocation.name}()"
        )
    sparsity = check_sparsity(most if sparsity is None else sparsity, most=most)
    xp = core.namespace(scores, sparsity, previous)
    sparsity = xp.minimum(xp.asarray(sparsity, np.float32), np.float32(most))

    leaves = check_scores(scores, xp)
    paths = granularity.paths(leaves)
    left_out = core.match_rules([(p, True) for p in exempt], paths, default=False)
    paths = {name: path for name, path in paths.items() if not left_out[name]}
    if not paths:
        raise ValueError("scores must have a leaf to prune, got none that is not exempt")
    units = {name: rankable(rows) for name, rows in granularity.split(leaves, paths).items()}
    if previous is not None:
        alive = granularity.split(_kept_before(previous, leaves, xp), paths)
        lowest = np.float32(-np.inf)
        units = {name: xp.where(alive[name] > 0, rows, lowest) for name, rows in units.items()}
    kept = keep_units(
        units, paths, sparsity, allocation, granularity.at_least, granularity.multiple
    )
    merged = core.on_device(granularity.merge(kept, leaves))
    return core.map_with_path(lambda path, _: merged.get(path, optax.MaskedNode()), scores)


def apply_masks(params: Any, masks: Any) -> Any:
    """Sets what the masks remove to zero, NaN too, of parameters or anything shaped like them."""
    core.check_masks(params, masks)
    xp = core.namespace(params, masks)

    def apply(mask, leaf):
        return core.on_device(xp.where(mask, leaf, xp.zeros_like(leaf)))

    return core.map_masked(apply, masks, params)


def check_kind(name: str, value: Any, kind: type, example: str) -> None:
    """Raises TypeError unless `value` is a `kind`, of which `example` is one."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a pruning.{kind.__name__} such as {example}, got {value}")


def check_scores(scores: Any, xp: Any = jnp) -> dict[str, Any]:
    """Returns {path: scores in float32 as arrays of `xp`, or `MaskedNode`}."""
    if not core.is_traced(scores):
        core.check_finite("scores", scores)
    leaves = core.flatten_paths(scores)
    for path, leaf in leaves.items():
        if core.is_masked_node(leaf):
            continue
        dtype, shape = jnp.result_type(leaf), np.shape(leaf)
        if not jnp.issubdtype(dtype, jnp.floating) or 0 in shape:
            raise ValueError(
                f"scores must be floating and not empty, got {dtype}{list(shape)} at {path!r}"
            )
        leaves[path] = xp.asarray(leaf, np.float32)
    return leaves


def _kept_before(previous: Any, leaves: dict[str, Any], xp: Any) -> dict[str, Any]:
    """{path: 1.0 where kept, or `MaskedNode`}: a unit is removed if it has no 1.0."""
    core.check_same_paths("previous", previous, "scores", leaves)
    kept = core.flatten_paths(previous)
    for path, leaf in leaves.items():
        mask, scored = kept[path], not core.is_masked_node(leaf)
        if core.is_masked_node(mask):
            kept[path] = xp.ones_like(leaf) if scored else mask
        elif scored and mask.shape != leaf.shape:
            raise ValueError(f"previous must have shape {leaf.shape} at {path!r}, got {mask.shape}")
        else:
            kept[path] = xp.asarray(mask, np.float32)
    return kept
