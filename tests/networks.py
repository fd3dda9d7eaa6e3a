"""Networks drawn from a grammar, for differential tests: one function, many ways to compute it."""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax, nn

LAYERS = (
    *("conv", "conv", "strided", "grouped", "depthwise", "dilated", "transposed", "dense"),
    *("residual", "gate", "branches", "halves", "pool", "average", "nearest", "norm"),
    *("activation", "activation", "affine", "attention", "shuffle", "embedding"),
)
ACTIVATIONS = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "leaky relu": nn.leaky_relu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "hard swish": nn.hard_swish,
    "elu": nn.elu,
    "sigmoid": nn.sigmoid,
    "tanh": jnp.tanh,
}


@dataclasses.dataclass
class Network:
    """A drawn network: fn(params, x) of images (B, size, size, 3), or channels first.

    Attributes:
      layers: What was drawn, to say what failed.
      params: Its parameters.
      fn: The function.
      first: Whether images have their channels first.
    """

    layers: list[Any]
    params: dict[str, jax.Array] = dataclasses.field(repr=False)
    fn: Callable[..., Any] = dataclasses.field(repr=False)
    first: bool

    def images(self, count, seed=0):
        """Standard normal images."""
        shape = (count, 3, 8, 8) if self.first else (count, 8, 8, 3)
        values = np.random.default_rng(seed).standard_normal(shape)
        return jnp.asarray(values, jnp.float32)


@st.composite
def networks(draw, most=5):
    """Draws a `Network`, which shrinks."""
    return drawn(lambda several: draw(st.sampled_from(several)), most)


def numbered(number, most=8):
    """The network of that number."""
    return drawn(random.Random(number).choice, most)


def drawn(choose, most):
    """The network that is made of choices among several."""
    layers = [
        (choose(LAYERS), choose(range(1, 4)), choose(sorted(ACTIVATIONS)))
        for _ in range(choose(range(1, most + 1)))
    ]
    heads = choose(["logits", "logits", "softmax", "two", "map"])
    return build(layers, heads, choose([False, True]), choose([False, True]), choose(range(1000)))


def build(layers, heads, first=False, oihw=False, seed=0):
    """The network of these layers."""
    rng, params = np.random.default_rng(seed), {}

    def kernel(name, *shape):
        scale = np.sqrt(2 / np.prod(shape[:-1]))
        value = rng.standard_normal(shape).astype(np.float32) * np.float32(scale)
        params[name] = jnp.asarray(
            value.transpose(3, 2, 0, 1) if oihw and value.ndim == 4 else value
        )

    def vector(name, low, high, *shape):
        params[name] = jnp.asarray(rng.uniform(low, high, shape), jnp.float32)

    steps, channels = [], 3
    kernel("stem", 3, 3, 3, 8)
    steps.append(lambda p, x: nn.relu(conv(x, p["stem"], oihw)))
    channels = 8
    for i, (name, number, activation) in enumerate(layers):
        own, act = f"{i} {name}", ACTIVATIONS[activation]
        if name in ("conv", "strided", "dilated", "residual", "gate", "branches", "norm"):
            outputs = 4 * number if name in ("conv", "strided") else channels
            kernel(own, 3, 3, channels, outputs)
            vector(own + " scale", -1.5, 1.5, outputs)
            vector(own + " bias", -1, 1, outputs)
        step = STEPS[name]
        if name in ("grouped", "depthwise"):
            groups = channels if name == "depthwise" else 2
            kernel(own, 3, 3, channels // groups, channels)
        if name == "transposed":
            kernel(own, 3, 2, channels, channels)
        if name in ("dense", "attention"):
            kernel(own, channels, channels * (3 if name == "attention" else 1))
        if name == "halves":
            kernel(own, 3, 3, channels // 2, channels // 2)
        if name == "affine":
            vector(own + " scale", -2, 2, channels)
            vector(own + " bias", -1, 1, channels)
        if name == "embedding":
            vector(own, -1, 1, 1, 1, 1, channels)
        steps.append(lambda p, x, s=step, o=own, n=number, a=act: s(p, x, o, n, a, oihw))
        if name in ("conv", "strided"):
            channels = 4 * number
        if name == "branches":
            channels *= 2
    kernel("head", channels, 5)
    if heads == "two":
        kernel("second head", channels, 2)

    def fn(p, x):
        x = x.transpose(0, 2, 3, 1) if first else x
        for step in steps:
            x = step(p, x)
        if heads == "map":
            y = x @ p["head"]
            return y.transpose(0, 3, 1, 2) if first else y
        y = x.mean((1, 2)) @ p["head"]
        if heads == "softmax":
            return nn.softmax(y)
        return (y, nn.sigmoid(x @ p["second head"])) if heads == "two" else y

    return Network([*layers, heads, ("first", first), ("oihw", oihw)], params, fn, first)


def conv(x, kernel, oihw, stride=1, groups=1, dilation=1, spread=1):
    order = "OIHW" if oihw else "HWIO"
    if spread > 1:
        numbers = ("NHWC", order, "NHWC")
        return lax.conv_transpose(x, kernel, (spread,) * 2, "SAME", dimension_numbers=numbers)
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", order, "NHWC"),
        feature_group_count=groups,
    )


def _normed(p, x, own, oihw, **options):
    y = conv(x, p[own], oihw, **options)
    return y * p[own + " scale"] + p[own + " bias"]


def _attention(p, x, own, n, act, oihw):
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    q, k, v = jnp.split(rows @ p[own], 3, -1)
    scores = nn.softmax(jnp.einsum("bic,bjc->bij", q, k) / np.float32(np.sqrt(x.shape[-1])))
    return x + jnp.einsum("bij,bjc->bic", scores, v).reshape(x.shape)


def _gate(p, x, own, n, act, oihw):
    squeezed = x.mean((1, 2), keepdims=True)
    return x * nn.sigmoid(conv(squeezed, p[own], oihw))


def _halves(p, x, own, n, act, oihw):
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a, act(conv(b, p[own], oihw))], -1)


def _shuffle(p, x, own, n, act, oihw):
    y = x.reshape(*x.shape[:3], 2, -1)
    return y.swapaxes(3, 4).reshape(x.shape)


def _norm(p, x, own, n, act, oihw):
    y = conv(x, p[own], oihw)
    centred = y - y.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-3) * p[own + " scale"]


STEPS = {
    "conv": lambda p, x, own, n, act, oihw: act(_normed(p, x, own, oihw)),
    "strided": lambda p, x, own, n, act, oihw: act(_normed(p, x, own, oihw, stride=2)),
    "dilated": lambda p, x, own, n, act, oihw: act(_normed(p, x, own, oihw, dilation=2)),
    "grouped": lambda p, x, own, n, act, oihw: act(conv(x, p[own], oihw, groups=2)),
    "depthwise": lambda p, x, own, n, act, oihw: act(conv(x, p[own], oihw, groups=x.shape[-1])),
    "transposed": lambda p, x, own, n, act, oihw: act(conv(x, p[own], oihw, spread=2)),
    "dense": lambda p, x, own, n, act, oihw: act(x @ p[own]),
    "residual": lambda p, x, own, n, act, oihw: act(x + _normed(p, x, own, oihw)),
    "gate": _gate,
    "branches": lambda p, x, own, n, act, oihw: jnp.concatenate([x, _normed(p, x, own, oihw)], -1),
    "halves": _halves,
    "pool": lambda p, x, own, n, act, oihw: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, n, n, 1), "SAME"
    ),
    "average": lambda p, x, own, n, act, oihw: (
        lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "SAME") / 4.0
    ),
    "nearest": lambda p, x, own, n, act, oihw: jax.image.resize(
        x, (x.shape[0], x.shape[1] + n, x.shape[2] + n, x.shape[3]), "nearest"
    ),
    "norm": _norm,
    "activation": lambda p, x, own, n, act, oihw: act(x),
    "affine": lambda p, x, own, n, act, oihw: x * p[own + " scale"] + p[own + " bias"],
    "attention": _attention,
    "shuffle": _shuffle,
    "embedding": lambda p, x, own, n, act, oihw: x + p[own],
}
"""{layer: step(params, x, name, number, activation, oihw)}."""
