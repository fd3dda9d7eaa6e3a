"""What a user has, as `Splits`: arrays, parts, or batches without labels."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from hybrid_jax.data.splits import Splits, from_arrays

UNLABELLED = 1024
"""How many images are taken of batches without labels."""


def take(data: Any, **options: Any) -> Splits:
    """Makes `Splits` of what a user has; `options` are those of `from_arrays`.

    `data` are `Splits`, which stay as they are; (images, labels), of which test and validation are
    held out; (train, validation, test), or a dict of these, each (images, labels); or images
    without labels, (n, H, W, C) or an iterable of such batches, from which more than calibration
    cannot be had. A batch is images, or a tuple whose first entry, or a mapping whose 'image', they
    are; the first `UNLABELLED` of all are taken, and are the same in each part.

    Example:
      >>> splits = take(np.full((4, 8, 8, 3), i, np.uint8) for i in range(3))
      >>> splits.train.images.shape, splits.label_kind
      ((12, 8, 8, 3), None)
    """
    if isinstance(data, Splits):
        if options:
            raise ValueError(f"{', '.join(options)} must not be given beside Splits")
        return data
    if isinstance(data, tuple) and len(data) == 2:
        data = {"train": data}
    elif isinstance(data, tuple) and len(data) == 3:
        data = dict(zip(("train", "validation", "test"), data))
    if not isinstance(data, Mapping):
        part = _unlabelled(data), None
        data = dict.fromkeys(("train", "validation", "test"), part)
    if "train" not in data or not data.keys() <= {"train", "validation", "test"}:
        raise ValueError(f"data must hold train, validation and test, got {', '.join(data)}")
    return from_arrays(**data, **options)


def _unlabelled(batches: Iterable[Any]) -> np.ndarray:
    """The first `UNLABELLED` images of a user's own batches, or of images that are an array."""
    taken, count = [], 0
    batches = [batches] if hasattr(batches, "shape") else batches
    if not isinstance(batches, Iterable):
        raise ValueError(f"data must be arrays, Splits or batches, got {type(batches).__name__}")
    for batch in batches:
        images = batch["image"] if isinstance(batch, Mapping) else batch
        images = np.asarray(images[0] if isinstance(images, tuple | list) else images)
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(
                f"batches must hold images (B, H, W, C) uint8, got {images.dtype}{images.shape}"
            )
        if taken and images.shape[1:] != taken[0].shape[1:]:
            raise ValueError(
                f"batches must hold images of one shape, got {images.shape[1:]} after "
                f"{taken[0].shape[1:]}"
            )
        taken.append(images[: UNLABELLED - count])
        count += len(taken[-1])
        if count == UNLABELLED:
            break
    if not count:
        raise ValueError("data must hold at least one image, got none")
    return np.concatenate(taken)
