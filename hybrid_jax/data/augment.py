"""Pure, jittable functions of a batch of images (and a key)."""

from collections.abc import Callable, Sequence

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


def random_flip(images: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrors each image (B, H, W, C), of any dtype, left to right with probability one half."""
    flipped = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def in_place(augment: Augment) -> Augment:
    """Marks an augmentation that leaves every pixel where it is, so that its label stays right."""
    augment.in_place = True
    return augment


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

One that moves no pixel is marked by `in_place`.
"""


def augmentation(
    padding: int = 0,
    flip: bool = False,
    others: Sequence[str | Augment] = (),
    *,
    label_kind: str | None = "classes",
) -> Augment:
    """Makes the augmentation of a data set: (images (B, H, W, C), key) -> images alike.

    `padding` is the largest shift in pixels: 4 for CIFAR-10, 1 for 8×8 digits. `flip` is not
    for digits, whose mirror images are no digits. `others` follow in their order: functions of that
    kind, or names of `AUGMENTATIONS`. With labels of 'pixels', the `label_kind` of `Splits`, which
    would stay where they are, all must be `in_place`.
    """
    core.check_integer("padding", padding, 0)
    for other in others:
        if not callable(other):
            core.check_choice("augmentation", other, AUGMENTATIONS)
    functions = [other if callable(other) else AUGMENTATIONS[other] for other in others]
    if label_kind == "pixels":
        moving = [o for o, f in zip(others, functions) if not getattr(f, "in_place", False)]
        if moving := [*moving, *["padding"] * bool(padding), *["flip"] * flip]:
            raise ValueError(
                "augmentation must leave pixels that have labels where they are (`in_place`), "
                f"got {', '.join(map(str, moving))}"
            )

    def augment(images: jax.Array, key: jax.Array) -> jax.Array:
        shift_key, flip_key = jax.random.split(key)
        if padding:
            images = random_shift(images, shift_key, padding)
        images = random_flip(images, flip_key) if flip else images
        for i, (other, function) in enumerate(zip(others, functions)):
            made = function(images, jax.random.fold_in(key, i))
            core.check_same_structure(f"images after augmentation {other}", images, made)
            images = made
        return images

    return augment
