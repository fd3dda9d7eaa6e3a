"""Cascades: the cheap expert answers if it is sure, and else hands on to the next, dearer one.

No gate is needed: an expert's own confidence in its answer decides, after it has run. Here are the
answers on a batch, of which all experts have run; what runs for an image the experts that it needs
is a `program.Cascade`. Sources: Wang et al., IDK Cascades: Fast Deep Learning by Learning not to
Overthink, arXiv 1706.00885; Wang et al., Wisdom of Committees, arXiv 2012.01988.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Threshold = float | Sequence[float] | jax.Array


class Cascaded(NamedTuple):
    """What a cascade answers, and how far each input went."""

    logits: jax.Array  # float `(B, …)`, the answer of the expert at which each input stopped
    # int32 `(B,)`, its index: the last of the experts 0, 1, ... that the input needed
    stage: jax.Array
    went_on: jax.Array  # int32 `(E - 1,)`, how many inputs each expert but the last handed on


def max_probability(logits: jax.Array) -> jax.Array:
    """The largest softmax probability (Hendrycks and Gimpel, arXiv 1610.02136)."""
    return jax.nn.softmax(logits).max(-1)


def cascade(
    expert_logits: jax.Array,
    threshold: Threshold,
    *,
    share: float | jax.Array = 0.0,
    confidence: Callable[[jax.Array], jax.Array] = max_probability,
) -> Cascaded:
    """The answers of a cascade on a batch, from the logits of all experts: to set the thresholds.

    `expert_logits` are `(E, B, …)`, the cheapest expert first; by default, classes are last of
    `(E, B, N)`. The answer at an expert is its logits plus `share` of the answer at the one before,
    see `opinions`. It is handed on where its `confidence`, of answers (B, …) a number (B,) in
    [0, 1], is below the threshold: one in [0, 1], or one for each expert but the last; 0 never
    hands on, 1 always but where it is certain. It may be traced. An expert whose confidence is NaN
    does not hand on: NaN is the answer.

    Example:
      >>> logits = jnp.array([[[3.0, 0.0], [0.0, 0.1]], [[0.0, 2.0], [2.0, 0.0]]])
      >>> logits, stage, went_on = cascade(logits, threshold=0.9)
      >>> logits
      Array([[3., 0.],
             [2., 0.]], dtype=float32)
      >>> stage.tolist(), went_on.tolist()
      ([0, 1], [1])
    """
    if expert_logits.ndim < 2 or (confidence is max_probability and expert_logits.ndim != 3):
        raise ValueError(f"expert_logits must have shape (E, B, N), got {expert_logits.shape}")
    thresholds = _thresholds(threshold, len(expert_logits), expert_logits.dtype)
    answers = opinions(expert_logits, share)
    stage = stages(confidences(answers, confidence), thresholds)
    index = jnp.expand_dims(stage, (0, *range(2, answers.ndim)))
    answer = jnp.take_along_axis(answers, index, 0)[0]
    went_on = stage[None] > jnp.arange(len(thresholds))[:, None]
    return Cascaded(answer, stage, went_on.sum(1, dtype=jnp.int32))


def confidences(
    answers: jax.Array, confidence: Callable[[jax.Array], jax.Array] = max_probability
) -> jax.Array:
    """How sure each expert but the last is, (E - 1, B), of its answers in (E, B, …)."""
    return jax.vmap(confidence)(answers[:-1])


def stages(confidences: jax.Array, thresholds: jax.Array) -> jax.Array:
    """The first expert that is sure of each input, int32 (B,); of (E - 1, B) and (E - 1,)."""
    unsure = confidences < thresholds[:, None]
    return jnp.cumprod(unsure.astype(jnp.int32), 0).sum(0, dtype=jnp.int32)


def opinions(expert_logits: jax.Array, share: float | jax.Array) -> jax.Array:
    """The answers of a cascade at each of its experts, `(E, B, …)`: y_e = z_e + share · y_{e−1}.

    Two networks err differently, so that a second opinion is worth more beside the first than in
    its place. Wang et al., Wisdom of Committees, arXiv 2012.01988.

    Example:
      >>> opinions(jnp.array([[[2.0, 0.0]], [[0.0, 1.5]]]), share=0.5)[1]
      Array([[1. , 1.5]], dtype=float32)
    """
    first, *later = expert_logits
    made = itertools.accumulate(later, lambda before, z: z + share * before, initial=first)
    return jnp.stack(list(made))


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
