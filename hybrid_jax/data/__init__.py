"""Labelled images: sources, splits, resumable batches, augmentation; `SOURCES`, `AUGMENTATIONS`."""

from hybrid_jax.data.augment import (
    AUGMENTATIONS,
    Augmentation,
    augmentation,
    in_place,
    moving,
    normalize,
    random_flip,
    random_shift,
)
from hybrid_jax.data.batches import batches, epoch_order, steps_per_epoch
from hybrid_jax.data.on_disk import OnDisk
from hybrid_jax.data.reading import MEMORY, Examples, Source, check_size, fit
from hybrid_jax.data.sources import SOURCES, load
from hybrid_jax.data.splits import Arrays, Splits, check_amount, from_arrays, stratified
from hybrid_jax.data.take import gathered, take
