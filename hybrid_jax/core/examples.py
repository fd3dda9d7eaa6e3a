"""The examples of a batch: which of them count, means over them, their labels and classes.

All that goes over examples takes one `weight`: (B,) float, at least 0, or bool; None where all
count alike. An example of weight 0, NaN included, reaches no result and no gradient: it is selected
away, never multiplied by 0.
"""

import operator
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Tree = TypeVar("Tree")

VOID = -1
"""The label of a pixel that does not count, in no loss and no score."""


def widen(x: jax.Array) -> jax.Array:
    """`x` in float32, or as it is where it has 32 bits or more: what sums over examples need."""
    x = jnp.asarray(x)
    wide = jnp.issubdtype(x.dtype, jnp.inexact) and x.dtype.itemsize >= 4
    return x if wide else x.astype(jnp.float32)


def selected(x: jax.Array, weight: jax.Array | None) -> jax.Array:
    """`x` (B, ...) with zeros in place of the examples that do not count."""
    if weight is None:
        return x
    counts = _counts(weight, len(x))
    return jnp.where(counts.reshape(-1, *(1 for _ in x.shape[1:])), x, jnp.zeros((), x.dtype))


def filled(examples: Tree, weight: jax.Array | None) -> Tree:
    """`examples` with those that count in place of those that do not; where none counts, all."""
    if weight is None:
        return examples
    (size,) = {len(leaf) for leaf in jax.tree.leaves(examples)}
    counts = _counts(weight, size)
    order = jnp.argsort(~counts, stable=True)  # those that count first
    turn = (jnp.cumsum(~counts) - 1) % jnp.maximum(counts.sum(), 1)
    index = jnp.where(counts | ~counts.any(), jnp.arange(size), order[turn])
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], examples)


def weighted_mean(values: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """sum(weight * values) / sum(weight) over (B, ...), in float32 or wider; 0 if none counts."""
    values = widen(values)
    if not len(values):
        raise ValueError(f"a mean must be over at least one example, got shape {values.shape}")
    if weight is None:
        return values.mean(0)
    values = selected(values, weight)
    weight = jnp.asarray(weight).astype(values.dtype)
    total = weight.sum()
    weighed = weight.reshape(-1, *(1 for _ in values.shape[1:])) * values
    return weighed.sum(0) / jnp.where(total > 0, total, 1)


def expectation(probabilities: jax.Array, values: jax.Array) -> jax.Array:
    """sum(p * x) over the last axis; where p is 0 its part is 0, even if x is infinite."""
    return jnp.sum(probabilities * jnp.where(probabilities == 0, 0, values), axis=-1)


def top_class(logits: jax.Array) -> jax.Array:
    """The class of the largest of (..., N), int32; of ties the lowest; -1 if one is NaN."""
    bad = jnp.isnan(logits).any(-1)
    return jnp.where(bad, -1, jnp.argmax(logits, -1).astype(jnp.int32))


def check_labels(
    name: str, labels: Any, num_classes: int, weight: jax.Array | None = None
) -> jax.Array | np.ndarray:
    """Returns labels as they came if integers in [0, N); of weight 0 they may be anything."""
    labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    if not jnp.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name} must be integers, got {labels.dtype}")
    if isinstance(labels, jax.core.Tracer) or isinstance(weight, jax.core.Tracer):
        return labels
    known = np.asarray(labels)
    outside = (known < 0) | (known >= num_classes)
    if weight is not None:
        outside &= np.asarray(weight).astype(bool)
    if outside.any():
        index = int(np.flatnonzero(outside)[0])
        raise ValueError(
            f"{name} must be in [0, {num_classes}), got {known.ravel()[index]} at index {index}"
        )
    return labels


def one_hot(labels: jax.Array, num_classes: int, weight: jax.Array | None = None) -> jax.Array:
    """float32 (B, N), 1 at each label (B,); NaN along a traced label that is outside [0, N)."""
    labels = selected(jnp.asarray(check_labels("labels", labels, num_classes, weight)), weight)
    labels = labels if labels.dtype.itemsize >= 4 else labels.astype(jnp.int32)
    inside = (labels >= 0) & (labels < num_classes)
    return jnp.where(
        inside[..., None], jax.nn.one_hot(labels, num_classes, dtype=jnp.float32), jnp.nan
    )


def _counts(weight: Any, size: int) -> jax.Array:
    """(B,) bool: whether an example counts. NaN does, so that it comes out."""
    if np.shape(weight) != (size,):
        raise ValueError(
            f"weight must have shape {(size,)}, one for each example, got {np.shape(weight)}"
        )
    return jnp.asarray(weight).astype(bool)


def one_by_one(fn: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """`fn` of batches of one image, for each of x `(B, ...)`: what it skips is really skipped."""
    if x.shape[0] == 1:
        return fn(x)
    first = operator.itemgetter(0)
    return jax.lax.map(lambda image: jax.tree.map(first, fn(image[None])), x)
