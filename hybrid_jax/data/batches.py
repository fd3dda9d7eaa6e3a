"""Batches that depend on (seed, epoch, step) alone, so that training resumes in mid-epoch."""

import functools
import sys
from collections.abc import Iterator

import numpy as np

from hybrid_jax import core
from hybrid_jax.data.labels import check_classes
from hybrid_jax.data.on_disk import OnDisk, read_ahead
from hybrid_jax.data.splits import Arrays

Batch = dict[str, np.ndarray]


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch goes through the examples, (count,); its arguments decide it."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def steps_per_epoch(arrays: Arrays, batch_size: int) -> int:
    """How many full batches an epoch has; the examples left over sit this epoch out."""
    return len(arrays.images) // core.check_integer("batch_size", batch_size, 1, len(arrays.images))


def batches(
    arrays: Arrays,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    steps: int | None = None,
    rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Iterates over shuffled full batches, epoch after epoch.

    What follows `start_step` is what an iterator from step 0 would give from there on. It ends
    before step `steps`, or never. Of images on disk grain reads the next batch meanwhile. `rows`
    are the positions in each batch that are read, as by one of several processes; None is all.

    Returns:
      Iterator over {'image': (B, H, W, C) uint8, 'label': (B, …) as of `Arrays`, if there are any,
      'index': (B,) int32}, the example's position in `arrays`.

    Example:
      >>> arrays = Arrays(np.zeros((10, 8, 8, 1), np.uint8), np.arange(10, dtype=np.int32))
      >>> whole = [batch['label'] for batch in batches(arrays, 4, seed=0, steps=5)]
      >>> resumed = [b['label'] for b in batches(arrays, 4, seed=0, start_step=3, steps=5)]
      >>> np.array_equal(whole[3:], resumed)
      True
    """
    per_epoch = steps_per_epoch(arrays, batch_size)
    labels = arrays.labels
    if labels is not None and labels.dtype.kind != "f":
        labels = check_classes("labels", labels, 2**31).astype(np.int32)
    core.check_integer("seed", seed, 0)
    core.check_integer("start_step", start_step, 0)
    stop = sys.maxsize if steps is None else core.check_integer("steps", steps, 0)
    order = functools.lru_cache(2)(lambda epoch: epoch_order(len(arrays.images), seed, epoch))

    def batch(step: int) -> Batch:
        epoch, place = divmod(step, per_epoch)
        index = order(epoch)[place * batch_size :][:batch_size]
        index = index if rows is None else index[rows]
        own = {} if labels is None else {"label": labels[index]}
        return {"image": arrays.images[index], **own, "index": index.astype(np.int32)}

    if isinstance(arrays.images, OnDisk):
        return read_ahead(batch, range(start_step, stop), threads=1, ahead=2)
    return map(batch, range(start_step, stop))
