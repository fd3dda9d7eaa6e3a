"""Straight-through pruning: dense weights behind the masked ones that are trained on."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hybrid_jax import core
from hybrid_jax.pruning import renewal
from hybrid_jax.pruning.allocation import Allocation
from hybrid_jax.pruning.granularity import Granularity
from hybrid_jax.pruning.schedules import Schedule
from hybrid_jax.pruning.scoring import Accumulate, Scoring


class StraightThroughState(NamedTuple):
    """State of `straight_through`: `inner` trains `dense`, the weights behind the parameters.

    `masks` are of `sparsity`. What `inner` holds of the weights themselves (averages) is on the
    mask; `hidden` are those leaves before it, `MaskedNode` for the others, () if there are none.
    """

    step: jax.Array
    sparsity: jax.Array
    masks: Any
    dense: Any
    accumulated: Any
    inner: Any
    hidden: Any


def straight_through(
    inner: optax.GradientTransformation,
    criterion: Callable[..., Any],
    schedule: Schedule,
    granularity: Granularity | None = None,
    allocation: Allocation | None = None,
    *,
    every: int = 1,
    decay: float | jax.Array = 0.0,
    exempt: Sequence[str] = (),
    needs: Sequence[str] = (),
    accumulate: Accumulate | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains dense weights by the gradients of their best part, which is what is used.

    The parameters are the dense weights on their mask. Gradients at the parameters go straight to
    the dense weights, in the state, which `inner` updates and the criterion scores, so that a
    removed weight may grow and return. Y. Bengio, N. Léonard, A. Courville, Estimating or
    Propagating Gradients Through Stochastic Neurons (arXiv 1308.3432). With `n_m` and `decay` it is
    SR-STE, A. Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch
    (arXiv 2102.04010); with scores that accumulate −w · g, movement pruning as V. Sanh, T. Wolf, A.
    Rush (arXiv 2005.07683) have it.

    Args as for `prune_by_schedule`, but that the criterion scores and `accumulate` sees the dense
    weights, `every` costs a selection over all weights, and `decay` λ adds λ · w to the gradient
    of each removed dense weight (SR-STE has 2e-4).

    Example:
      >>> import functools
      >>> from hybrid_jax.pruning import magnitude, one_shot
      >>> params = {'w': jnp.array([[1.0, 2.0]])}
      >>> graph = core.trace(lambda params, x: x @ params['w'], params, jnp.ones((1, 1)))
      >>> score = functools.partial(magnitude, graph.kernels)
      >>> tx = straight_through(optax.sgd(1.0), score, one_shot(0.5))
      >>> state = tx.init(params)
      >>> for gradient in ([[0.0, 0.25]], [[-3.0, 0.25]]):  # dense: 1, 1.75, then 4, 1.5
      ...     updates, state = tx.update({'w': jnp.array(gradient)}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params['w'])
      [[0.   1.75]]
      [[4. 0.]]
    """
    inner = renewal.check_inner(inner)
    scoring = Scoring(
        criterion, schedule, granularity, allocation, every, tuple(exempt), tuple(needs), accumulate
    )

    def init(params):
        masks = scoring.nothing_removed(params)
        inner_state, hidden = renewal.split_copies(inner, inner.init(params), masks, params)
        return StraightThroughState(
            step=jnp.zeros((), jnp.int32),
            sparsity=jnp.zeros((), jnp.float32),
            masks=masks,
            # Copied, so that a training step may donate both.
            dense=core.map_masked(lambda mask, _, param: jnp.array(param), masks, masks, params),
            accumulated=scoring.start(params),
            inner=inner_state,
            hidden=jax.tree.map(jnp.array, hidden),
        )

    def decayed(mask, gradient, weight):
        own = jnp.asarray(decay, gradient.dtype)
        return jnp.where(mask, gradient, gradient + own * weight.astype(gradient.dtype))

    def to_weights(mask, update, weight, param):
        return jnp.where(mask, weight - param, -param)

    def update(updates, state, params=None, **extra_args):
        renewal.check_params(params)
        gradients = updates
        weights = core.map_masked(lambda dense, param: dense, state.dense, params)
        known = {**extra_args, "gradients": gradients}
        accumulated = scoring.add(state.accumulated, weights, known)
        needed = scoring.gather(accumulated, known)
        sparsity = jnp.asarray(schedule(state.step), jnp.float32)
        due = state.step % every == 0

        gradients = core.map_masked(decayed, state.masks, gradients, weights)
        inner_state = renewal.join_copies(state.inner, state.hidden)
        updates, inner_state = inner.update(gradients, inner_state, weights, **extra_args)
        weights = optax.apply_updates(weights, updates)
        masks = jax.lax.cond(
            due, lambda: scoring.masks(weights, needed, sparsity), lambda: state.masks
        )
        inner_state, hidden = renewal.split_copies(inner, inner_state, masks, weights)
        return core.map_masked(to_weights, masks, updates, weights, params), StraightThroughState(
            step=optax.safe_increment(state.step),
            sparsity=jnp.where(due, sparsity, state.sparsity),
            masks=masks,
            dense=core.map_masked(lambda mask, _, weight: weight, masks, masks, weights),
            accumulated=accumulated,
            inner=inner_state,
            hidden=hidden,
        )

    return optax.GradientTransformationExtraArgs(init, update)
