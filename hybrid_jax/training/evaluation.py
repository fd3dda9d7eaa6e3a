"""Evaluation over arrays of any length, in batches that hold nothing but what is evaluated."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from hybrid_jax import core
from hybrid_jax.training.objectives import Objective, classification
from hybrid_jax.training.progress import track
from hybrid_jax.training.sharding import own_rows, replicate, shard_batch

Predict = Callable[[Any, jax.Array], jax.Array]
"""predict(params, images (B, H, W, C)) -> outputs (B, …), such as logits (B, N)."""


class Labelled(Protocol):
    """Images (n, H, W, C) and labels (n, …), such as `data.Arrays`; labels None where none are."""

    images: np.ndarray
    labels: np.ndarray | None


def evaluate(
    predict: Predict,
    params: Any,
    arrays: Labelled,
    batch_size: int,
    name: str | None = None,
    *,
    objective: Objective | None = None,
    weight: np.ndarray | None = None,
) -> dict[str, float]:
    """Mean score and loss over all examples, summed in float64: {objective.metric: …, 'loss': …}.

    The last batch is as small as what is left: filled up, it would take part wherever examples see
    each other. Hand in the same function object each time: a new one compiles again. `predict` is
    (params, images (B, H, W, C)) -> outputs (B, …); `arrays` have `images` (n, H, W, C) and
    `labels` (n, …) as `objective` takes both, by default `classification()`. With a `name` progress
    is shown. `weight` (n,) is that of the means; examples of weight 0 do not run. An example with
    NaN among its logits is not right, and makes the loss NaN.
    """
    objective = objective or classification()
    count = _count(arrays)
    if arrays.labels is None or len(arrays.labels) != count:
        got = None if arrays.labels is None else np.shape(arrays.labels)
        raise ValueError(f"arrays must hold a label for each of {count} images, got shape {got}")
    weight = np.ones(count) if weight is None else np.asarray(weight, np.float64)
    if weight.shape != (count,) or not ((weight >= 0).all() and weight.any()):
        raise ValueError(f"weight must be {count} numbers of at least 0, not all 0, got {weight}")
    means = {objective.metric: 0.0, "loss": 0.0}
    for index, outputs in _outputs(
        predict, params, arrays, np.flatnonzero(weight), batch_size, name
    ):
        share, labels = weight[index] / weight.sum(), arrays.labels[index]
        means["loss"] += share @ np.asarray(objective.loss(outputs, labels), np.float64)
        means[objective.metric] += share @ np.asarray(objective.score(outputs, labels), np.float64)
    return {key: float(mean) for key, mean in means.items()}


def predict_logits(
    predict: Predict,
    params: Any,
    arrays: Labelled,
    batch_size: int,
    *,
    fill: bool = False,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """The outputs (n, …) of all examples, in their order; arguments as of `evaluate`.

    With `fill` the last batch is filled up with its last example, so that sets of any size are of
    one shape and `predict` is compiled once; in it no example may see another. With a `mesh`, as of
    `data_mesh`, each batch is filled up and divided among its devices; of several processes each
    reads its share, and has the outputs of all.
    """
    every = np.arange(_count(arrays))
    fill = fill or mesh is not None
    batches = _outputs(predict, params, arrays, every, batch_size, None, fill, mesh)
    return np.concatenate([outputs for _, outputs in batches])


def _count(arrays: Labelled) -> int:
    if not len(arrays.images):
        raise ValueError("arrays must hold at least one image, got none")
    return len(arrays.images)


@functools.partial(jax.jit, static_argnames="predict")
def _apply(predict: Predict, params: Any, images: jax.Array) -> jax.Array:
    return core.fast_convolutions(predict)(params, images)


def _outputs(predict, params, arrays, examples, batch_size, name, fill=False, mesh=None):
    """The indices (B,) and the outputs (B, …) of each batch of these examples."""
    core.check_integer("batch_size", batch_size, 1)
    params = params if mesh is None else replicate(params, mesh)
    starts = range(0, len(examples), batch_size)
    for start in starts if name is None else track(starts, name):
        index = examples[start : start + batch_size]
        size = batch_size if fill else len(index)
        filled = np.pad(index, (0, size - len(index)), "edge")
        images = arrays.images[filled[own_rows(mesh, size)]]
        if mesh is not None:
            images = shard_batch({"image": images}, mesh, batch_size=size)["image"]
        outputs = _apply(predict, params, images)
        if np.shape(outputs)[:1] != (size,):
            raise ValueError(
                f"predict must return outputs ({size}, …), got shape {np.shape(outputs)}"
            )
        yield index, core.whole(outputs)[: len(index)]
