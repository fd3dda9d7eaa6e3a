"""Labelled images in memory: sources, splits, resumable batches and augmentation."""

from hybrid_jax.data.augment import augmentation, normalize, random_flip, random_shift
from hybrid_jax.data.batches import batches, epoch_order, steps_per_epoch
from hybrid_jax.data.sources import SOURCES, load
from hybrid_jax.data.splits import Arrays, Splits, make_splits, stratified

__all__ = [
    "SOURCES",
    "Arrays",
    "Splits",
    "augmentation",
    "batches",
    "epoch_order",
    "load",
    "make_splits",
    "normalize",
    "random_flip",
    "random_shift",
    "steps_per_epoch",
    "stratified",
]
