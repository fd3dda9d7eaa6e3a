"""Layers and blocks of convolutional networks, as people write them: what `lower` must take."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

relu = nn.relu


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed + sum(shape)).standard_normal(shape), jnp.float32)


def conv(x, kernel, stride=1, padding="SAME", groups=1, dilation=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def rows(x):
    """(B, H, W, C) as (B, H · W, C)."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def norm(module, x, **options):
    channels = x.shape[-1]
    params = {"scale": jnp.linspace(0.5, 1.5, channels), "bias": jnp.linspace(-1, 1, channels)}
    return module(**options).apply({"params": params}, x)


def blur(x):
    kernel = jnp.asarray(np.outer([1, 2, 1], [1, 2, 1]) / 16, jnp.float32)[:, :, None, None]
    return conv(x, jnp.tile(kernel, (1, 1, 1, x.shape[-1])), 2, groups=x.shape[-1])


def attention(p, x):
    q, k, v = jnp.split(rows(x) @ p["qkv"], 3, -1)
    scores = jnp.einsum("bic,bjc->bij", q, k) / 2.0
    return jnp.einsum("bij,bjc->bic", nn.softmax(scores), v)


def split(x, count=2):
    return jnp.split(x, count, -1)


def ghost(p, x):
    y = relu(conv(x, p["c"]))
    return jnp.concatenate([y, relu(conv(y, p["d"], groups=4))], -1)


def c2f(p, x):
    a, b = split(nn.silu(x @ p["one"]))
    c = nn.silu(conv(b, p["c2"]))
    return jnp.concatenate([a, b, c], -1)


def sppf(x):
    y = nn.max_pool(x, (3, 3), (1, 1), "SAME")
    return jnp.concatenate([x, y, nn.max_pool(y, (3, 3), (1, 1), "SAME")], -1)


def shuffle(p, x):
    a, b = split(x)
    y = jnp.concatenate([a, relu(conv(b, p["c2"]))], -1)
    return y.reshape(*y.shape[:3], 2, 2).swapaxes(3, 4).reshape(y.shape)


def convnext(p, x):
    y = norm(nn.LayerNorm, conv(x, p["d"], groups=4))
    return x + p["gamma"] * (nn.gelu(y @ p["up"]) @ p["down"])


def cbam(p, x):
    gate = nn.sigmoid(relu(x.mean((1, 2)) @ p["one"]) @ p["one"])[:, None, None, :]
    y = x * gate
    place = jnp.stack([y.mean(-1), y.max(-1)], -1)
    return y * nn.sigmoid(conv(place, p["k2"]))


def detect(p, x):
    y = rows(x)
    return jnp.concatenate([nn.sigmoid(y @ p["one"]) * 640.0, nn.sigmoid(y @ p["one"])], -1)


PARAMS = {
    "c": draw(3, 3, 4, 4) / 4,
    "d": draw(3, 3, 1, 4) / 2,
    "c2": draw(3, 3, 2, 2) / 3,
    "k2": draw(3, 3, 2, 1) / 3,
    "t": draw(3, 3, 4, 4) / 4,
    "line": draw(3, 4, 4) / 3,
    "one": draw(4, 4) / 2,
    "qkv": draw(4, 12) / 2,
    "heads": draw(2, 2, 3),
    "up": draw(4, 8) / 2,
    "down": draw(8, 4) / 2,
    "slope": jnp.float32([0.1, 0.25, -0.5, 2.0]),
    "gamma": jnp.float32([0.5, 1.0, 0.25, -1.0]),
    "place": draw(1, 6, 6, 4),
    "token": draw(1, 1, 4),
}

BLOCKS = {
    # One tensor, each value by itself.
    "leaky relu": lambda p, x: nn.leaky_relu(x @ p["one"]),
    "prelu": lambda p, x: jnp.where(x >= 0, x, p["slope"] * x),
    "prelu of two": lambda p, x: relu(x) - 0.25 * relu(-x),
    "elu": lambda p, x: nn.elu(x),
    "gelu": lambda p, x: nn.gelu(x @ p["one"]),
    "gelu exactly": lambda p, x: nn.gelu(x, approximate=False),
    "silu": lambda p, x: nn.silu(conv(x, p["c"])),
    "hard swish": lambda p, x: nn.hard_swish(x),
    "hard sigmoid": lambda p, x: nn.hard_sigmoid(x),
    "mish": lambda p, x: x * jnp.tanh(nn.softplus(x)),
    "softplus": lambda p, x: nn.softplus(x),
    "tanh": lambda p, x: jnp.tanh(x),
    "abs": lambda p, x: jnp.abs(x @ p["one"]),
    "relu6 of a residual": lambda p, x: jnp.clip(x + conv(x, p["c"]), 0, 6),
    "truncated": lambda p, x: (x * 3).astype(jnp.int32).astype(jnp.float32) + 1,
    "pixels": lambda p, x: jnp.clip(x * 100, 0, 255).astype(jnp.uint8),
    # Several.
    "maximum": lambda p, x: jnp.maximum(x @ p["one"], conv(x, p["c"])),
    "minimum": lambda p, x: jnp.minimum(x @ p["one"], 0.1 * x),
    "difference": lambda p, x: conv(x, p["c"]) - x,
    "before and after a relu": lambda p, x: x + conv(relu(x), p["c"]),
    "crelu": lambda p, x: jnp.concatenate([relu(x), relu(-x)], -1),
    "clipped and not": lambda p, x: (jnp.clip(x, -1, 1) + jnp.tanh(x)) @ p["one"],
    "gate by channels": lambda p, x: x * nn.sigmoid(x.mean((1, 2)) @ p["one"])[:, None, None, :],
    "context for all places": lambda p, x: x + (x.mean((1, 2), keepdims=True) @ p["one"]),
    "geglu": lambda p, x: split(x)[0] * nn.gelu(split(x)[1]),
    "quotient": lambda p, x: x / (1.5 + jnp.abs(conv(x, p["c"]))),
    "where larger": lambda p, x: jnp.where(x > conv(x, p["c"]), x, 0.0),
    "outer product": lambda p, x: x[:, 0, 0, :, None] * x[:, 1, 1, None, :],
    "one value times a vector": lambda p, x: (x.mean((1, 2)) @ p["one"][:, :1]) * p["slope"],
    # Convolutions and products.
    "strided, dilated, grouped": lambda p, x: conv(
        conv(x, p["d"], dilation=2, groups=4), p["c"], 2
    ),
    "padding on one side": lambda p, x: conv(x, p["c"], 2, ((0, 1), (2, 0))),
    "transposed": lambda p, x: lax.conv_transpose(x, p["t"], (2, 2), "SAME") + p["slope"],
    "transposed, valid": lambda p, x: relu(lax.conv_transpose(x, p["t"], (3, 2), "VALID")),
    "one axis": lambda p, x: lax.conv_general_dilated(
        rows(x), p["line"], (2,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    ),
    "a fixed blur": lambda p, x: blur(relu(conv(x, p["c"]))),
    "a fixed matrix": lambda p, x: x @ jnp.eye(4)[::-1],
    "patches": lambda p, x: lax.conv_general_dilated_patches(
        x, (2, 2), (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ),
    "to channels first": lambda p, x: jnp.einsum("bhwc,cd->bdhw", x, p["one"]),
    "a matrix from the left": lambda p, x: jnp.einsum("vw,bhwc->bhvc", draw(5, 6), x),
    "a kernel for each head": lambda p, x: jnp.einsum(
        "bnhc,hcd->bnhd", rows(x).reshape(x.shape[0], -1, 2, 2), p["heads"]
    ),
    "attention": attention,
    "attention of heads": lambda p, x: nn.dot_product_attention(*3 * [rows(x)[:, :, None]]),
    "places as examples": lambda p, x: (
        nn.relu(x.reshape(-1, 4) @ p["one"] + p["slope"]).reshape(x.shape) + x
    ),
    "softmax of places as examples": lambda p, x: nn.softmax(x.reshape(-1, 4) @ p["one"]).reshape(
        len(x), 36, 4
    ),
    "windows as examples": lambda p, x: (
        x.reshape(len(x), 2, 3, 2, 3, 4)
        .swapaxes(2, 3)
        .reshape(-1, 9, 4)
        .mean(1)
        .reshape(len(x), 2, 2, 4)
    ),
    "gram matrix": lambda p, x: jnp.einsum("bic,bid->bcd", rows(x), rows(x)),
    # Pools, reductions, normalizations.
    "average without padding": lambda p, x: nn.avg_pool(
        x, (3, 3), (1, 1), "SAME", count_include_pad=False
    ),
    "average with padding": lambda p, x: nn.avg_pool(x, (3, 3), (2, 1), "SAME"),
    "maximum of windows": lambda p, x: nn.max_pool(x, (3, 3), (2, 2), "SAME"),
    "windows of one axis": lambda p, x: nn.max_pool(rows(x), (4,), (4,)),
    "mean of rows": lambda p, x: x.mean(2),
    "mean of channels": lambda p, x: x.mean(-1, keepdims=True),
    "sum of all": lambda p, x: x.sum((1, 2, 3)),
    "maximum of places": lambda p, x: x.max((1, 2)) @ p["one"],
    "minimum of channels": lambda p, x: x.min(-1),
    "layer norm": lambda p, x: norm(nn.LayerNorm, x),
    "layer norm in two passes": lambda p, x: norm(nn.LayerNorm, x, use_fast_variance=False),
    "group norm": lambda p, x: norm(nn.GroupNorm, x, num_groups=2),
    "instance norm": lambda p, x: (
        (x - x.mean((1, 2), keepdims=True)) / jnp.sqrt(x.var((1, 2), keepdims=True) + 1e-5)
    ),
    "unit length": lambda p, x: x / jnp.linalg.norm(x + 2, axis=-1, keepdims=True),
    "softmax of places": lambda p, x: nn.softmax(x, axis=(1)),
    "softmax of channels": lambda p, x: nn.softmax(x @ p["one"]),
    "log softmax": lambda p, x: nn.log_softmax(x),
    # Moves.
    "half of the channels": lambda p, x: split(x @ p["one"])[1],
    "halves through layers": lambda p, x: jnp.concatenate(
        [conv(split(x)[0], p["c2"]), split(x)[1]], -1
    ),
    "turned": lambda p, x: x[:, ::-1, ::2],
    "rolled": lambda p, x: jnp.roll(x, 1, 2),
    "tiled": lambda p, x: jnp.tile(x, (1, 2, 1, 1)),
    "repeated": lambda p, x: jnp.repeat(x, 2, axis=2),
    "nearest": lambda p, x: jax.image.resize(x, (len(x), 12, 9, 4), "nearest"),
    "bilinear": lambda p, x: jax.image.resize(x, (len(x), 12, 9, 4), "bilinear"),
    "mirrored border": lambda p, x: jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect"),
    "a border of a value": lambda p, x: jnp.pad(
        x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.5
    ),
    "pixel shuffle": lambda p, x: (
        x.reshape(len(x), 6, 6, 2, 2, 1).transpose(0, 1, 3, 2, 4, 5).reshape(len(x), 12, 12, 1)
    ),
    "position embedding": lambda p, x: x + p["place"],
    "class token": lambda p, x: jnp.concatenate(
        [jnp.broadcast_to(p["token"], (len(x), 1, 4)), rows(x)], 1
    )[:, 0],
    # Whole blocks.
    "ghost": ghost,
    "c2f": c2f,
    "sppf": lambda p, x: sppf(x),
    "shuffle": shuffle,
    "convnext": convnext,
    "cbam": cbam,
    "detect": detect,
    "several outputs": lambda p, x: {"a": x @ p["one"], "b": x.mean((1, 2))},
}
"""{name: fn(params, x)}, x (B, 6, 6, 4)."""
