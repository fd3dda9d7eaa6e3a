"""Blocks as people write them, in floats and in integers: right at every batch size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import BLOCKS, PARAMS

from hybrid_jax import core, quantization
from hybrid_jax import program as p

X = jnp.asarray(np.random.default_rng(1).standard_normal((8, 6, 6, 4)), jnp.float32)
# What cannot be said in steps of 8 bits to 5 %: the largest of values that are all but alike.
COARSE = {
    "truncated": 0.5,
    "where larger": 0.5,
    "unit length": 0.1,
    "instance norm": 0.1,
    "convnext": 0.1,
}


@pytest.fixture(autouse=True)
def _as_users_write():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def spread(a, b):
    """The largest difference of two trees of arrays, over the largest value."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(
        float(np.abs(np.float64(x) - np.float64(y)).max() / max(np.abs(np.float64(x)).max(), 1e-9))
        for x, y in pairs
    )


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_what_the_function_is(name):
    fn = BLOCKS[name]
    program = p.lower(fn, PARAMS, X[:2])
    assert not any(isinstance(op, p.Call) for op in program.operations)
    for batch in (1, 3, 4):
        wanted, got = fn(PARAMS, X[:batch]), p.run(program)(X[:batch])
        pairs = zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True)
        assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)
        assert spread(wanted, got) < 1e-4


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_in_integers(name):
    fn = BLOCKS[name]
    graph = core.trace(fn, PARAMS, X)
    spec = quantization.spec(graph)
    ranges = quantization.calibrate(fn, PARAMS, [(X,)], spec) if spec.sites else {}
    program = quantization.encode(p.lower(fn, PARAMS, X), spec, ranges, X)
    assert spread(fn(PARAMS, X), p.run(program)(X)) < COARSE.get(name, 0.05)
    # The float twin rounds as the integers do, but for what lies halfway.
    assert spread(p.simulate(program)(X), p.run(program)(X)) < COARSE.get(name, 0.05)


def test_what_is_no_operation_stays_as_it_is():
    program = p.lower(lambda params, x: jnp.sort(x, -1) @ params["one"], PARAMS, X)
    (call,) = (op for op in program.operations if isinstance(op, p.Call))
    assert "sort" in call.equation
    wanted = jnp.sort(X[:5], -1) @ PARAMS["one"]
    np.testing.assert_allclose(p.run(program)(X[:5]), wanted, atol=1e-5)
