"""Networks as people write them who never heard of this library: Linen, NNX, bare functions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax


class MomentNorm(nn.Module):
    """Divides by the running root mean square of each channel, in a collection of its own."""

    @nn.compact
    def __call__(self, x, update):
        per_channel = (1, 1, 1, x.shape[-1])
        running = self.variable("moments", "second", jnp.ones, per_channel)
        gain = self.param("gain", nn.initializers.ones, per_channel)
        moment = running.value
        if update:
            moment = (x**2).mean((0, 1, 2), keepdims=True)
            if not self.is_initializing():
                running.value = 0.9 * running.value + 0.1 * moment
        return x * (gain * lax.rsqrt(moment + 1e-3))


class LinenNet(nn.Module):
    """Dropout of values and of whole channels, and noise from a stream of its own."""

    @nn.compact
    def __call__(self, images, *, deterministic=True):
        x = nn.Conv(8, (3, 3), name="first")(images)
        x = nn.relu(MomentNorm(name="norm")(x, not deterministic))
        x = nn.Dropout(0.2, broadcast_dims=(1, 2))(x, deterministic=deterministic)
        x = nn.silu(nn.Conv(12, (3, 3), 2, name="second")(x))
        if not deterministic:
            noise = jax.random.normal(self.make_rng("noise"), x.shape, x.dtype)
            x = x * (1 + noise / 10)
        x = nn.Dropout(0.5)(x.mean((1, 2)), deterministic=deterministic)
        return nn.Dense(3, name="head")(x)


class NNXNet(nnx.Module):
    """BatchNorm, a list of layers and Dropout that all of them share."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.dense = nnx.List([nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 3, rngs=rngs)])

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x))).mean((1, 2))
        for layer in self.dense[:-1]:
            x = nnx.relu(layer(self.dropout(x)))
        return self.dense[-1](x)


def functions():
    """(predict, train, params): a mean that is taken off, with dropout by hand."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 3, 3, 8), "b": (3, 3, 8, 12), "bias": (1, 1, 1, 8), "w": (12, 3)}
    params = {name: jnp.asarray(rng.normal(0, 0.2, s), jnp.float32) for name, s in shapes.items()}
    params["mean"] = jnp.zeros((1, 1, 1, 12))

    def convolve(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    def hidden(params, x):
        return convolve(jax.nn.relu(convolve(x, params["a"]) + params["bias"]), params["b"])

    def predict(params, x):
        x = jax.nn.relu(hidden(params, x) - params["mean"])
        return x.max((1, 2)) @ params["w"]

    def train(params, x, key):
        x = hidden(params, x)
        mean = x.mean((0, 1, 2), keepdims=True)
        x = jax.nn.relu(x - mean).max((1, 2))
        x = jnp.where(jax.random.bernoulli(key, 0.7, x.shape), x / 0.7, jnp.zeros_like(x))
        return x @ params["w"], params | {"mean": 0.9 * params["mean"] + 0.1 * mean}

    return predict, train, params


GIVEN = {
    "Linen": LinenNet,
    "NNX": lambda: NNXNet(nnx.Rngs(0)),
    "functions": functions,
}
"""What a user gives -> what makes it; each takes float32 (B, 8, 8, 3) to (B, 3)."""
