"""Drawn networks: the function, its graph, its integers and its files answer alike."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import networks

from hybrid_jax import core, quantization
from hybrid_jax import program as p


@pytest.fixture(autouse=True)
def _as_users_write():
    with jax.numpy_rank_promotion("allow"):
        yield


def spread(a, b):
    """The largest difference of two trees of arrays, over the largest value."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max() / jnp.maximum(jnp.abs(x).max(), 1e-3)) for x, y in pairs)


def encoded(network, bits, activation_bits):
    """The network in integers, made of 16 images."""
    x = network.images(16)
    spec = quantization.spec(
        core.trace(network.fn, network.params, x),
        weight_bits=bits,
        activation_bits=activation_bits,
    )
    ranges = quantization.calibrate(network.fn, network.params, [(x,)], spec)
    return quantization.encode(p.lower(network.fn, network.params, x), spec, ranges, x)


def check(network, bits, activation_bits):
    with jax.numpy_rank_promotion("allow"):
        floats = p.lower(network.fn, network.params, network.images(2))
        for batch in (1, 3, 4):
            x = network.images(batch, 1)
            wanted = jax.jit(network.fn)(network.params, x)
            assert spread(wanted, jax.jit(p.run(floats))(x)) < 1e-4
        # Each operation's integers are those of its floats, or `encode` says where they are not.
        integers = encoded(network, bits, activation_bits)
        x = network.images(4, 2)
        whole, alone = jax.jit(p.run(integers))(x), jax.jit(p.run(integers))(x[:1])
        first = jax.tree.map(lambda y: y[:1], whole)
        assert spread(first, alone) < 1e-5


SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large)


@settings(max_examples=10, deadline=None, suppress_health_check=SLOW)
@given(networks(), st.sampled_from([8, 4, 2]), st.sampled_from([8, 4]))
def test_a_drawn_network(network, bits, activation_bits):
    check(network, bits, activation_bits)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=SLOW)
@given(networks(8), st.sampled_from([8, 4, 2]), st.sampled_from([8, 4]))
def test_many_drawn_networks(network, bits, activation_bits):
    check(network, bits, activation_bits)
