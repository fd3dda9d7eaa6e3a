"""Train, validation and test images, checked once, where they enter."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hybrid_jax import core
from hybrid_jax.data import labels as targets
from hybrid_jax.data.on_disk import OnDisk
from hybrid_jax.data.reading import MEMORY, Examples, Part, check_size, fit, fit_labels, read


class Arrays(NamedTuple):
    """Images and their labels, in memory or on disk.

    Attributes:
      images: (n, H, W, C) uint8.
      labels: int32 in [0, N), of images (n,) or of their pixels (n, H, W), where `core.VOID` does
        not count; float32 values (n,) or (n, D); or None.
    """

    images: np.ndarray | OnDisk
    labels: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Splits:
    """A data set whose three parts share image shape and classes.

    `validation` selects epochs, ranges and experts; `test` is read once, at the end. `class_names`
    are None where labels are no classes. `mean` and `std` are of C channels, of pixels from 0 to 1.
    `indices` has for each part the one given that its images are of, and their (n,) positions in
    it.
    """

    train: Arrays
    validation: Arrays
    test: Arrays
    class_names: tuple[str, ...] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    indices: dict[str, tuple[str, np.ndarray]]

    @property
    def num_classes(self) -> int | None:
        """The number of classes N; None where labels are no classes."""
        return None if self.class_names is None else len(self.class_names)

    @property
    def label_kind(self) -> str | None:
        """What labels are: 'classes', 'pixels', which have classes, or 'values'; None without."""
        return targets.label_kind(self.train.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (H, W, C) of one image."""
        return self.train.images.shape[1:]


def from_arrays(
    train: Part,
    test: Part | float | None = None,
    validation: Part | float | str | None = None,
    *,
    seed: int = 0,
    train_size: int | None = None,
    resize: int | Sequence[int] = (),
    crop: int | Sequence[int] = (),
    image_shape: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    void: int = core.VOID,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    memory: int = MEMORY,
) -> Splits:
    """Makes `Splits` of a user's own arrays.

    Every held-out or reduced part is stratified where labels are classes of images, and depends on
    `seed` alone; test images taken of train not even on that.

    `train` are images (n, H, W, C) or (n, H, W), uint8, and labels: integers or names of classes,
    (n,) or (n, 1); integers (n, H, W), the classes of pixels; floats (n,) or (n, D), values of a
    regression; or None. Anything `numpy.asarray` takes; or `Examples`, whose images stay on disk
    where they have more bytes than `memory`. Pixels of label `void` or -1 count in no loss and no
    score. `test` and `validation` are alike; or how many of
    train to take, a fraction below 1 or a whole number, of test as 'test:1000'; None is a fifth and
    a tenth. `train_size` train images are kept after that. `resize` and `crop` are as of `fit`;
    `image_shape` is the (H, W, C) that images must have, by default that of train. `class_names`
    are N in the order of their numbers; a label is a name, or a number where no name is one. None
    takes the names that the train labels have, sorted, or '0', '1', …. `mean` and `std` have a
    value for each channel, of pixels from 0 to 1; () takes those of the train images, with 1 for
    the deviation of a constant channel.

    Example:
      >>> images, labels = np.zeros((20, 8, 8), np.uint8), np.arange(20) % 2
      >>> splits = from_arrays((images, labels), (images, labels), validation='test:4')
      >>> splits.train.images.shape, splits.validation.images.shape, splits.num_classes
      ((20, 8, 8, 1), (4, 8, 8, 1), 2)
      >>> splits.indices['validation']
      ('test', array([ 4,  6, 13, 19]))
    """
    sizes = check_size("resize", resize), check_size("crop", crop)
    test, validation = 0.2 if test is None else test, 0.1 if validation is None else validation
    given = {"train": train, "test": test, "validation": validation}
    core.check_integer("memory", memory, 0)
    core.check_integer("void", void, core.VOID)
    parts = {
        n: _arrays(n, part, *sizes, memory, void) for n, part in given.items() if _is_part(part)
    }
    shape = tuple(image_shape or parts["train"].images.shape[1:])
    names = targets.class_names(parts["train"].labels, class_names)
    for name, values in (("mean", mean), ("std", std)):
        _check_moments(name, values, shape[-1])
    numbers = class_names is not None and not any(name.isdecimal() for name in names)
    first = parts["train"].labels
    parts = {n: _checked(n, part, shape, first, names, numbers) for n, part in parts.items()}
    indices = {n: (n, np.arange(len(part.images))) for n, part in parts.items()}

    def take(argument: str, amount: float | str, of: str, seed: int) -> None:
        source, index = indices[of]
        count = _held_out(argument, amount, of, len(index))
        chosen, rest = _divide(parts[source], index, count, seed)
        indices[argument], indices[of] = (source, chosen), (source, rest)

    if "test" not in parts:
        take("test", core.check_positive("test", test), "train", seed=0)
    if "validation" not in parts:
        of_test = isinstance(validation, str)
        take("validation", validation, "test" if of_test else "train", seed)
    if train_size is not None:
        source, index = indices["train"]
        core.check_integer("train_size", train_size, 1, len(index))
        indices["train"] = (source, _divide(parts[source], index, train_size, seed)[0])
    divided = {n: _part(parts[of], index) for n, (of, index) in indices.items()}
    computed = (mean, std) if mean and std else _moments(divided["train"].images)
    mean, std = (tuple(map(float, own or found)) for own, found in zip((mean, std), computed))
    return Splits(**divided, class_names=names, mean=mean, std=std, indices=indices)


def check_amount(name: str, value: float | str) -> float:
    """Returns the number in how many images to hold out: 0.1, 1000 or 'test:1000', as a float."""
    try:
        number = float(value.removeprefix("test:") if isinstance(value, str) else value)
    except (TypeError, ValueError):
        number = -1
    other = isinstance(value, bool) or (isinstance(value, str) and not value.startswith("test:"))
    if other or not (0 <= number < 1 or (number > 0 and number % 1 == 0)):
        raise ValueError(
            f"{name} must be a fraction below 1, a whole number, or either after 'test:', "
            f"got {value!r}"
        )
    return number


def stratified(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(count,) ascending indices of labels, of which every class keeps its share, rounded."""
    core.check_integer("count", count, 0, len(labels))
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    # How far through its own class each image comes; the first `count` of that order, over all
    # classes, take the same part of each.
    progress = np.empty(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, first, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    first, counts = np.repeat(first, counts), np.repeat(counts, counts)
    progress[by_class] = (np.arange(len(labels)) - first + 0.5) / counts
    return np.sort(shuffled[np.argsort(progress[shuffled], kind="stable")[:count]])


def _divide(
    arrays: Arrays, index: np.ndarray, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of the positions `index`, `count` chosen ones and the others."""
    by_class = targets.label_kind(arrays.labels) == "classes"
    labels = arrays.labels[index] if by_class else np.zeros(len(index), int)
    chosen = np.zeros(len(index), bool)
    chosen[stratified(labels, count, seed)] = True
    return index[chosen], index[~chosen]


def _part(arrays: Arrays, index: np.ndarray) -> Arrays:
    images, labels = arrays
    images = images.part(index) if isinstance(images, OnDisk) else images[index]
    return Arrays(images, None if labels is None else labels[index])


def _is_part(value: Any) -> bool:
    return isinstance(value, tuple | list)


def _held_out(argument: str, amount: float | str, of: str, available: int) -> int:
    number = check_amount(argument, amount)
    count = round(number * available) if number < 1 else int(number)
    if not 1 <= count < available:
        raise ValueError(
            f"{argument} must be a fraction in (0, 1) or a whole number that leaves {of} images "
            f"of {available}, got {amount!r}"
        )
    return count


def _arrays(
    name: str, part: Part, resize: tuple[int, ...], crop: tuple[int, ...], memory: int, void: int
) -> Arrays:
    """Of the right shapes and of one size; the labels as they came."""
    if isinstance(part, Examples):
        images, labels = read(name, part, resize, crop, memory)
        return Arrays(images, targets.shaped(name, labels, len(images), void))
    images, labels = part
    images = np.asarray(images)
    if np.issubdtype(images.dtype, np.integer) and images.dtype != np.uint8:
        inside = images.size and images.min() >= 0 and images.max() <= 255
        images = images.astype(np.uint8) if inside else images
    if images.dtype != np.uint8:
        raise ValueError(f"{name} images must be uint8 in [0, 255], got {images.dtype}")
    if images.ndim == 3:
        images = images[..., None]
    # (n, 3, 32, 32) is what PyTorch has.
    first = (
        images.ndim == 4 and images.shape[1] in (1, 3) and 4 < images.shape[2] == images.shape[3]
    )
    if images.ndim != 4 or not images.size or first:
        raise ValueError(
            f"{name} images must have shape (n, H, W, C) or (n, H, W), n > 0, got {images.shape}"
        )
    labels = targets.shaped(name, labels, len(images), void)
    if resize or crop:
        if targets.label_kind(labels) == "pixels":
            if labels.shape != images.shape[:3]:
                raise ValueError(
                    f"{name} labels must be of the images' size to be resized and cut alike, got "
                    f"{labels.shape[1:]} for {images.shape[1:3]}"
                )
            title, labels = f"labels of a {name} image", labels.astype(np.int32)
            labels = np.stack([fit_labels(title, own, resize, crop) for own in labels])
        images = np.stack([fit(f"a {name} image", image, resize, crop) for image in images])
    return Arrays(images, labels)


def _checked(name, part, shape, first, names, numbers):
    """With labels as `numbered` gives them, of the shape of the first ones."""
    images, labels = part
    if images.shape[1:] != shape:
        raise ValueError(f"{name} images must have shape {shape} each, got {images.shape[1:]}")
    own, other = (None if x is None else x.shape[1:] for x in (labels, first))
    if own != other:
        raise ValueError(f"{name} labels must have shape {other} each as in train, got {own}")
    return Arrays(images, targets.numbered(name, labels, names, numbers))


def _check_moments(name: str, values: Sequence[float], channels: int) -> None:
    inside = all(0 <= value <= 1 and (value or name == "mean") for value in values)
    if values and not (inside and len(values) == channels):
        raise ValueError(
            f"{name} must be {channels} values from 0 to 1, one for each channel, as pixels are "
            f"divided by 255 first, got {tuple(values)}"
        )


def _moments(images: np.ndarray | OnDisk) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if isinstance(images, OnDisk):
        images = images[np.unique(np.linspace(0, len(images) - 1, 1000).astype(int))]
    # From counts of the 256 values: exact, and without a float copy of the images.
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in np.moveaxis(images, -1, 0):
        share = np.bincount(channel.ravel(), minlength=256) / channel.size
        mean.append(float(share @ values))
        std.append(float(np.sqrt(share @ (values - mean[-1]) ** 2)) or 1.0)
    return tuple(mean), tuple(std)
