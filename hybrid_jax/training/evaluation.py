"""Evaluation over arrays of any length, in batches of one shape: compiled once."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core
from hybrid_jax.training.progress import track

Predict = Callable[[Any, jax.Array], jax.Array]
"""predict(params, images (B, H, W, C)) -> logits (B, N), or (E, B, N) for E experts."""


class Labelled(Protocol):
    """Images (n, H, W, C) and labels (n,), such as `data.Arrays`."""

    images: np.ndarray
    labels: np.ndarray


def evaluate(
    predict: Predict, params: Any, arrays: Labelled, batch_size: int, name: str | None = None
) -> dict[str, Any]:
    """Accuracy and mean cross-entropy over all examples.

    The last batch is filled up and masked, so that one shape is compiled and every example counts
    once. Hand in the same function object each time: a new one compiles again.

    Args:
      predict: (params, images (B, H, W, C)) -> logits (B, N), or (E, B, N).
      params: Handed to `predict`.
      arrays: `images` (n, H, W, C) and `labels` (n,) integers.
      batch_size: B.
      name: Shows progress under this name; None is silent.

    Returns:
      {'accuracy': in [0, 1], 'loss': in nats}: floats, or (E,) float64 for logits (E, B, N).

    Raises:
      ValueError: If there are no examples, images and labels differ in number, or `batch_size` is
        below 1.

    Example:
      >>> from hybrid_jax.data import Arrays
      >>> arrays = Arrays(np.eye(3).reshape(3, 1, 1, 3), np.array([0, 1, 1]))
      >>> predict = lambda params, images: 100 * images[:, 0, 0, :].astype(jnp.float32)
      >>> round(evaluate(predict, None, arrays, batch_size=2)['accuracy'], 4)
      0.6667
    """
    totals = None
    for images, labels, mask in _batches(arrays, batch_size, name):
        sums = jax.device_get(_sums(predict, params, images, labels, mask))
        sums = {key: np.float64(value) for key, value in sums.items()}
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    means = {key: total / len(arrays.labels) for key, total in totals.items()}
    return {key: float(mean) if np.ndim(mean) == 0 else mean for key, mean in means.items()}


def predict_logits(
    predict: Predict, params: Any, arrays: Labelled, batch_size: int, name: str | None = None
) -> np.ndarray:
    """The logits of all examples; arguments and errors as of `evaluate`.

    Returns:
      (n, N), or (E, n, N), in the order of `arrays`.

    Example:
      >>> from hybrid_jax.data import Arrays
      >>> arrays = Arrays(np.ones((5, 1, 1, 2), np.float32), np.zeros(5, np.int32))
      >>> predict_logits(lambda params, images: images[:, 0, 0, :], None, arrays, 2).shape
      (5, 2)
    """
    logits = [
        np.asarray(_apply(predict, params, images))[..., mask, :]
        for images, _, mask in _batches(arrays, batch_size, name)
    ]
    return np.concatenate(logits, axis=-2)


@functools.partial(jax.jit, static_argnames="predict")
def _apply(predict: Predict, params: Any, images: jax.Array) -> jax.Array:
    return predict(params, images)


@functools.partial(jax.jit, static_argnames="predict")
def _sums(
    predict: Predict, params: Any, images: jax.Array, labels: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
    logits = predict(params, images)
    chosen = jnp.broadcast_to(labels[:, None], (*logits.shape[:-1], 1))
    log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=-1)[..., 0]
    correct = jnp.argmax(logits, axis=-1) == jnp.broadcast_to(labels, logits.shape[:-1])
    mask = jnp.broadcast_to(mask, correct.shape)
    return {
        "accuracy": jnp.sum(correct & mask, axis=-1),
        "loss": jnp.sum(jnp.where(mask, -log_likelihood, 0), axis=-1),
    }


def _batches(
    arrays: Labelled, batch_size: int, name: str | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Images, labels and mask of each batch, the last one filled up with the first example."""
    core.check_integer("batch_size", batch_size, 1)
    count = len(arrays.labels)
    if not count or len(arrays.images) != count:
        raise ValueError(
            f"arrays must hold as many images as labels and at least one, "
            f"got {len(arrays.images)} images and {count} labels"
        )
    starts = range(0, count, batch_size)
    for start in starts if name is None else track(starts, name):
        index = np.arange(start, start + batch_size)
        mask = index < count
        index = np.where(mask, index, 0)
        yield arrays.images[index], arrays.labels[index], mask
