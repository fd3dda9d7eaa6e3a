"""What every transformation that changes its masks does: renew them when due, land on them.

An optimizer is known by its `init` and `update` alone. Its state per parameter is found by
`core.map_state`; what of it is a copy or an average of the parameters, by what `init` makes of
their values.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core as jex

from hybrid_jax import core
from hybrid_jax.pruning.masking import apply_masks


def check_inner(inner: Any) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` as a transformation that takes extra arguments."""
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

    def land(mask, update, param):
        return jnp.where(mask, update.astype(param.dtype), -param)

    return core.map_masked(land, masks, updates, params)


def renew(
    due: jax.Array,
    new_masks: Callable[[Any], Any],
    masks: Any,
    inner: optax.GradientTransformation,
    inner_state: Any,
    updates: Any,
    params: Any,
) -> tuple[Any, Any, Any]:
    """Changes the masks if `due`, and lands on them, with all parameters that `inner` holds.

    A weight that comes back starts at exactly zero, and its entries in the state of `inner`, like
    those of a weight that leaves, at what `inner.init` gives them. `new_masks(candidate) -> masks`
    are of the parameters that the `updates`, made by `inner`, lead to on the old masks. Returns
    updates that land on the masks, the masks, the state of `inner`.
    """

    def renewed():
        candidate = apply_masks(optax.apply_updates(params, updates), masks)
        new = new_masks(candidate)
        stays = jax.tree.map(jnp.logical_and, masks, new)
        return new, stays, _refreshed(inner, inner_state, stays, apply_masks(candidate, stays))

    inner_state, _ = split_copies(inner, inner_state, masks, params)
    new, stays, inner_state = jax.lax.cond(due, renewed, lambda: (masks, masks, inner_state))
    return onto_masks(updates, stays, params), new, inner_state


def split_copies(
    inner: optax.GradientTransformation, state: Any, masks: Any, params: Any
) -> tuple[Any, Any]:
    """Puts on the masks what a state holds of the parameters themselves (averages, slow weights).

    Beside it are its leaves as they were, `MaskedNode` for those that stay; () if all do.
    """
    copies = _copies(inner, params)
    if not any(copies):
        return state, ()
    old, structure = jax.tree.flatten(state)
    found = jax.tree.leaves(_masks_in(inner, state, masks))
    found = [mask if copy else False for copy, mask in zip(copies, found, strict=True)]
    held = [x if m is False else jnp.where(m, x, jnp.zeros_like(x)) for m, x in zip(found, old)]
    hidden = tuple(optax.MaskedNode() if m is False else x for m, x in zip(found, old))
    return jax.tree.unflatten(structure, held), hidden


def join_copies(state: Any, hidden: tuple[Any, ...]) -> Any:
    """The state that `split_copies` split."""
    leaves, structure = jax.tree.flatten(state)
    joined = [x if core.is_masked_node(own) else own for own, x in zip(hidden or leaves, leaves)]
    return jax.tree.unflatten(structure, joined)


def _copies(inner: optax.GradientTransformation, params: Any) -> list[bool]:
    """Of each leaf of the state whether `inner.init` makes it of the parameters' values."""
    jaxpr = jax.make_jaxpr(inner.init)(params).jaxpr
    made = set(jaxpr.invars)

    def depends(atoms):
        return any(not isinstance(atom, jex.Literal) and atom in made for atom in atoms)

    for eqn in jaxpr.eqns:
        if depends(eqn.invars):
            made |= set(eqn.outvars)
    return [depends([atom]) for atom in jaxpr.outvars]


def _masks_in(inner: optax.GradientTransformation, state: Any, masks: Any) -> Any:
    """Like the state, the mask of each entry of the shape of a masked parameter, or False."""

    def own(entry, mask):
        if core.is_masked_node(entry):
            return entry
        return mask if not core.is_masked_node(mask) and entry.shape == mask.shape else False

    return core.map_state(inner, own, state, masks, others=lambda _: False)


def _refreshed(inner: optax.GradientTransformation, state: Any, stays: Any, params: Any) -> Any:
    """Sets what belongs to a weight that does not stay to what `inner.init` gives it."""
    return jax.tree.map(
        lambda stay, old, new: old if stay is False else jnp.where(stay, old, new),
        _masks_in(inner, state, stays),
        state,
        inner.init(params),
    )
