"""Evaluation over arrays of any length, in batches that hold nothing but what is evaluated."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
import scipy.special

from hybrid_jax import core
from hybrid_jax.training.progress import track

Predict = Callable[[Any, jax.Array], jax.Array]
"""predict(params, images (B, H, W, C)) -> logits (B, N), or (E, B, N) for E experts."""


class Labelled(Protocol):
    """Images (n, H, W, C) and labels (n,), such as `data.Arrays`."""

    images: np.ndarray
    labels: np.ndarray


def evaluate(
    predict: Predict,
    params: Any,
    arrays: Labelled,
    batch_size: int,
    name: str | None = None,
    *,
    weight: np.ndarray | None = None,
) -> dict[str, Any]:
    """Accuracy and mean cross-entropy over all examples, summed in float64.

    The last batch is as small as what is left: filled up, it would take part wherever examples see
    each other, as they do in an expert's capacity. So up to two shapes are compiled. Hand in the
    same function object each time: a new one compiles again.

    `predict` is (params, images (B, H, W, C)) -> logits (B, N), or (E, B, N); `arrays` have
    `images` (n, H, W, C) and `labels` (n,) integers in [0, N). With a `name` progress is shown.
    `weight` (n,) is that of the means; examples of weight 0 do not run.

    Returns:
      {'accuracy': in [0, 1], 'loss': in nats}: floats, or (E,) float64 for logits (E, B, N). An
      example with NaN among its logits is not right, and makes the loss NaN.

    Example:
      >>> from hybrid_jax.data import Arrays
      >>> arrays = Arrays(np.eye(3).reshape(3, 1, 1, 3), np.array([0, 1, 1]))
      >>> predict = lambda params, images: 100 * images[:, 0, 0, :]
      >>> round(evaluate(predict, None, arrays, batch_size=2)['accuracy'], 4)
      0.6667
    """
    count = _count(arrays)
    weight = np.ones(count) if weight is None else np.asarray(weight, np.float64)
    if weight.shape != (count,) or not ((weight >= 0).all() and weight.any()):
        raise ValueError(f"weight must be {count} numbers of at least 0, not all 0, got {weight}")
    total, labels = {"accuracy": 0.0, "loss": 0.0}, None
    examples = np.flatnonzero(weight)
    for index, logits in _logits(predict, params, arrays, examples, batch_size, name):
        if labels is None:
            labels = core.check_labels("labels", arrays.labels, logits.shape[-1], weight)
        own, share = labels[index], weight[index]
        with np.errstate(invalid="ignore"):  # infinity among the logits: its loss is NaN
            log_probability = scipy.special.log_softmax(np.asarray(logits, np.float64), -1)
        likelihood = log_probability[..., np.arange(len(index)), own]
        total["accuracy"] += (share * (np.asarray(core.top_class(logits)) == own)).sum(-1)
        total["loss"] -= (share * likelihood).sum(-1)
    means = {key: np.float64(sums) / weight.sum() for key, sums in total.items()}
    return {key: float(mean) if np.ndim(mean) == 0 else mean for key, mean in means.items()}


def predict_logits(
    predict: Predict,
    params: Any,
    arrays: Labelled,
    batch_size: int,
    name: str | None = None,
    *,
    fill: bool = False,
) -> np.ndarray:
    """The logits of all examples, (n, N) or (E, n, N), in their order; arguments as of `evaluate`.

    With `fill` the last batch is filled up with its last example, so that sets of any size are of
    one shape and `predict` is compiled once; in it no example may see another.
    """
    every = np.arange(_count(arrays))
    batches = _logits(predict, params, arrays, every, batch_size, name, fill)
    return np.concatenate([np.asarray(logits) for _, logits in batches], axis=-2)


def _count(arrays: Labelled) -> int:
    count = len(arrays.images)
    if not count or np.shape(arrays.labels) != (count,):
        raise ValueError(
            "arrays must hold a label (n,) for each of at least one image, "
            f"got {count} images and labels of shape {np.shape(arrays.labels)}"
        )
    return count


@functools.partial(jax.jit, static_argnames="predict")
def _apply(predict: Predict, params: Any, images: jax.Array) -> jax.Array:
    return core.fast_convolutions(predict)(params, images)


def _logits(
    predict: Predict,
    params: Any,
    arrays: Labelled,
    examples: np.ndarray,
    batch_size: int,
    name: str | None,
    fill: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The indices (B,) and the logits of each batch of these examples."""
    core.check_integer("batch_size", batch_size, 1)
    starts = range(0, len(examples), batch_size)
    for start in starts if name is None else track(starts, name):
        index = examples[start : start + batch_size]
        size = batch_size if fill else len(index)
        filled = np.pad(index, (0, size - len(index)), "edge")
        logits = _apply(predict, params, arrays.images[filled])
        if logits.ndim not in (2, 3) or logits.shape[-2] != size:
            raise ValueError(
                f"predict must return logits ({size}, N) or (E, {size}, N), "
                f"got shape {logits.shape}"
            )
        yield index, np.asarray(logits)[..., : len(index), :]
