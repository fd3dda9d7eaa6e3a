"""Whole networks as their authors write them, small: what is deployed must be right of each.

In Flax Linen and NNX, at 32 pixels, on crops of the photographs that scikit-learn ships.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets
from flax import nnx

from hybrid_jax import core


class Network(NamedTuple):
    """fn(params, x) and 16 photographs (B, 32, 32, 3), of which its statistics are."""

    fn: Callable[..., Any]
    params: Any
    images: jax.Array


@functools.cache
def photographs(count: int, size: int = 32) -> np.ndarray:
    """Crops of two photographs at half their size: uint8 (count, size, size, 3)."""
    whole = [image[::2, ::2] for image in sklearn.datasets.load_sample_images().images]
    crops = [
        image[i : i + size, j : j + size]
        for image in whole
        for i in range(0, image.shape[0] - size + 1, size)
        for j in range(0, image.shape[1] - size + 1, size)
    ]
    order = np.random.default_rng(0).permutation(len(crops))[:count]
    return np.stack([crops[i] for i in order])


# Statistics are those of the last batch in training mode.
batch_norm = functools.partial(nn.BatchNorm, momentum=0.0)


class ConvNorm(nn.Module):
    """A convolution, BatchNorm and an activation."""

    features: int
    kernel: int = 3
    stride: int = 1
    activation: Callable = nn.relu

    @nn.compact
    def __call__(self, x, train):
        size = (self.kernel, self.kernel)
        x = nn.Conv(self.features, size, self.stride, use_bias=False)(x)
        return self.activation(batch_norm(not train)(x))


class UNet(nn.Module):
    """Ronneberger et al., arXiv 1505.04597: skips are concatenated; a class for each pixel."""

    transposed: bool
    widths: tuple[int, ...] = (8, 16, 32)

    @nn.compact
    def __call__(self, x, train=False):
        def double(x, width):
            return ConvNorm(width)(ConvNorm(width)(x, train), train)

        skips = []
        for width in self.widths[:-1]:
            x = double(x, width)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = double(x, self.widths[-1])
        for width, skip in zip(self.widths[-2::-1], skips[::-1], strict=True):
            if self.transposed:
                x = nn.ConvTranspose(width, (2, 2), (2, 2))(x)
            else:
                b, h, w, c = x.shape
                x = nn.Conv(width, (1, 1))(jax.image.resize(x, (b, 2 * h, 2 * w, c), "bilinear"))
            x = double(jnp.concatenate([skip, x], axis=-1), width)
        return nn.Conv(5, (1, 1))(x)


class C2f(nn.Module):
    """YOLOv8's: halves, of which one goes through bottlenecks, and all are concatenated."""

    features: int
    count: int = 1
    shortcut: bool = True

    @nn.compact
    def __call__(self, x, train):
        block = functools.partial(ConvNorm, activation=nn.silu)
        parts = jnp.split(block(self.features, 1)(x, train), 2, axis=-1)
        for _ in range(self.count):
            y = block(self.features // 2)(block(self.features // 2)(parts[-1], train), train)
            parts.append(parts[-1] + y if self.shortcut else y)
        return block(self.features, 1)(jnp.concatenate(parts, axis=-1), train)


class SPPF(nn.Module):
    """Pyramid pooling of YOLOv5: one window three times over."""

    features: int

    @nn.compact
    def __call__(self, x, train):
        block = functools.partial(ConvNorm, activation=nn.silu)
        parts = [block(self.features // 2, 1)(x, train)]
        for _ in range(3):
            parts.append(nn.max_pool(parts[-1], (5, 5), (1, 1), "SAME"))
        return block(self.features, 1)(jnp.concatenate(parts, axis=-1), train)


class Yolo(nn.Module):
    """A detector after YOLOv8: boxes (B, N, 4) in pixels, scores (B, N, classes)."""

    classes: int = 3
    bins: int = 8

    @nn.compact
    def __call__(self, x, train=False):
        block = functools.partial(ConvNorm, activation=nn.silu)
        size = x.shape[1]
        x = x.astype(jnp.float32) / 255.0
        x = block(8, stride=2)(x, train)
        p3 = C2f(16, 1)(block(16, stride=2)(x, train), train)
        p4 = C2f(24, 2)(block(24, stride=2)(p3, train), train)
        p5 = SPPF(32)(C2f(32)(block(32, stride=2)(p4, train), train), train)
        up = jax.image.resize(p5, (*p4.shape[:3], 32), "nearest")
        n4 = C2f(24, 1, False)(jnp.concatenate([up, p4], axis=-1), train)
        up = jax.image.resize(n4, (*p3.shape[:3], 24), "nearest")
        n3 = C2f(16, 1, False)(jnp.concatenate([up, p3], axis=-1), train)
        down = block(16, stride=2)(n3, train)
        m4 = C2f(24, 1, False)(jnp.concatenate([down, n4], axis=-1), train)
        boxes, scores = zip(*(self.head(level, size, train) for level in (n3, m4)), strict=True)
        return jnp.concatenate(boxes, axis=1), jnp.concatenate(scores, axis=1)

    def head(self, x, size, train):
        """Distances to the four sides as means of bins, from the centre of each cell."""
        block = functools.partial(ConvNorm, activation=nn.silu)
        b, h, w, _ = x.shape
        distances = nn.Conv(4 * self.bins, (1, 1))(block(16)(x, train))
        weights = nn.softmax(distances.reshape(b, h * w, 4, self.bins), axis=-1)
        distances = jnp.sum(weights * jnp.arange(self.bins, dtype=jnp.float32), axis=-1)
        rows, columns = jnp.meshgrid(jnp.arange(h) + 0.5, jnp.arange(w) + 0.5, indexing="ij")
        centres = jnp.stack([columns, rows], axis=-1).reshape(1, h * w, 2)
        ends = [centres - distances[..., :2], centres + distances[..., 2:]]
        boxes = jnp.concatenate(ends, axis=-1) * (size / h)
        scores = nn.Conv(self.classes, (1, 1))(block(16)(x, train))
        return boxes, nn.sigmoid(scores).reshape(b, h * w, self.classes)


class ConvNeXt(nn.Module):
    """Liu et al., arXiv 2201.03545."""

    widths: tuple[int, ...] = (16, 32)
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            if i == 0:
                x = nn.LayerNorm(epsilon=1e-6)(nn.Conv(width, (4, 4), (4, 4), "VALID")(x))
            else:
                x = nn.Conv(width, (2, 2), (2, 2), "VALID")(nn.LayerNorm(epsilon=1e-6)(x))
            for j in range(2):
                y = nn.Conv(width, (7, 7), feature_group_count=width)(x)
                y = nn.LayerNorm(epsilon=1e-6)(y)
                y = nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(y)))
                x = x + y * self.param(f"gamma_{i}_{j}", nn.initializers.constant(0.5), (width,))
        return nn.Dense(self.classes)(nn.LayerNorm(epsilon=1e-6)(x.mean(axis=(1, 2))))


class Unit(nnx.Module):
    """ShuffleNetV2's unit: one half goes through, or at stride 2 two branches do."""

    def __init__(self, inputs, outputs, stride, rngs):
        self.stride, half = stride, outputs // 2
        norm = functools.partial(nnx.BatchNorm, momentum=0.0, rngs=rngs)
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        taken = inputs if stride == 2 else inputs // 2

        def depthwise(width):
            return conv(width, width, (3, 3), stride, feature_group_count=width)

        own = [conv(taken, half, (1, 1)), norm(half), nnx.relu, depthwise(half), norm(half)]
        self.own = nnx.Sequential(*own, conv(half, half, (1, 1)), norm(half), nnx.relu)
        if stride == 2:
            other = [depthwise(inputs), norm(inputs), conv(inputs, half, (1, 1)), norm(half)]
            self.other = nnx.Sequential(*other, nnx.relu)

    def __call__(self, x):
        if self.stride == 2:
            x = jnp.concatenate([self.other(x), self.own(x)], axis=-1)
        else:
            kept, moved = jnp.split(x, 2, axis=-1)
            x = jnp.concatenate([kept, self.own(moved)], axis=-1)
        b, h, w, c = x.shape
        return x.reshape(b, h, w, 2, c // 2).swapaxes(3, 4).reshape(b, h, w, c)


class ShuffleNetV2(nnx.Module):
    """Ma et al., arXiv 1807.11164: channels are split and shuffled."""

    def __init__(self, rngs, widths=(8, 16, 32), classes=10):
        norm = functools.partial(nnx.BatchNorm, momentum=0.0, rngs=rngs)
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.stem = nnx.Sequential(conv(3, widths[0], (3, 3), 2), norm(widths[0]), nnx.relu)
        units = []
        for inputs, outputs in itertools.pairwise(widths):
            units += [Unit(inputs, outputs, 2, rngs), Unit(outputs, outputs, 1, rngs)]
        self.units = nnx.Sequential(*units)
        self.last = nnx.Sequential(conv(widths[-1], 48, (1, 1)), norm(48), nnx.relu)
        self.head = nnx.Linear(48, classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(self.stem(x), (3, 3), (2, 2), "SAME")
        return self.head(self.last(self.units(x)).mean(axis=(1, 2)))


class Encoder(nnx.Module):
    """A block of a transformer, normalized before."""

    def __init__(self, width, rngs):
        self.before = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.between = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.before(x))
        return x + self.down(nnx.gelu(self.up(self.between(x))))


class ViT(nnx.Module):
    """Dosovitskiy et al., arXiv 2010.11929: patches, a class token, a learned place for each."""

    def __init__(self, rngs, width=32, classes=10, patch=8, size=32):
        count = (size // patch) ** 2
        normal = nnx.initializers.normal(0.5)
        window = (patch, patch)
        self.patches = nnx.Conv(3, width, window, patch, padding="VALID", rngs=rngs)
        self.token = nnx.Param(normal(rngs.params(), (1, 1, width)))
        self.places = nnx.Param(normal(rngs.params(), (1, count + 1, width)))
        self.blocks = nnx.Sequential(Encoder(width, rngs), Encoder(width, rngs))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.broadcast_to(self.token[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1) + self.places[...]
        return self.head(self.norm(self.blocks(x))[:, 0])


def _drawn(params):
    """As after training: no scale is at its initial 1, no bias at 0."""
    random = np.random.default_rng(0)

    def leaf(path, value):
        name = path.rpartition("/")[2]
        if name not in ("scale", "bias"):
            return value
        noise = random.uniform(-0.5, 0.5, value.shape) + (name == "scale")
        return jnp.asarray(noise, jnp.float32)

    return core.map_with_path(leaf, params)


def _linen(module, images):
    variables = jax.jit(module.init)(jax.random.key(0), images[:1])
    variables = {"params": _drawn(variables["params"])} | {
        name: own for name, own in variables.items() if name != "params"
    }
    if "batch_stats" in variables:
        train = jax.jit(lambda v, x: module.apply(v, x, True, mutable=["batch_stats"])[1])
        variables = variables | train(variables, images)
    return Network(lambda params, x: module.apply(params, x), variables, images)


def _nnx(kind, images):
    def made():
        model = kind(nnx.Rngs(0))
        nnx.update(model, _drawn(nnx.state(model, nnx.Param)))
        model.train()
        model(images)
        model.eval()
        return model

    with jax.numpy_rank_promotion("allow"):
        graphdef, state = nnx.split(made())
    return Network(lambda params, x: nnx.merge(graphdef, params)(x), state, images)


ARCHITECTURES = {
    "unet": lambda x: _linen(UNet(True), x),
    "unet_bilinear": lambda x: _linen(UNet(False), x),
    "yolo": lambda x: _linen(Yolo(), x),
    "convnext": lambda x: _linen(ConvNeXt(), x),
    "shufflenet": lambda x: _nnx(ShuffleNetV2, x),
    "vit": lambda x: _nnx(ViT, x),
}


@functools.cache
def architecture(name: str) -> Network:
    """The network of that name; the detector takes uint8, the others floats in [0, 1]."""
    images = jnp.asarray(photographs(16))
    return ARCHITECTURES[name](images if name == "yolo" else images.astype(jnp.float32) / 255)
