"""Drawn networks: the function, its graph, its integers and its files answer alike."""

import jax
import jax.numpy as jnp
import pytest
from agreement import check_agreement
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


def check(network, bits, activation_bits, scheme):
    with jax.numpy_rank_promotion("allow"):
        floats = p.lower(network.fn, network.params, network.images(2))
        for batch in (1, 3, 4):
            x = network.images(batch, 1)
            wanted = jax.jit(network.fn)(network.params, x)
            assert spread(wanted, jax.jit(p.run(floats))(x)) < 1e-4
        x, rule = network.images(16), quantization.Quantizer(activation_bits, scheme)
        rules = [(".*", {"weight": bits, "activation": rule})]
        spec = quantization.spec(core.trace(network.fn, network.params, x), rules)
        planned = quantization.plan(floats, spec)
        ranges = quantization.calibrate_edges(planned, [(x,)])
        integers = quantization.encode(planned, ranges, x)
        check_agreement(planned, ranges, integers, x)
        x = network.images(4, 2)
        whole, alone = jax.jit(p.run(integers))(x), jax.jit(p.run(integers))(x[:1])
        first = jax.tree.map(lambda y: y[:1], whole)
        assert spread(first, alone) < 1e-5


SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large)


STORED = (
    st.sampled_from([8, 4, 2]),
    st.sampled_from([8, 4]),
    st.sampled_from(["affine", "symmetric"]),
)


@settings(max_examples=12, deadline=None, suppress_health_check=SLOW)
@given(networks(), *STORED)
def test_a_drawn_network(network, bits, activation_bits, scheme):
    check(network, bits, activation_bits, scheme)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=SLOW)
@given(networks(8), *STORED)
def test_many_drawn_networks(network, bits, activation_bits, scheme):
    check(network, bits, activation_bits, scheme)
