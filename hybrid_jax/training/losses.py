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
    """Mean cross-entropy between labels and logits, in nats.

    Args:
      logits: (B, N) float.
      labels: (B,) integers in [0, N).
      smoothing: Probability, in [0, 1], that the target spreads evenly over all classes.
      weight: (B,) float weights of the mean; None weighs all alike.

    Raises:
      ValueError: If `smoothing` is outside [0, 1].

    Example:
      >>> round(cross_entropy(jnp.zeros((3, 4)), jnp.array([0, 1, 2])).item(), 4)  # log 4
      1.3863
    """
    core.check_fraction("smoothing", smoothing)
    target = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return weighted_mean(optax.softmax_cross_entropy(logits, target), weight)


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

    Args:
      student_logits: (B, N) float.
      teacher_logits: (B, N) float.
      labels: (B,) integers in [0, N).
      temperature: T, above 0.
      alpha: Share of the teacher's part, in [0, 1].
      smoothing: As of `cross_entropy`, for the labels' part.
      weight: (B,) float weights of the mean; None weighs all alike.

    Raises:
      ValueError: If `temperature`, `alpha` or `smoothing` is out of range.

    Example:
      >>> logits = jnp.array([[2.0, 0.0, 1.0]])
      >>> distillation_loss(logits, logits, jnp.array([0]), temperature=2.0, alpha=1.0).item()
      0.0
    """
    core.check_positive("temperature", temperature)
    core.check_fraction("alpha", alpha)
    student = jax.nn.log_softmax(student_logits / temperature)
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    hard = cross_entropy(student_logits, labels, smoothing=smoothing, weight=weight)
    return (1 - alpha) * hard + alpha * temperature**2 * weighted_mean(divergence, weight)


def weighted_mean(values: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """sum(weight * values) / sum(weight); 0 where all weights are 0.

    Args:
      values: (B,) float.
      weight: (B,) float, at least 0; None is the plain mean.

    Example:
      >>> weighted_mean(jnp.array([1.0, 5.0]), jnp.array([3.0, 1.0])).item()
      2.0
    """
    if weight is None:
        return jnp.mean(values)
    total = jnp.sum(weight)
    return jnp.sum(weight * values) / jnp.where(total > 0, total, 1)


def classification(
    forward: Forward, *, smoothing: float = 0.0, temperature: float = 4.0, alpha: float = 0.0
) -> LossFn:
    """Makes the loss function of a step: labels, and a teacher's logits where `alpha` > 0.

    Args:
      forward: (params, state, images, key) -> (logits (B, N), new_state), in training mode.
      smoothing: As of `cross_entropy`.
      temperature: As of `distillation_loss`.
      alpha: As of `distillation_loss`; above 0 the batch needs 'teacher' (B, N) logits, which
        `make_step(…, teacher=…)` provides.

    Returns:
      loss_fn(params, state, batch, key) -> (loss, (new_state, {'accuracy'})). Both are means
      weighted by batch['weight'] (B,), if there is one.

    Raises:
      ValueError: If an argument is out of range, or (when called) the batch lacks 'teacher'.

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
        logits, new_state = forward(params, state, batch["image"], key)
        labels, weight = batch["label"], batch.get("weight")
        if alpha:
            loss = distillation_loss(
                logits,
                batch["teacher"],
                labels,
                temperature,
                alpha,
                smoothing=smoothing,
                weight=weight,
            )
        else:
            loss = cross_entropy(logits, labels, smoothing=smoothing, weight=weight)
        correct = (jnp.argmax(logits, axis=-1) == labels).astype(logits.dtype)
        return loss, (new_state, {"accuracy": weighted_mean(correct, weight)})

    return loss_fn
