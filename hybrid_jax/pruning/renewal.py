"""What every transformation that changes its masks does: renew them when due, land on them.

An optimizer is known by its `init` and `update` alone. Its state per parameter is found by
`optax.tree_map_params`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hybrid_jax import core
from hybrid_jax.pruning.masking import apply_masks


def check_inner(inner: Any) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` as a transformation that takes extra arguments.

    Raises:
      ValueError: If it has no `init` and `update`.
    """
    if not (callable(getattr(inner, "init", None)) and callable(getattr(inner, "update", None))):
        raise ValueError(f"inner must be an optax transformation, got {inner!r}")
    return optax.with_extra_args_support(inner)


def check_params(params: Any) -> None:
    """Raises ValueError if `update` is called without the parameters."""
    if params is None:
        raise ValueError("update must be called with params, got None")


def onto_masks(updates: Any, masks: Any, params: Any) -> Any:
    """Replaces the updates of removed weights by −w, in the dtype of w so that w − w is exact."""
    check_params(params)

    def land(path, mask, update, param):
        del path
        if core.is_masked_node(mask):
            return update
        return jnp.where(mask, update.astype(param.dtype), -param)

    return core.map_with_path(land, masks, updates, params)


def renew(
    due: jax.Array,
    new_masks: Callable[[Any], Any],
    masks: Any,
    inner: optax.GradientTransformation,
    inner_state: Any,
    updates: Any,
    params: Any,
) -> tuple[Any, Any, Any]:
    """Changes the masks if `due`, and lands on them.

    A weight that comes back starts at exactly zero, and its entries in the state of `inner`, like
    those of a weight that leaves, at what `inner.init` gives them. If not due, the step costs the
    landing alone, except under `jax.vmap`, which runs both branches of a condition.

    Args:
      due: () bool.
      new_masks: `new_masks(candidate) -> masks`, from the parameters that the updates lead to on
        the old masks.
      masks: The masks so far.
      inner: The optimizer that made `updates`.
      inner_state: Its state.
      updates: Its updates.
      params: The parameters before them.

    Returns:
      (updates that land on the masks, masks, state of `inner`).
    """

    def renewed():
        candidate = apply_masks(optax.apply_updates(params, updates), masks)
        new = new_masks(candidate)
        stays = jax.tree.map(jnp.logical_and, masks, new)
        return new, stays, _refreshed(inner, inner_state, stays, apply_masks(candidate, stays))

    new, stays, inner_state = jax.lax.cond(due, renewed, lambda: (masks, masks, inner_state))
    return onto_masks(updates, stays, params), new, inner_state


def _refreshed(inner: optax.GradientTransformation, state: Any, stays: Any, params: Any) -> Any:
    """Sets what belongs to a weight that does not stay to what `inner.init` gives it.

    Entries without a shape like their parameter's (factored moments) are left as they are.
    """

    def resets(entry, stay):
        known = not core.is_masked_node(entry) and not core.is_masked_node(stay)
        return ~stay if known and entry.shape == stay.shape else False

    try:
        reset = optax.tree_map_params(
            inner,
            resets,
            state,
            stays,
            transform_non_params=lambda _: False,
            is_leaf=core.is_masked_node,
        )
    except Exception as error:
        raise ValueError(
            "inner must have an init that takes any pytree, as optax.tree_map_params asks, got "
            f"{type(error).__name__}: {error}"
        ) from error
    return jax.tree.map(
        lambda r, old, new: old if r is False else jnp.where(r, new, old),
        reset,
        state,
        inner.init(params),
    )
