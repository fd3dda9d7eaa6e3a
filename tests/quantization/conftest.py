"""A small convolutional network with what a site can be: strided, depthwise, dense, BatchNorm."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest


class Model(NamedTuple):
    fn: object
    train: object
    params: dict
    x: jax.Array


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Conv(4, (3, 3), strides=2, feature_group_count=4, name="depthwise")(x)
        x = nn.relu(x).mean((1, 2))
        return nn.Dense(3, name="head")(x)


@pytest.fixture(scope="session")
def model():
    net = Net()
    x = jax.random.normal(jax.random.key(1), (4, 6, 6, 2))
    params = net.init(jax.random.key(0), x, train=False)

    def fn(params, x):
        return net.apply(params, x, train=False)

    def train(params, x):
        return net.apply(params, x, train=True, mutable=["batch_stats"])

    return Model(fn, train, jax.tree.map(jnp.asarray, params), x)
