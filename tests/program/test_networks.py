"""Drawn networks: the function, its graph, its integers and its files answer alike."""

import importlib.util
import os
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import check_agreement
from compiled import in_integers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import networks, numbered

from hybrid_jax import core, deploy, quantization
from hybrid_jax import program as p


@pytest.fixture(autouse=True)
def _as_users_write():
    with jax.numpy_rank_promotion("allow"):
        yield


def spread(a, b):
    """The largest difference of two trees of arrays, over the largest value."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max() / jnp.maximum(jnp.abs(x).max(), 1e-3)) for x, y in pairs)


def check(network, bits, activation_bits, scheme, batches=(1, 3, 4)):
    with jax.numpy_rank_promotion("allow"):
        floats = p.lower(network.fn, network.params, network.images(2))
        for batch in batches:
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
        return integers


SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large)


STORED = (
    st.sampled_from([8, 4, 2]),
    st.sampled_from([8, 4]),
    st.sampled_from(["affine", "symmetric"]),
)


def check_file(target, path, integers, network):
    """A file answers as the integers do: all in integers C to the bit, and others but for rounding.

    What runtimes round halfway may go either way, which in 4 bits is a step of 1/15.
    """
    deploy.export_to(target, path, integers)
    for batch in (1, 3, 4):
        x = network.images(batch, 2)
        wanted = jax.tree.leaves(jax.jit(p.run(integers))(x))
        got = jax.tree.leaves(deploy.TARGETS[target].session(path, batch, 1)(np.asarray(x)))
        for ours, theirs in zip(got, wanted, strict=True):
            assert ours.shape == theirs.shape
            if target == "c" and in_integers(integers):
                np.testing.assert_array_equal(ours, theirs)
            room = 0.02 * max(float(jnp.abs(theirs).max()), 1e-3)
            assert np.abs(ours - theirs).mean() < room, target


@settings(max_examples=5, suppress_health_check=SLOW)
@given(networks(), *STORED)
def test_a_drawn_network(network, bits, activation_bits, scheme):
    """With more examples than the three, and the one, for which `lower` compares them itself."""
    check(network, bits, activation_bits, scheme, batches=(4,))


TARGETS = {"c": None, "onnx": "onnxruntime", "tflite": "ai_edge_litert"}
"""Of the files that are compared, what each needs."""


@pytest.mark.slow
@pytest.mark.parametrize("number", range(300))
def test_a_numbered_network_and_its_files(number, tmp_path):
    """Of numbers that the file named by HYBRID_JAX_PASSED holds none is tried again."""
    record = os.environ.get("HYBRID_JAX_PASSED")
    passed = pathlib.Path(record) if record else tmp_path / "passed"
    passed.touch()
    if str(number) in passed.read_text().split():
        pytest.skip("it has passed")
    choose = random.Random(f"stored {number}").choice
    network = numbered(number)
    stored = choose([8, 4, 2]), choose([8, 4]), choose(["affine", "symmetric"])
    try:
        integers = check(network, *stored)
        for target, needed in TARGETS.items():
            if needed is None or importlib.util.find_spec(needed):
                path = tmp_path / f"model{deploy.TARGETS[target].suffix}"
                check_file(target, path, integers, network)
    except Exception as error:
        error.add_note(f"{network}, stored in {stored}")
        raise
    with passed.open("a") as file:
        file.write(f"{number}\n")
