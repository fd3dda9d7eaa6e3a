"""Pruning in an optax transformation: plain `optax.apply_updates` lands on the mask.

Nothing may follow such a transformation in a chain: a link after it would move what it set to
zero, and no transformation can see what follows it. Around it may be what calls it or does not,
as `optax.MultiSteps`, `optax.apply_if_finite`, `optax.partition`, `optax.inject_hyperparams`.
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
      accumulated: What `accumulate` gave last, or ().
      inner: State of the inner optimizer.
    """

    step: jax.Array
    sparsity: jax.Array
    masks: Any
    accumulated: Any
    inner: Any


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
        core.check_masks(params, masks)
        # Copied, so that a training step may donate its state.
        return HoldMasksState(jax.tree.map(jnp.array, masks))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        return renewal.onto_masks(updates, state.masks, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def prune_by_schedule(
    criterion: Callable[..., Any],
    schedule: Schedule,
    granularity: Granularity | None = None,
    allocation: Allocation | None = None,
    *,
    inner: optax.GradientTransformation | None = None,
    every: int = 1,
    exempt: Sequence[str] = (),
    needs: Sequence[str] = (),
    accumulate: Accumulate | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes while training, along a schedule, and holds what is pruned at exactly zero.

    At every `every`-th step at which the schedule asks for another sparsity, the parameters that
    the update leads to are scored and masked anew; what was removed before stays removed as long
    as the schedule does not fall. Where it falls, weights come back at zero. M. Zhu and S. Gupta,
    To prune, or not to prune (arXiv 1710.01878); with a schedule made by `cyclic` this is AC/DC or
    cyclical pruning.

    It is the last link of a chain, after any optimizer; or it wraps the optimizer, given as
    `inner`, and then nothing can follow it by mistake, criteria get the gradients with no more
    said, `inner` sees the gradients of kept weights alone, and a weight that comes back has the
    state that `inner.init` gives it.

    Args:
      criterion: `criterion(params) -> scores`, such as `magnitude`, or with `needs`
        `criterion(params, *needed) -> scores`, such as `taylor`.
      schedule: `schedule(step) -> sparsity`, from step 0 at the first update.
      granularity: As for `masks`.
      allocation: As for `masks`.
      inner: Any optax optimizer to wrap; None for a link after one. `update` hands it extra
        arguments as `optax.chain` would.
      every: Steps between new masks, from 1.
      exempt: As for `masks`.
      needs: What to hand to `criterion`, by name: 'accumulated' is what `accumulate` keeps, any
        other is a keyword argument of `update`, shaped like the parameters. With `inner`,
        'gradients' are those that `update` is called with; a link in a chain sees only what the
        optimizer made of them, and so they are a keyword argument there too.
      accumulate: `accumulate(accumulated, params, gradients) -> accumulated`, called at every
        step, from zeros shaped like the parameters (float32 where these are floating).

    Raises:
      ValueError: If `inner` is no optimizer, `every` is below 1, only one of `accumulate` and
        'accumulated' is given, or the schedule ends above what `granularity` allows. From `init`,
        what `masks` raises on these parameters. From `update`, if the parameters, an argument in
        `needs` or the gradients for `accumulate` are not given.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from hybrid_jax.pruning import magnitude, one_shot
      >>> params = {'w': jnp.array([[1.0, 2.0, 3.0, 4.0]])}
      >>> tx = optax.chain(optax.sgd(0.5), prune_by_schedule(magnitude, one_shot(0.5)))
      >>> updates, _ = tx.update({'w': jnp.ones((1, 4))}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      {'w': Array([[0. , 0. , 2.5, 3.5]], dtype=float32)}
    """
    wraps = inner is not None
    inner = renewal.check_inner(inner if wraps else optax.identity())
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
        known = {**extra_args, "gradients": updates} if wraps else extra_args
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
