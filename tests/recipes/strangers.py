"""Networks as somebody writes them who has never seen this library, and runs of seconds of them."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

from hybrid_jax import recipes


def digits():
    """Images (n, 8, 8) uint8 of real digits, and their classes."""
    found = load_digits()
    return (found.images * 15.9).astype(np.uint8), found.target


class Scaled(nn.Module):
    """A layer of one's own: each channel by a learned factor, normalized by its running size."""

    @nn.compact
    def __call__(self, x, training):
        gain = self.param("gain", nn.initializers.ones, (x.shape[-1],))
        size = self.variable("state", "size", jnp.ones, (x.shape[-1],))
        if training and not self.is_initializing():
            size.value = 0.9 * size.value + 0.1 * jnp.abs(x).mean((0, 1, 2))
        return x * (gain / (size.value + 1e-3))[None, None, None]


class Linen(nn.Module):
    """Dropout, BatchNorm, a layer of its own and `training` as its argument."""

    @nn.compact
    def __call__(self, x, training=False):
        for features, stride in ((8, 1), (16, 2)):
            x = nn.Conv(features, (3, 3), (stride, stride), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not training, momentum=0.9)(x)
            x = nn.relu(Scaled()(x, training))
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(0.1, deterministic=not training)(x)
        return nn.Dense(10)(x)


class Nnx(nnx.Module):
    """The same kind of network, in modes that are switched."""

    def __init__(self, rngs):
        self.first = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.second = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        x = nnx.relu(self.second(x)).mean((1, 2))
        return self.head(self.drop(x))


def functions():
    """(predict, train, params) of bare JAX: two convolutions and a layer, no statistics."""
    keys = jax.random.split(jax.random.key(0), 3)
    he = jax.nn.initializers.he_normal()
    params = {
        "stem": he(keys[0], (3, 3, 1, 8)),
        "body": he(keys[1], (3, 3, 8, 12)),
        "head": {"w": he(keys[2], (12, 10)), "b": jnp.zeros(10)},
    }

    def conv(x, w, stride):
        layout = ("NHWC", "HWIO", "NHWC")
        strides = (stride, stride)
        return jax.lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=layout)

    def predict(params, x):
        x = jax.nn.relu(conv(x, params["stem"], 1))
        x = jax.nn.relu(conv(x, params["body"], 2)).mean((1, 2))
        return x @ params["head"]["w"] + params["head"]["b"][None]

    return predict, lambda params, x, key: (predict(params, x), params), params


class Segment(nn.Module):
    """One class for each pixel: down, up, and across."""

    @nn.compact
    def __call__(self, x, train=False):
        wide = nn.relu(nn.Conv(8, (3, 3))(x))
        deep = nn.relu(nn.Conv(12, (3, 3), (2, 2))(wide))
        up = nn.relu(nn.ConvTranspose(8, (2, 2), (2, 2))(deep))
        return nn.Conv(2, (1, 1))(jnp.concatenate([wide, up], -1))


class Regress(nn.Module):
    """Two numbers for each image."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.relu(nn.Conv(8, (3, 3), (2, 2))(x))
        return nn.Dense(2)(x.reshape(x.shape[0], -1))


def trained(module, images, labels, loss, steps=150):
    """(module, variables) after a few steps of what anybody would write."""
    x = jnp.asarray(images[:, :, :, None], jnp.float32) / 255
    x = (x - x.mean()) / x.std()
    variables = module.init(jax.random.key(0), x[:1])
    tx = optax.adam(3e-3)

    @jax.jit
    def step(variables, state, index):
        value, grads = jax.value_and_grad(
            lambda v: loss(module.apply(v, x[index]), jnp.asarray(labels)[index])
        )(variables)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(variables, updates), state, value

    state = tx.init(variables)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for i in range(steps):
            index = jax.random.randint(jax.random.key(i), (64,), 0, len(x))
            variables, state, _ = step(variables, state, index)
    return module, variables


def settings(effort, **changes):
    """A run of seconds, of ranges and roundings that compile quickly."""
    config = recipes.default_config()
    config.effort = effort
    config.evaluation.latency_calls = 1
    config.ptq.update(images=128, calibration="minmax", rounding="nearest")
    config.experts.count = 2
    config.gate.size = 4
    for stage, steps in (("parent", 60), ("experts", 20), ("gate", 10), ("joint", 10)):
        config[stage].steps = steps
        config[stage].batch_size = 32
    recipes.override(config, changes)
    return config


def checks(result, targets, least):
    """What holds of every run: files that answer as the model does, a report, a state on disk."""
    rows = {row.name: row for row in result.results.rows}
    own = next(row for row in rows.values() if row.role in ("single", "mixture"))
    assert result.accuracy >= least
    for target in targets:
        file = own.files[target]
        assert not file.error, file.error
        assert file.accuracy == pytest.approx(own.accuracy, abs=0.02)
        assert result.files[target].is_file()
    assert result.report.is_file()
    stored = json.loads((result.report.parent / "results.json").read_text())
    assert [row["name"] for row in stored["rows"]] == list(rows)
    return own, rows
