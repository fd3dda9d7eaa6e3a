"""Pruning as the last link of an optax chain: plain `optax.apply_updates` lands on the mask."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hybrid_jax import core
from hybrid_jax.pruning.allocation import Allocation
from hybrid_jax.pruning.granularity import Granularity
from hybrid_jax.pruning.masking import apply_masks, check_masks
from hybrid_jax.pruning.masking import masks as make_masks
from hybrid_jax.pruning.schedules import Schedule
from hybrid_jax.pruning.selection import check_sparsity


class HoldMasksState(NamedTuple):
    """State of `hold_masks`.

    Attributes:
      masks: Pytree of bool like the parameters, `optax.MaskedNode()` where nothing is pruned.
    """

    masks: Any


class PruneState(NamedTuple):
    """State of `prune_by_schedule`.

    Attributes:
      step: () int32, updates so far.
      sparsity: () float32, the scheduled sparsity that `masks` were made for.
      masks: Pytree of bool like the parameters, `optax.MaskedNode()` where nothing is pruned.
    """

    step: jax.Array
    sparsity: jax.Array
    masks: Any


def hold_masks(masks: Any) -> optax.GradientTransformationExtraArgs:
    """Keeps what `masks` remove at exactly zero, after any optimizer.

    Must be the last link of the chain. The update is −w where a weight is removed, so that
    `optax.apply_updates` gives 0.0 there whatever the links before it did (momentum, decoupled
    weight decay, averaging); elsewhere updates pass unchanged. Parameters that were never masked
    land on the mask with the first update.

    Args:
      masks: Pytree of bool like the parameters, True where kept, `optax.MaskedNode()` where
        nothing is pruned.

    Raises:
      ValueError: From `init`, if `masks` do not fit the parameters; from `update`, if it is
        called without the parameters.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {'w': jnp.array([1.0, 2.0])}
      >>> masks = {'w': jnp.array([True, False])}
      >>> tx = optax.chain(optax.sgd(0.5), hold_masks(masks))
      >>> updates, _ = tx.update({'w': jnp.ones(2)}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      {'w': Array([0.5, 0. ], dtype=float32)}
    """

    def init(params):
        check_masks(params, masks)
        # Copied, so that a training step may donate its state.
        return HoldMasksState(jax.tree.map(jnp.array, masks))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        return _onto_masks(updates, state.masks, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def prune_by_schedule(
    criterion: Callable[..., Any],
    schedule: Schedule,
    granularity: Granularity | None = None,
    allocation: Allocation | None = None,
    *,
    every: int = 1,
    exempt: Sequence[str] = (),
    needs: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Prunes while training, along a schedule, and holds what is pruned at exactly zero.

    Must be the last link of the chain. At every `every`-th step at which the schedule asks for
    another sparsity, the parameters that the update leads to are scored and masked anew; what was
    removed before stays removed as long as the schedule does not fall. M. Zhu and S. Gupta, To
    prune, or not to prune (arXiv 1710.01878).

    Args:
      criterion: `criterion(params) -> scores`, such as `magnitude`, or with `needs`
        `criterion(params, *needed) -> scores`, such as `taylor`.
      schedule: `schedule(step) -> sparsity`, from step 0 at the first update.
      granularity: As for `masks`.
      allocation: As for `masks`.
      every: Steps between new masks, from 1.
      exempt: As for `masks`.
      needs: Names of the keyword arguments of `update`, each a pytree shaped like the
        parameters, to hand to `criterion`: `needs=('gradients',)` with
        `tx.update(grads, state, params, gradients=grads)`. Others are ignored.

    Raises:
      ValueError: If `every` is below 1, or the schedule ends above what `granularity` allows.
        From `init`, what `masks` raises on these parameters. From `update`, if the parameters or
        an argument in `needs` are not given.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from hybrid_jax.pruning import magnitude, one_shot
      >>> params = {'w': jnp.array([[1.0, 2.0, 3.0, 4.0]])}
      >>> tx = optax.chain(optax.sgd(0.5), prune_by_schedule(magnitude, one_shot(0.5)))
      >>> updates, _ = tx.update({'w': jnp.ones((1, 4))}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      {'w': Array([[0. , 0. , 2.5, 3.5]], dtype=float32)}
    """
    core.check_integer("every", every, 1)
    if granularity is not None:
        # Where the schedule ends; on the way there `masks` would only cut it off.
        last = schedule(jnp.int32(jnp.iinfo(jnp.int32).max))
        check_sparsity(
            last, f"sparsity of the schedule for {granularity.name}", most=granularity.max_sparsity
        )

    def score_and_mask(params, needed, sparsity, masks):
        scores = criterion(params, *needed)
        return make_masks(scores, sparsity, granularity, allocation, exempt, masks)

    def init(params):
        like = jax.eval_shape(
            lambda p: score_and_mask(p, [p] * len(needs), jnp.float32(0.0), None), params
        )
        return PruneState(
            step=jnp.zeros((), jnp.int32),
            sparsity=jnp.zeros((), jnp.float32),
            masks=jax.tree.map(lambda mask: jnp.ones(mask.shape, bool), like),
        )

    def update(updates, state, params=None, **extra_args):
        _check_params(params)
        missing = [name for name in needs if name not in extra_args]
        if missing:
            raise ValueError(f"update must be called with {', '.join(missing)}=..., got none")
        needed = [extra_args[name] for name in needs]
        sparsity = jnp.asarray(schedule(state.step), jnp.float32)

        def renew():
            candidate = apply_masks(optax.apply_updates(params, updates), state.masks)
            return score_and_mask(candidate, needed, sparsity, state.masks), sparsity

        due = (state.step % every == 0) & (sparsity != state.sparsity)
        masks, reached = jax.lax.cond(due, renew, lambda: (state.masks, state.sparsity))
        step = optax.safe_increment(state.step)
        return _onto_masks(updates, masks, params), PruneState(step, reached, masks)

    return optax.GradientTransformationExtraArgs(init, update)


def _onto_masks(updates: Any, masks: Any, params: Any) -> Any:
    """Replaces the updates of removed weights by −w, in the dtype of w so that w − w is exact."""
    _check_params(params)

    def land(path, mask, update, param):
        del path
        if core.is_masked_node(mask):
            return update
        return jnp.where(mask, update.astype(param.dtype), -param)

    return core.map_with_path(land, masks, updates, params)


def _check_params(params: Any) -> None:
    if params is None:
        raise ValueError("update must be called with params, got None")
