"""Strict set-up for every test: four CPU devices, no silent promotion, shared compilations."""

import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from hybrid_jax import data

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling is most of a run: what is tested is the program, not how hard XLA works on it.
jax.config.update("jax_disable_most_optimizations", True)
# Workers and later runs share what was compiled once; keyed by jax version through XLA itself.
cache = pathlib.Path(tempfile.gettempdir()) / "hybrid_jax_test_cache"
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


STEPS = 250


class Trained(NamedTuple):
    """A network that has learned scikit-learn's digits, and real images to judge it by.

    `params` is the whole variables dict; images are float32 (B, 8, 8, 1), labels int32 (B,).
    """

    fn: Callable[[Any, jax.Array], jax.Array]
    train: Callable[[Any, jax.Array], tuple[jax.Array, Any]]
    params: Any
    images: jax.Array
    labels: jax.Array
    held_out_images: jax.Array
    held_out_labels: jax.Array


class DigitsNet(nn.Module):
    """A stem, a residual block, a depthwise and a pointwise convolution, a dense head."""

    @nn.compact
    def __call__(self, x, train=False):
        def norm_relu(x, skip=0.0):
            return nn.relu(nn.BatchNorm(not train, momentum=0.9)(x) + skip)

        conv = functools.partial(nn.Conv, use_bias=False)
        x = norm_relu(conv(8, (3, 3), name="stem")(x))
        y = norm_relu(conv(12, (3, 3), name="expand")(x))
        x = norm_relu(conv(8, (3, 3), name="project")(y), skip=x)
        x = norm_relu(conv(8, (3, 3), 2, feature_group_count=8, name="depthwise")(x))
        x = norm_relu(conv(16, (1, 1), name="pointwise")(x))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(scope="session")
def digits():
    splits = data.load("digits", seed=0)
    images, held_out = (
        jnp.asarray(part.images, jnp.float32) / 255 for part in (splits.train, splits.validation)
    )
    labels, held_out_labels = (jnp.asarray(p.labels) for p in (splits.train, splits.validation))
    net, tx = DigitsNet(), optax.sgd(optax.cosine_decay_schedule(0.2, STEPS), momentum=0.9)

    def predict(params, images):
        return net.apply(params, images)

    def train(params, images):
        return net.apply(params, images, train=True, mutable=["batch_stats"])

    # Compiled step by step: on a CPU a convolution inside a loop is far slower than outside.
    @jax.jit
    def step(variables, state, key):
        batch = jax.random.randint(key, (64,), 0, len(images))

        def loss(params):
            logits, updates = train(variables | {"params": params}, images[batch])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch])
            return losses.mean(), updates

        gradients, statistics = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = tx.update(gradients, state)
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, **statistics}, state

    variables = jax.jit(net.init)(jax.random.key(0), images[:1])
    state = tx.init(variables["params"])
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules need it
        for key in jax.random.split(jax.random.key(1), STEPS):
            variables, state = step(variables, state, key)
    return Trained(predict, train, variables, images, labels, held_out, held_out_labels)
