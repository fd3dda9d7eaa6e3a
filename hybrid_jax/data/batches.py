"""Batches that depend on (seed, epoch, step) alone, so that training resumes in mid-epoch."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hybrid_jax import core
from hybrid_jax.data.augment import normalize
from hybrid_jax.data.splits import Arrays

Batch = dict[str, np.ndarray]


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch goes through the examples, (count,); its arguments decide it."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def steps_per_epoch(arrays: Arrays, batch_size: int) -> int:
    """How many full batches an epoch has; the examples left over sit this epoch out."""
    return len(arrays.labels) // core.check_integer("batch_size", batch_size, 1, len(arrays.labels))


def batches(
    arrays: Arrays, batch_size: int, *, seed: int, start_step: int = 0, steps: int | None = None
) -> Iterator[Batch]:
    """Iterates over shuffled full batches, epoch after epoch.

    What follows `start_step` is what an iterator from step 0 would give from there on. It ends
    before step `steps`, or never. `seed` decides the order.

    Returns:
      Iterator over {'image': (B, H, W, C) uint8, 'label': (B,) int32, 'index': (B,) int32}, where
      `index` is the example's position in `arrays`.

    Example:
      >>> arrays = Arrays(np.zeros((10, 8, 8, 1), np.uint8), np.arange(10, dtype=np.int32))
      >>> whole = [batch['label'] for batch in batches(arrays, 4, seed=0, steps=5)]
      >>> resumed = [b['label'] for b in batches(arrays, 4, seed=0, start_step=3, steps=5)]
      >>> np.array_equal(whole[3:], resumed)
      True
    """
    per_epoch = steps_per_epoch(arrays, batch_size)
    labels = core.check_labels("labels", arrays.labels, 2**31).astype(np.int32)
    core.check_integer("seed", seed, 0)
    core.check_integer("start_step", start_step, 0)
    if steps is not None:
        core.check_integer("steps", steps, 0)

    def generate() -> Iterator[Batch]:
        epoch, order = None, None
        for step in itertools.count(start_step) if steps is None else range(start_step, steps):
            if epoch != step // per_epoch:
                epoch = step // per_epoch
                order = epoch_order(len(arrays.labels), seed, epoch)
            first = step % per_epoch * batch_size
            index = order[first : first + batch_size]
            yield {
                "image": arrays.images[index],
                "label": labels[index],
                "index": index.astype(np.int32),
            }

    return generate()


def calibration(
    batches: Iterable[Any], mean: Sequence[float], std: Sequence[float]
) -> Iterator[tuple[jax.Array]]:
    """Yields a user's own batches as calibration takes them: (normalized images,), without labels.

    A batch is images (B, H, W, C) uint8, or a tuple whose first entry, or a mapping whose 'image',
    these are. `mean` and `std` are as of `normalize`.

    Example:
      >>> [(images,)] = calibration([np.full((2, 4, 4, 1), 255, np.uint8)], mean=(0.5,), std=(0.5,))
      >>> images.shape, float(images.max())
      ((2, 4, 4, 1), 1.0)
    """
    for batch in batches:
        images = batch["image"] if isinstance(batch, Mapping) else batch
        images = np.asarray(images[0] if isinstance(images, tuple | list) else images)
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(
                f"batches must hold images (B, H, W, C) uint8, got {images.dtype}{images.shape}"
            )
        yield (normalize(images, mean, std),)
