"""Cascades: the cheap expert answers if it is sure, and else hands on to the next, dearer one.

No gate is needed: an expert's own confidence in its answer decides, after it has run. A confidence
is a function from logits `(..., N)` to `(...)` in [0, 1]. Sources: Wang et al., IDK Cascades: Fast
Deep Learning by Learning not to Overthink, arXiv 1706.00885; Wang et al., Wisdom of Committees,
arXiv 2012.01988.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core
from hybrid_jax.experts.budget import check_costs
from hybrid_jax.experts.mixture import ExpertFn, check_experts, listed

Confidence = Callable[[jax.Array], jax.Array]
Threshold = float | Sequence[float] | jax.Array


class Cascaded(NamedTuple):
    """What a cascade answers, and how far each input went."""

    logits: jax.Array  # float `(B, N)`, the answer of the expert at which each input stopped
    # int32 `(B,)`, its index: the last of the experts 0, 1, ... that the input needed
    stage: jax.Array
    # int32 `(E - 1,)`, how many inputs that count each expert but the last handed on
    went_on: jax.Array


def max_probability(logits: jax.Array) -> jax.Array:
    """The largest softmax probability (Hendrycks and Gimpel, arXiv 1610.02136)."""
    return jax.nn.softmax(logits).max(-1)


def margin(logits: jax.Array) -> jax.Array:
    """The largest softmax probability less the second, of at least two classes."""
    core.check_integer("the number of classes", logits.shape[-1], 2)
    top, _ = jax.lax.top_k(jax.nn.softmax(logits), 2)
    return top[..., 0] - top[..., 1]


def cascade(
    expert_logits: jax.Array,
    threshold: Threshold,
    confidence: Confidence = max_probability,
    *,
    share: float | jax.Array = 0.0,
    weight: jax.Array | None = None,
) -> Cascaded:
    """The answers of a cascade on a batch, from the logits of all experts: to set the thresholds.

    `expert_logits` are `(E, B, N)`, the cheapest expert first. The answer at an expert is its
    logits plus `share` of the answer at the one before, see `opinions`. It is handed on where the
    `confidence` in it, `max_probability` or `margin`, is below the threshold: one in [0, 1], or one
    for each expert but the last; 0 never hands on, 1 always but where it is certain. It may be
    traced. An expert whose logits are NaN does not hand on: NaN is the answer. Inputs of `weight`
    0, as padding has, are not counted.

    Example:
      >>> logits = jnp.array([[[3.0, 0.0], [0.0, 0.1]], [[0.0, 2.0], [2.0, 0.0]]])
      >>> logits, stage, went_on = cascade(logits, threshold=0.9)
      >>> logits
      Array([[3., 0.],
             [2., 0.]], dtype=float32)
      >>> stage.tolist(), went_on.tolist()
      ([0, 1], [1])
    """
    if expert_logits.ndim != 3:
        raise ValueError(f"expert_logits must have shape (E, B, N), got {expert_logits.shape}")
    thresholds = _thresholds(threshold, len(expert_logits), expert_logits.dtype)
    answers = opinions(expert_logits, share)
    unsure = confidence(answers[:-1]) < thresholds[:, None]
    went_on = jnp.cumprod(unsure.astype(jnp.int32), 0)
    stage = went_on.sum(0)
    answer = jnp.take_along_axis(answers, stage[None, :, None], 0)[0]
    return Cascaded(answer, stage, core.selected(went_on.T, weight).sum(0))


def opinions(expert_logits: jax.Array, share: float | jax.Array) -> jax.Array:
    """The answers of a cascade at each of its experts, `(E, B, N)`: y_e = z_e + share · y_{e−1}.

    Two networks err differently, so that a second opinion is worth more beside the first than in
    its place. Wang et al., Wisdom of Committees, arXiv 2012.01988.

    Example:
      >>> opinions(jnp.array([[[2.0, 0.0]], [[0.0, 1.5]]]), share=0.5)[1]
      Array([[1. , 1.5]], dtype=float32)
    """
    first, *later = expert_logits
    made = itertools.accumulate(later, lambda before, z: z + share * before, initial=first)
    return jnp.stack(list(made))


def cascade_edge(
    expert_fns: Sequence[ExpertFn],
    threshold: Threshold,
    confidence: Confidence = max_probability,
    share: float = 0.0,
) -> Callable[..., Cascaded]:
    """Makes the cascade for the edge, which runs for each image only the experts that it needs.

    The experts' shapes may differ. A batch goes through image by image; `jax.vmap` of this would
    run every expert. `edge(params_list, x)` has one params pytree for each of the `expert_fns`, the
    cheapest first; each makes logits `(B, N)`. `threshold`, `confidence` and `share` are as for
    `cascade`.
    """
    expert_fns = listed(expert_fns)
    last = len(expert_fns) - 1
    _thresholds(threshold, len(expert_fns), jnp.float32)

    def edge(params_list, x):
        check_experts(expert_fns, params_list, x)

        def answer(e, x, before=None):
            logits = expert_fns[e](params_list[e], x)
            if logits.ndim != 2:
                raise ValueError(f"expert_fns must return logits (B, N), got shape {logits.shape}")
            logits = logits if before is None else logits + share * before
            here = logits, jnp.full(1, e, jnp.int32)
            if e == last:
                return here
            unsure = confidence(logits)[0] < _thresholds(threshold, last + 1, logits.dtype)[e]
            return jax.lax.cond(unsure, lambda: answer(e + 1, x, logits), lambda: here)

        logits, stage = core.one_by_one(lambda x: answer(0, x), x)
        return Cascaded(logits, stage, (stage[None] > jnp.arange(last)[:, None]).sum(1))

    return edge


def cascade_cost(
    cascaded: Cascaded, costs: Sequence[float] | jax.Array, *, weight: jax.Array | None = None
) -> jax.Array:
    """Mean over inputs of the cost of every expert that ran: those up to the one that answered.

    `costs` `(E,)` are as MACs or BOPs of each expert, in any unit; `weight` `(B,)` is that of each
    input in the mean.
    """
    costs = check_costs(costs, len(cascaded.went_on) + 1)
    return core.weighted_mean(jnp.cumsum(costs)[cascaded.stage], weight)


def _thresholds(threshold: Any, num_experts: int, dtype: Any) -> jax.Array:
    if np.shape(threshold) not in ((), (num_experts - 1,)):
        raise ValueError(
            f"threshold must be a number or have shape {(num_experts - 1,)}, one for each expert "
            f"but the last, got shape {np.shape(threshold)}"
        )
    if not isinstance(threshold, jax.core.Tracer):
        known = np.asarray(threshold)
        if not ((known >= 0) & (known <= 1)).all():
            raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    return jnp.broadcast_to(jnp.asarray(threshold, dtype), (num_experts - 1,))
