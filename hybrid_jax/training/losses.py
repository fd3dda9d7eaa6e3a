"""Losses of classification and distillation, and the loss function of a training step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hybrid_jax import core
from hybrid_jax.training.steps import Batch, LossFn, Metrics

Forward = Callable[[Any, Any, jax.Array, jax.Array | None], tuple[jax.Array, Any]]
"""forward(params, state, images (B, H, W, C), key) -> (logits (B, N), new_state), training mode."""


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, smoothing: float = 0.0, weight: jax.Array | None = None
) -> jax.Array:
    """Mean cross-entropy between labels and logits, in nats, float32 or wider.

    `logits` are (B, N), -inf for a class that is ruled out; `labels` (B,) integers in [0, N), of
    which a traced one outside makes the loss NaN. `smoothing` is the probability that the target
    spreads evenly over all classes, `weight` the (B,) weights of the mean. An example of weight 0
    may hold anything, any label and NaN included: no part of it is in the loss or its gradient.
    """
    core.check_fraction("smoothing", smoothing)
    logits = core.selected(core.widen(logits), weight)
    labelled = core.one_hot(labels, logits.shape[-1], weight).astype(logits.dtype)
    target = optax.smooth_labels(labelled, smoothing)
    return -core.weighted_mean(core.expectation(target, jax.nn.log_softmax(logits)), weight)


def distillation_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    temperature: float = 4.0,
    alpha: float = 0.9,
    *,
    smoothing: float = 0.0,
    weight: jax.Array | None = None,
) -> jax.Array:
    """(1 - alpha) * CE(labels, student) + alpha * T² * KL(teacher at T || student at T).

    T² keeps the size of the soft target's gradient when the temperature changes. No gradient
    reaches the teacher.

    Source: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network,
    arXiv 1503.02531, section 2.

    Logits are (B, N), -inf where the teacher rules a class out; T, `temperature`, is above 0, and
    `alpha`, the share of the teacher's part, in [0, 1]. The rest is as of `cross_entropy`.

    Example:
      >>> logits = jnp.array([[2.0, 0.0, 1.0]])
      >>> distillation_loss(logits, logits, jnp.array([0]), temperature=2.0, alpha=1.0).item()
      0.0
    """
    core.check_positive("temperature", temperature)
    core.check_fraction("alpha", alpha)
    student, teacher = (
        jax.nn.log_softmax(core.selected(core.widen(logits), weight) / temperature)
        for logits in (student_logits, jax.lax.stop_gradient(teacher_logits))
    )
    divergence = core.expectation(jnp.exp(teacher), teacher - student)
    hard = cross_entropy(student_logits, labels, smoothing=smoothing, weight=weight)
    return (1 - alpha) * hard + alpha * temperature**2 * core.weighted_mean(divergence, weight)


def classification(
    forward: Forward, *, smoothing: float = 0.0, temperature: float = 4.0, alpha: float = 0.0
) -> LossFn:
    """Makes the loss function of a step: labels, and a teacher's logits where `alpha` > 0.

    forward(params, state, images, key) -> (logits (B, N), new_state) is in training mode. With
    `alpha` above 0 the batch needs 'teacher' (B, N) logits, which `make_step(…, teacher=…)`
    provides.

    Returns:
      loss_fn(params, state, batch, key) -> (loss, (new_state, {'accuracy'})). Both are means
      weighted by batch['weight'] (B,), if there is one. `forward` then sees the examples that count
      in place of those of weight 0, which have no part in BatchNorm's statistics either; where none
      counts, both are 0. NaN logits are never right.

    Example:
      In Linen, with params {'params': …} and state {'batch_stats': …}:

      >>> def forward(params, state, images, key):
      ...     return model.apply(params | state, images, train=True, mutable=['batch_stats'])
      >>> loss_fn = classification(forward, temperature=4.0, alpha=0.9)
    """
    core.check_fraction("smoothing", smoothing)
    core.check_positive("temperature", temperature)
    core.check_fraction("alpha", alpha)

    def loss_fn(
        params: Any, state: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        if alpha and "teacher" not in batch:
            raise ValueError(f"batch must hold 'teacher' logits for alpha {alpha}, got {[*batch]}")
        weight = batch.get("weight")
        entries = {name: batch[name] for name in ("image", "label", "teacher") if name in batch}
        entries = core.filled(entries, weight)
        labels = entries["label"]
        logits, new_state = forward(params, state, entries["image"], key)
        if alpha:
            loss = distillation_loss(
                logits,
                entries["teacher"],
                labels,
                temperature,
                alpha,
                smoothing=smoothing,
                weight=weight,
            )
        else:
            loss = cross_entropy(logits, labels, smoothing=smoothing, weight=weight)
        correct = core.top_class(logits) == labels
        return loss, (new_state, {"accuracy": core.weighted_mean(correct, weight)})

    return loss_fn
