"""Pruning in an optax transformation: plain `optax.apply_updates` lands on the mask.

It wraps the optimizer: `inner` sees the gradients of kept weights alone, and what it holds of the
parameters itself is held on the mask too. Nothing may follow it in a chain: a link after it would
move what it set to zero. Around it may be what calls it or does not, as `optax.MultiSteps`,
`optax.apply_if_finite`, `optax.partition`, `optax.inject_hyperparams`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hybrid_jax import core
from hybrid_jax.pruning import renewal
from hybrid_jax.pruning.allocation import Allocation
from hybrid_jax.pruning.granularity import Granularity
from hybrid_jax.pruning.masking import apply_masks
from hybrid_jax.pruning.schedules import Schedule
from hybrid_jax.pruning.scoring import Accumulate, Scoring


class HoldMasksState(NamedTuple):
    """State of `hold_masks`: the masks, and the inner optimizer's state."""

    masks: Any
    inner: Any


class PruneState(NamedTuple):
    """State of `prune_by_schedule`: `sparsity` is what `masks` were made for, at `step` updates."""

    step: jax.Array
    sparsity: jax.Array
    masks: Any
    accumulated: Any
    inner: Any


def hold_masks(
    inner: optax.GradientTransformation, masks: Any
) -> optax.GradientTransformationExtraArgs:
    """Keeps what `masks` remove at exactly zero, in any optimizer.

    The update is −w where a weight is removed, so that `optax.apply_updates` gives 0.0 there
    whatever `inner` did; elsewhere updates pass unchanged. What `inner` holds of the parameters,
    as averages, is on the masks too.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {'w': jnp.array([1.0, 2.0])}
      >>> tx = hold_masks(optax.sgd(0.5), {'w': jnp.array([True, False])})
      >>> updates, _ = tx.update({'w': jnp.ones(2)}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      {'w': Array([0.5, 0. ], dtype=float32)}
    """
    inner = renewal.check_inner(inner)

    def init(params):
        if not jax.tree.leaves(
            params
        ):  # What the state is made of, asked as `core.map_state` does.
            return HoldMasksState(params, inner.init(params))
        core.check_masks(params, masks)
        # Copied, so that a training step may donate its state.
        return HoldMasksState(
            jax.tree.map(jnp.array, masks), inner.init(apply_masks(params, masks))
        )

    def update(updates, state, params=None, **extra_args):
        renewal.check_params(params)
        updates = apply_masks(updates, state.masks)
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        inner_state, _ = renewal.split_copies(inner, inner_state, state.masks, params)
        updates = renewal.onto_masks(updates, state.masks, params)
        return updates, HoldMasksState(state.masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def prune_by_schedule(
    inner: optax.GradientTransformation,
    criterion: Callable[..., Any],
    schedule: Schedule,
    granularity: Granularity | None = None,
    allocation: Allocation | None = None,
    *,
    every: int = 1,
    exempt: Sequence[str] = (),
    needs: Sequence[str] = (),
    accumulate: Accumulate | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes while training, along a schedule, and holds what is pruned at exactly zero.

    At every `every`-th step at which `schedule(step)`, from 0, asks for another sparsity, the
    parameters that the update leads to are scored and masked anew; what was removed before stays
    removed as long as the schedule does not fall. Where it falls, weights come back at zero, with
    the state that `inner.init` gives them. M. Zhu and S. Gupta, To prune, or not to prune (arXiv
    1710.01878). `granularity`, `allocation` and `exempt` are as for `masks`.

    `criterion(params, *needed) -> scores` is such as `functools.partial(magnitude, kernels)`, or
    with `needs` `partial(taylor, kernels)`. Of what it `needs`, 'gradients' are those that `update`
    is called with, 'accumulated' is what `accumulate(accumulated, params, gradients) ->
    accumulated` keeps, called at every step from zeros shaped like the parameters (float32 where
    these are floating); any other is a keyword argument of `update`, shaped like the parameters.
    """
    inner = renewal.check_inner(inner)
    scoring = Scoring(
        criterion, schedule, granularity, allocation, every, tuple(exempt), tuple(needs), accumulate
    )

    def init(params):
        return PruneState(
            step=jnp.zeros((), jnp.int32),
            sparsity=jnp.zeros((), jnp.float32),
            masks=scoring.nothing_removed(params),
            accumulated=scoring.start(params),
            inner=inner.init(params),
        )

    def update(updates, state, params=None, **extra_args):
        renewal.check_params(params)
        known = {**extra_args, "gradients": updates}
        accumulated = scoring.add(state.accumulated, params, known)
        needed = scoring.gather(accumulated, known)
        sparsity = jnp.asarray(schedule(state.step), jnp.float32)
        due = (state.step % every == 0) & (sparsity != state.sparsity)

        updates = apply_masks(updates, state.masks)
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        updates, masks, inner_state = renewal.renew(
            due,
            lambda candidate: scoring.masks(candidate, needed, sparsity, state.masks),
            state.masks,
            inner,
            inner_state,
            updates,
            params,
        )
        return updates, PruneState(
            step=optax.safe_increment(state.step),
            sparsity=jnp.where(due, sparsity, state.sparsity),
            masks=masks,
            accumulated=accumulated,
            inner=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)
