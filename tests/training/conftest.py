"""A tiny Linen CNN with BatchNorm, random images, and what a step needs of both."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import core, data, training


class TinyCNN(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.25, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(3)(x)


model = TinyCNN()


def forward(params, state, images, key):
    rngs = {"dropout": key}
    return model.apply(params | state, images, train=True, mutable=["batch_stats"], rngs=rngs)


def predict(variables, images):
    return model.apply(variables, images, train=False)


def augment(images, key):
    return images + 0.1 * jax.random.normal(key, images.shape)


def make_state(seed=0, tx=None):
    variables = model.init(jax.random.key(seed), jnp.zeros((1, 6, 6, 2)), train=False)
    params, state = {"params": variables["params"]}, {"batch_stats": variables["batch_stats"]}
    tx = optax.sgd(0.1, momentum=0.9) if tx is None else tx
    return training.create_state(params, state, tx, jax.random.key(seed))


def leaves(tree):
    """Leaves by path as NumPy, keys as their data."""

    def plain(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    leaves = jax.tree.leaves_with_path(tree)
    return {core.path_string(path): plain(leaf) for path, leaf in leaves}


def assert_equal(got, expected):
    got, expected = leaves(got), leaves(expected)
    assert got.keys() == expected.keys()
    for path in got:
        np.testing.assert_array_equal(got[path], expected[path], err_msg=path, strict=True)


def assert_close(got, expected, rtol=1e-5, atol=1e-6):
    got, expected = leaves(got), leaves(expected)
    assert got.keys() == expected.keys()
    for path in got:
        np.testing.assert_allclose(got[path], expected[path], rtol, atol, err_msg=path)


@pytest.fixture
def tiny():
    """The model and its helpers; a fixture, for test modules cannot import each other."""
    return types.SimpleNamespace(
        model=model,
        forward=forward,
        loss_fn=training.loss_of(forward, training.classification()),
        predict=predict,
        augment=augment,
        make_state=make_state,
        assert_equal=assert_equal,
        assert_close=assert_close,
    )


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return data.Arrays(
        rng.normal(size=(22, 6, 6, 2)).astype(np.float32), rng.integers(0, 3, 22, np.int32)
    )


@pytest.fixture
def batches(arrays):
    return lambda first: data.batches(arrays, 8, seed=3, start_step=first)
