"""What a user has, as `Splits`: arrays, parts, or batches without labels."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from hybrid_jax.data.reading import MEMORY
from hybrid_jax.data.splits import Splits, from_arrays

UNLABELLED = 1024
"""How many images are taken of batches without labels."""


def take(data: Any, **options: Any) -> Splits:
    """Makes `Splits` of what a user has; `options` are those of `from_arrays`.

    `data` are `Splits`, which stay as they are; (images, labels), of which test and validation are
    held out; (train, validation, test), or a dict of these, each (images, labels); or images
    without labels, (n, H, W, C), from which more than calibration cannot be had, and which are the
    same in each part; or an iterable of batches, as of `gathered`.

    Example:
      >>> splits = take(np.full((4, 8, 8, 3), i, np.uint8) for i in range(3))
      >>> splits.train.images.shape, splits.label_kind
      ((12, 8, 8, 3), None)
    """
    data = gathered(data)
    if isinstance(data, Splits):
        if options:
            raise ValueError(f"{', '.join(options)} must not be given beside Splits")
        return data
    if isinstance(data, tuple):
        names = ("train",) if len(data) == 2 else ("train", "validation", "test")
        data = dict(zip(names, (data,) if len(data) == 2 else data))
    if not isinstance(data, Mapping):
        data = dict.fromkeys(("train", "validation", "test"), (data, None))
    if "train" not in data or not data.keys() <= {"train", "validation", "test"}:
        raise ValueError(f"data must hold train, validation and test, got {', '.join(data)}")
    return from_arrays(**data, **options)


def gathered(data: Any, memory: int = MEMORY) -> Any:
    """Reads batches once and returns (images, labels), or images (n, H, W, C) without labels.

    What is no iterable of batches is returned as it is. A batch is images (B, H, W, C) uint8, or
    (images,), or (images, labels), labels (B, …) as of `from_arrays`; or a mapping of 'image' and
    maybe 'label'. Of batches without labels the first `UNLABELLED` images are taken; with labels,
    all, and ValueError is raised where they have more than `memory` bytes.

    Example:
      >>> batches = ((np.zeros((4, 8, 8, 3), np.uint8), np.arange(4)) for _ in range(3))
      >>> [array.shape for array in gathered(batches)]
      [(12, 8, 8, 3), (12,)]
    """
    whole = isinstance(data, tuple) and len(data) in (2, 3)
    if whole or isinstance(data, Splits | Mapping) or hasattr(data, "shape"):
        return data
    if not isinstance(data, Iterable):
        raise ValueError(f"data must be arrays, Splits or batches, got {type(data).__name__}")
    taken: list[tuple[np.ndarray, np.ndarray | None]] = []
    count = size = 0
    for number, batch in enumerate(data):
        images, labels = _parts(number, batch)
        _check_alike(number, (images, labels), taken[0] if taken else (images, labels))
        taken.append((images, labels))
        count, size = count + len(images), size + images.nbytes
        if labels is None and count >= UNLABELLED:
            break
        if size > memory:
            raise ValueError(
                f"batches must end within {memory} bytes of images, got {size} in {number + 1} "
                "batches: itertools.islice ends them, and data.load reads from disk"
            )
    if not taken:
        raise ValueError("data must hold at least one image, got none")
    images, labels = zip(*taken)
    if labels[0] is None:
        return np.concatenate(images)[:UNLABELLED]
    return np.concatenate(images), np.concatenate(labels)


def _parts(number: int, batch: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Images and labels of a batch."""
    if isinstance(batch, Mapping):
        batch = [batch[name] for name in ("image", "label") if name in batch]
    parts = list(batch) if isinstance(batch, tuple | list) else [batch]
    if len(parts) not in (1, 2):
        raise ValueError(
            f"batches must be images, or images and labels, got {len(parts)} parts in batch "
            f"{number}"
        )
    images, *labels = map(np.asarray, parts)
    if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
        raise ValueError(
            f"batches must hold images (B, H, W, C) uint8, B > 0, got "
            f"{images.dtype}{images.shape} in batch {number}"
        )
    if labels and labels[0].shape[:1] != images.shape[:1]:
        raise ValueError(
            f"batches must hold a label for each image, got labels {labels[0].shape} for "
            f"{len(images)} images in batch {number}"
        )
    return images, labels[0] if labels else None


def _check_alike(number: int, batch: tuple, first: tuple) -> None:
    """Raises ValueError unless a batch has labels, and shapes of one example, as the first has."""

    def told(part):
        return None if part is None else (part.dtype.kind, *part.shape[1:])

    for name, own, other in zip(("images", "labels"), batch, first):
        if told(own) != told(other):
            raise ValueError(
                f"batches must be alike, got {name} {_shown(own)} in batch {number} after "
                f"{_shown(other)}"
            )


def _shown(part: np.ndarray | None) -> str:
    return "none" if part is None else f"{part.dtype}{part.shape}"
