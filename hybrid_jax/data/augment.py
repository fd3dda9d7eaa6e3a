"""Pure, jittable functions of a batch of images (and a key)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax import core

Augment = Callable[[jax.Array, jax.Array], jax.Array]


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """(images / 255 - mean) / std, float32, of uint8 (B, H, W, C); `mean` and `std` are (C,)."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != images.shape[-1]:
            raise ValueError(
                f"{name} must have one value for each of {images.shape[-1]} channels, got {values}"
            )
    mean, std = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, -1) for v in (mean, std))
    return (images.astype(jnp.float32) / 255 - mean) / std


def random_shift(images: jax.Array, key: jax.Array, padding: int) -> jax.Array:
    """Pads images (B, H, W, C) with zeros and crops each back to its size at a random place."""
    core.check_integer("padding", padding, 0, min(images.shape[1:3]) - 1)
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jax.random.randint(key, (images.shape[0], 2), 0, 2 * padding + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*corner, jnp.int32(0)), images.shape[1:])

    return jax.vmap(crop)(padded, corners)


def in_place(augment: Augment) -> Augment:
    """Marks an augmentation that leaves every pixel where it is, so that its label stays right."""
    augment.in_place = True
    return augment


def moving(augment: Augment) -> Augment:
    """Marks an augmentation that only moves pixels, zeros coming in, of any dtype and C.

    By the same key it moves the labels of these pixels as well.
    """
    augment.moving = True
    return augment


@moving
def random_flip(images: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrors each image (B, H, W, C), of any dtype, left to right with probability one half."""
    flipped = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


@in_place
def brightness(images: jax.Array, key: jax.Array) -> jax.Array:
    """Multiplies each image of uint8 by a factor of its own, uniform in [0.8, 1.2)."""
    factor = jax.random.uniform(key, (images.shape[0], 1, 1, 1), minval=0.8, maxval=1.2)
    return jnp.clip(jnp.round(images.astype(jnp.float32) * factor), 0, 255).astype(images.dtype)


@in_place
def cutout(images: jax.Array, key: jax.Array) -> jax.Array:
    """Blackens a square, half the shorter side, at random: DeVries, Taylor, arXiv 1708.04552."""
    count, height, width, _ = images.shape

    def near(key: jax.Array, size: int) -> jax.Array:
        centres = jax.random.randint(key, (count, 1), 0, size)
        return jnp.abs(jnp.arange(size)[None] - centres) <= min(height, width) // 4

    rows, columns = map(near, jax.random.split(key), (height, width))
    inside = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(inside, jnp.zeros((), images.dtype), images)


AUGMENTATIONS: dict[str, Augment] = {
    "flip": random_flip,
    "brightness": brightness,
    "cutout": cutout,
}
"""Augmentations by name, open to users: (images (B, H, W, C) uint8, key) -> images as they were.

One that moves no pixel is marked by `in_place`, one that does nothing else by `moving`.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Augmentation:
    """The augmentation of a data set: (images (B, H, W, C), key) -> images alike.

    `labels`, (labels (B, H, W), key) -> labels, moves those of pixels by what it moves these; what
    comes in from outside of the image is void. None where labels are of no pixels.
    """

    images: Augment
    labels: Augment | None = None

    def __call__(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """Returns `images(images, key)`."""
        return self.images(images, key)


def augmentation(
    padding: int = 0,
    flip: bool = False,
    others: Sequence[str | Augment] = (),
    *,
    label_kind: str | None = "classes",
) -> Augmentation:
    """Makes the augmentation of a data set.

    `padding` is the largest shift in pixels: 4 for CIFAR-10, 1 for 8×8 digits. `flip` is not
    for digits, whose mirror images are no digits. `others` follow in their order: functions of that
    kind, or names of `AUGMENTATIONS`. With labels of 'pixels', the `label_kind` of `Splits`, each
    must be `in_place` or `moving`, so that labels stay where their pixels are.

    Example:
      >>> flip = augmentation(flip=True, label_kind='pixels')
      >>> labels, key = jnp.arange(3).reshape(1, 1, 3), jax.random.key(1)
      >>> flip(labels[..., None], key)[..., 0].tolist(), flip.labels(labels, key).tolist()
      ([[[2, 1, 0]]], [[[2, 1, 0]]])
    """
    core.check_integer("padding", padding, 0)
    for other in others:
        if not callable(other):
            core.check_choice("augmentation", other, AUGMENTATIONS)
    functions = [other if callable(other) else AUGMENTATIONS[other] for other in others]
    if label_kind == "pixels":
        marks = ("in_place", "moving")
        unmarked = [o for o, f in zip(others, functions) if not any(hasattr(f, m) for m in marks)]
        if unmarked:
            raise ValueError(
                "augmentation must be marked as `in_place` or `moving` where pixels have labels, "
                f"got {', '.join(map(str, unmarked))}"
            )
    shift = moving(functools.partial(random_shift, padding=padding))
    first = [("padding", shift)] * bool(padding), [("flip", random_flip)] * flip
    drawn = [(*own, lambda key, i=i: jax.random.split(key)[i]) for i in (0, 1) for own in first[i]]
    drawn += [
        (other, function, lambda key, i=i: jax.random.fold_in(key, i))
        for i, (other, function) in enumerate(zip(others, functions))
    ]

    def over(chosen: list[Any]) -> Augment:
        def augment(images: jax.Array, key: jax.Array) -> jax.Array:
            for name, function, draw in chosen:
                made = function(images, draw(key))
                core.check_same_structure(f"images after augmentation {name}", images, made)
                images = made
            return images

        return augment

    moved = over([own for own in drawn if hasattr(own[1], "moving")])

    def of_labels(labels: jax.Array, key: jax.Array) -> jax.Array:
        # The zeros that come in are to be void.
        return moved(labels[..., None] - core.VOID, key)[..., 0] + core.VOID

    return Augmentation(over(drawn), of_labels if label_kind == "pixels" else None)
