"""Train, validation and test images, checked once, where they enter."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hybrid_jax import core


class Arrays(NamedTuple):
    """Labelled images in memory.

    Attributes:
      images: (n, H, W, C) uint8.
      labels: (n,) int32, each in [0, N).
    """

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Splits:
    """A data set whose three parts share image shape and classes.

    Attributes:
      train: What weights are learned from.
      validation: Held out of train: selects epochs, ranges and experts.
      test: Read once, at the end.
      mean: C channel means of the train images, in [0, 1].
      std: C channel standard deviations of the train images, in [0, 1]; 1 where constant.
    """

    train: Arrays
    validation: Arrays
    test: Arrays
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        """The number of classes N."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (H, W, C) of one image."""
        return self.train.images.shape[1:]


def make_splits(
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    validation: tuple[Any, Any] | float = 0.1,
    *,
    seed: int = 0,
    train_size: int | None = None,
    image_shape: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
) -> Splits:
    """Makes `Splits` of a user's own arrays.

    Every held-out or reduced part is stratified by class and depends on `seed` alone.

    Args:
      train: Images (n, H, W, C) or (n, H, W), uint8, and labels (n,) or (n, 1), integers. Anything
        `numpy.asarray` takes: NumPy or JAX arrays, nested lists of ints.
      test: The same for the test images.
      validation: The same for the validation images; or how many of train to hold out for it,
        a fraction below 1 or a whole number.
      seed: Decides which images are held out.
      train_size: How many train images to keep after validation was held out; None keeps all.
      image_shape: The (H, W, C) that images must have; None takes that of train.
      class_names: N names; None names the classes of the train labels '0', '1', ..., no more than
        there are train images.

    Example:
      >>> images, labels = np.zeros((20, 8, 8), np.uint8), np.arange(20) % 2
      >>> splits = make_splits((images, labels), (images, labels), validation=4)
      >>> splits.train.images.shape, splits.validation.images.shape, splits.num_classes
      ((16, 8, 8, 1), (4, 8, 8, 1), 2)
    """
    parts = {"train": train, "test": test}
    if isinstance(validation, tuple):
        parts["validation"] = validation
    parts = {name: _arrays(name, *part) for name, part in parts.items()}
    shape = tuple(image_shape or parts["train"].images.shape[1:])
    if class_names is None:
        labels = parts["train"].labels
        core.check_labels("train labels, without class_names,", labels, len(labels))
        class_names = map(str, range(int(labels.max()) + 1))
    class_names = tuple(class_names)
    parts = {name: _checked(name, part, shape, len(class_names)) for name, part in parts.items()}
    if "validation" not in parts:
        count = _held_out(validation, len(parts["train"].labels))
        parts["validation"], parts["train"] = _divide(parts["train"], count, seed)
    if train_size is not None:
        core.check_integer("train_size", train_size, 1, len(parts["train"].labels))
        parts["train"], _ = _divide(parts["train"], train_size, seed)
    mean, std = _moments(parts["train"].images)
    return Splits(class_names=class_names, mean=mean, std=std, **parts)


def stratified(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Chooses `count` of the labels so that every class keeps its share of them.

    They come as (count,) indices, ascending. A class that holds a share p of the labels holds
    p × count of the chosen, up to rounding.

    Example:
      >>> labels = np.array([0] * 6 + [1] * 3)
      >>> np.bincount(labels[stratified(labels, 3, seed=0)])
      array([2, 1])
    """
    core.check_integer("count", count, 0, len(labels))
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    # How far through its own class each image comes; the first `count` of that order, over all
    # classes, take the same part of each.
    progress = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        progress[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(shuffled[np.argsort(progress[shuffled], kind="stable")[:count]])


def _divide(arrays: Arrays, count: int, seed: int) -> tuple[Arrays, Arrays]:
    chosen = np.zeros(len(arrays.labels), bool)
    chosen[stratified(arrays.labels, count, seed)] = True
    first = Arrays(arrays.images[chosen], arrays.labels[chosen])
    return first, Arrays(arrays.images[~chosen], arrays.labels[~chosen])


def _held_out(validation: float, available: int) -> int:
    count = round(validation * available) if 0 < validation < 1 else validation
    if count != int(count) or not 1 <= count < available:
        raise ValueError(
            "validation must be a fraction in (0, 1) or a whole number that leaves train images "
            f"of {available}, got {validation}"
        )
    return int(count)


def _arrays(name: str, images: Any, labels: Any) -> Arrays:
    """Of the right shapes; the labels as they came."""
    images, labels = np.asarray(images), np.asarray(labels)
    if np.issubdtype(images.dtype, np.integer) and images.dtype != np.uint8:
        inside = images.size and images.min() >= 0 and images.max() <= 255
        images = images.astype(np.uint8) if inside else images
    if images.dtype != np.uint8:
        raise ValueError(f"{name} images must be uint8 in [0, 255], got {images.dtype}")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or not images.size:
        raise ValueError(
            f"{name} images must have shape (n, H, W, C) or (n, H, W), n > 0, got {images.shape}"
        )
    if labels.shape not in ((len(images),), (len(images), 1)):
        raise ValueError(
            f"{name} labels must have shape ({len(images)},) as there are {len(images)} images, "
            f"got {labels.shape}"
        )
    return Arrays(images, labels.ravel())


def _checked(name: str, part: Arrays, shape: tuple[int, ...], num_classes: int) -> Arrays:
    if part.images.shape[1:] != shape:
        raise ValueError(f"{name} images must have shape {shape} each, got {part.images.shape[1:]}")
    labels = core.check_labels(f"{name} labels", part.labels, num_classes)
    return Arrays(part.images, labels.astype(np.int32))


def _moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # From counts of the 256 values: exact, and without a float copy of the images.
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in np.moveaxis(images, -1, 0):
        share = np.bincount(channel.ravel(), minlength=256) / channel.size
        mean.append(float(share @ values))
        std.append(float(np.sqrt(share @ (values - mean[-1]) ** 2)) or 1.0)
    return tuple(mean), tuple(std)
