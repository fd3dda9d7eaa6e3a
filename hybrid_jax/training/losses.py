"""Losses, one number for each example: the mean over its pixels or values, if it has several."""

import jax
import jax.numpy as jnp
import optax

from hybrid_jax import core


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy (B,) between labels and logits, in nats, float32 or wider.

    `logits` are (B, …, N), -inf for a class that is ruled out; `labels` (B, …) integers in [0, N),
    of which a traced one outside makes the loss NaN, and of pixels also `core.VOID`, which does not
    count. `smoothing` is the probability that the target spreads evenly over all classes.
    """
    core.check_fraction("smoothing", smoothing)
    check_labelled(logits, labels)
    logits, counted = core.widen(logits), counting(labels)
    if counted is not None:  # Selected away first: the gradient of what is not finite would be NaN.
        logits, labels = jnp.where(counted[..., None], logits, 0), jnp.where(counted, labels, 0)
    labelled = core.one_hot(labels, logits.shape[-1]).astype(logits.dtype)
    target = optax.smooth_labels(labelled, smoothing)
    return mean_of_each(-core.expectation(target, jax.nn.log_softmax(logits)), counted)


def distillation_loss(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: float = 4.0
) -> jax.Array:
    """T² KL(teacher at T || student at T), (B,), of logits (B, …, N), float32 or wider.

    No gradient reaches the teacher, whose logits are -inf where it rules a class out. Source:
    Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, arXiv 1503.02531,
    section 2.
    """
    core.check_positive("temperature", temperature)
    student, teacher = (
        jax.nn.log_softmax(core.widen(logits) / temperature)
        for logits in (student_logits, jax.lax.stop_gradient(teacher_logits))
    )
    divergence = core.expectation(jnp.exp(teacher), teacher - student)
    return temperature**2 * mean_of_each(divergence)


def squared_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean squared error (B,) of outputs (B, …), float32 or wider; labels have as many values."""
    outputs, labels = (core.widen(x).reshape(len(x), -1) for x in (outputs, labels))
    if outputs.shape != labels.shape:
        raise ValueError(
            f"labels must have {outputs.shape[1]} values for each of {len(outputs)} outputs, "
            f"got shape {labels.shape}"
        )
    return mean_of_each(jnp.square(outputs - labels))


def mean_of_each(values: jax.Array, counted: jax.Array | None = None) -> jax.Array:
    """The mean (B,) of all `values` (B, …) of each example that count; 0 where none does."""
    values = core.widen(values).reshape(len(values), -1)
    if counted is None:
        return values.mean(-1)
    counted = counted.reshape(values.shape)
    many = jnp.maximum(counted.sum(-1), 1).astype(values.dtype)
    return jnp.where(counted, values, 0).sum(-1) / many


def counting(labels: jax.Array) -> jax.Array | None:
    """Which pixels (B, H, W, …) count: all but those of label `core.VOID`. None of other labels."""
    labels = jnp.asarray(labels)
    of_pixels = labels.ndim > 1 and jnp.issubdtype(labels.dtype, jnp.integer)
    return labels != core.VOID if of_pixels else None


def check_labelled(logits: jax.Array, labels: jax.Array) -> None:
    """Raises unless logits (B, …, N) have one label (B, …) each."""
    if jnp.shape(labels) != jnp.shape(logits)[:-1]:
        raise ValueError(
            f"labels must have shape {jnp.shape(logits)[:-1]} for outputs {jnp.shape(logits)}, "
            f"got {jnp.shape(labels)}"
        )
