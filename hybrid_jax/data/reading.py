"""What a source gives: arrays, or examples that are read one by one and made of one size."""

import contextlib
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from hybrid_jax import core
from hybrid_jax.data.on_disk import OnDisk

MEMORY = 2**32
"""Bytes of a part's images that are held in memory; those of a larger part stay on disk."""

Example = tuple[str, Callable[[], np.ndarray], int | str | Callable[[], np.ndarray]]
"""Its name in errors, what reads its image (h, w, C) uint8, its label, or what reads that of each
of its pixels, (h, w) uint8."""


class Examples(NamedTuple):
    """Images that are read when they are needed, each of a size of its own.

    `at` goes from numbers in [0, count) to their examples, in this order; threads may call it.

    Example:
      >>> def at(numbers):
      ...     for i in numbers:
      ...         yield f'image {i}', lambda: np.zeros((2, 2, 3), np.uint8), i % 2
      >>> images, labels = read('train', Examples(4, at))
      >>> images.shape, labels
      ((4, 2, 2, 3), array([0, 1, 0, 1]))
    """

    count: int
    at: Callable[[Sequence[int]], Iterable[Example]]


Part = tuple[Any, Any] | Examples
"""Images and labels, or examples of both. Labels are integers or names of classes, or values."""


class Source(NamedTuple):
    """What a source reads: its parts, None where it has no such images, and its class names."""

    train: Part
    test: Part | None = None
    validation: Part | None = None
    class_names: tuple[str, ...] | None = None


def existing(argument: str, path: str | os.PathLike | None, expected: str) -> pathlib.Path:
    """Returns the path `argument` if it leads anywhere; `expected` says what it must be."""
    if path is None or not pathlib.Path(path).exists():
        got = path if path is None else os.fspath(path)
        raise ValueError(f"{argument} must be {expected}, got {got!r} (no such path)")
    return pathlib.Path(path)


def read_text(argument: str, path: str | os.PathLike | None, expected: str) -> str:
    """Returns the text of the file `argument`, in UTF-8."""
    try:
        return existing(argument, path, expected).read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{argument} must be {expected} in UTF-8, got {path} ({error})") from error


def check_size(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    """Returns a size as (), (side,) or (H, W); it is one whole number or at most two."""
    sides = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(sides) > 2:
        raise ValueError(f"{name} must be one side or (height, width), got {value!r}")
    return tuple(core.check_integer(name, side, 1, 2**14) for side in sides)


def read(
    title: str,
    examples: Examples,
    resize: Sequence[int] = (),
    crop: Sequence[int] = (),
    memory: int = MEMORY,
) -> tuple[np.ndarray | OnDisk, np.ndarray]:
    """Images (n, H, W, C) uint8, by `fit`, on disk if more than `memory` bytes, and labels.

    These are (n,), or of pixels (n, H, W), by `fit_labels` and in memory.
    """
    if not examples.count:
        raise ValueError(f"{title} must hold images, got none")

    def fitted(example: Example) -> np.ndarray:
        image = _fitted(example, resize, crop)
        if image.shape != shape:
            raise ValueError(
                f"images must all have one size, got {image.shape} of {example[0]} and {shape} "
                f"of {first[0]}; give resize, crop or both"
            )
        return image

    def some(numbers: Sequence[int]) -> list[np.ndarray]:
        return list(map(fitted, examples.at(numbers)))

    first = next(iter(examples.at([0])))
    shape = _fitted(first, resize, crop).shape
    images: np.ndarray | OnDisk = OnDisk(some, np.arange(examples.count), shape)
    if held := math.prod(images.shape) <= memory:
        images = np.empty(images.shape, np.uint8)

    def label(name: str, own: Any) -> Any:
        if not callable(own):
            return own
        found = fit_labels(f"labels of {name}", own(), resize, crop)
        if found.shape != shape[:2]:
            raise ValueError(f"labels of {name} must have its size {shape[:2]}, got {found.shape}")
        return found

    # Errors are raised in here, where the bar is taken down with them.
    def each() -> Iterator[Any]:
        for i, example in enumerate(examples.at(range(examples.count))):
            if held:
                images[i] = fitted(example)
            yield label(example[0], example[2])

    console = Console(stderr=True)
    bar = {"console": console, "transient": True, "disable": not console.is_terminal}
    labels = list(track(each(), f"Reading {title}", examples.count, **bar))
    return images, np.asarray(labels)


def fit(
    name: str,
    image: np.ndarray,
    resize: Sequence[int] = (),
    crop: Sequence[int] = (),
    resample: str = "BILINEAR",
) -> np.ndarray:
    """Resizes an image (h, w, C) uint8, then cuts its centre out.

    `resize` is (), the short side as (side,), or (H, W): by `resample` of Pillow, bilinear with
    antialiasing. `crop` is (), (side,) of a square, or (H, W). Both are rounded as torchvision
    does. Errors call it `name`.
    """
    if resize:
        sides = image.shape[:2]
        size = resize if len(resize) == 2 else [resize[0] * s // min(sides) for s in sides]
        image = _resized(image, *size, resample)
    if crop:
        height, width = crop if len(crop) == 2 else crop * 2
        if height > image.shape[0] or width > image.shape[1]:
            raise ValueError(
                f"crop must fit into the images, got {(height, width)} for {name} of "
                f"{image.shape[:2]}"
            )
        top, left = (round((a - b) / 2) for a, b in zip(image.shape, (height, width)))
        image = image[top : top + height, left : left + width]
    return image


def fit_labels(
    name: str, labels: np.ndarray, resize: Sequence[int] = (), crop: Sequence[int] = ()
) -> np.ndarray:
    """As `fit`, of the labels (h, w) of an image's pixels, each of which takes the nearest one.

    Example:
      >>> fit_labels('it', np.uint8([[0, 7]]), resize=(1, 4))
      array([[0, 0, 7, 7]], dtype=uint8)
    """
    return fit(name, labels[..., None], resize, crop, "NEAREST")[..., 0]


def decode(name: str, file: str | os.PathLike | BinaryIO, channels: int) -> np.ndarray:
    """Decodes an image file to (h, w, channels) uint8, turned as its EXIF data says."""
    with opened(name, file) as image:
        from PIL import ImageOps

        if image.mode.startswith(("I", "F")):
            raise ValueError(f"pixels of mode {image.mode}")
        mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        pixels = np.asarray(ImageOps.exif_transpose(image).convert(mode))
    return pixels.reshape(*pixels.shape[:2], channels)


def decode_labels(name: str, file: str | os.PathLike, image: str | os.PathLike) -> np.ndarray:
    """Decodes a label image (h, w) uint8, of one channel or of palette indices, of `image`."""
    with opened(image, image) as of:
        turned = of.getexif().get(0x0112, 1) >= 5  # by a quarter, as `decode` does
        size = of.size if turned else of.size[::-1]
    with opened(name, file) as own:
        if own.mode not in ("L", "P", "1"):
            raise ValueError(f"labels of mode {own.mode}, not L, P or 1")
        labels = np.asarray(own).astype(np.uint8)
    if labels.shape != size:
        raise ValueError(f"{name} must have the size {size} of its image, got {labels.shape}")
    return labels


@contextlib.contextmanager
def opened(name: str, file: str | os.PathLike | BinaryIO) -> Iterator[Any]:
    """Opens an image with Pillow; what goes wrong with it, there or inside, names it."""
    pillow = _pillow()
    try:
        with pillow.open(file) as image:
            yield image
    except Exception as error:  # a decoder meets a damaged file with whatever it stumbles over
        raise ValueError(f"{name} must be an image of 8 bits a channel, got {error}") from error


def _fitted(example: Example, resize: Sequence[int], crop: Sequence[int]) -> np.ndarray:
    name, image = example[0], example[1]()
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError(f"{name} must be (h, w, C) uint8, got {image.shape} {image.dtype}")
    return fit(name, image, resize, crop)


def _resized(image: np.ndarray, height: int, width: int, resample: str) -> np.ndarray:
    """Channel by channel, so that there may be any number of them."""
    pillow = _pillow()
    how = {"size": (width, height), "resample": pillow.Resampling[resample]}
    channels = [pillow.fromarray(c).resize(**how) for c in np.moveaxis(image, -1, 0).copy()]
    return np.stack(channels, axis=-1)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("image files and resize need Pillow: pip install pillow") from error
    return Image
