"""Blocks as people write them, in floats and in integers: right at every batch size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import check_agreement
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
    program = p.lower(fn, PARAMS, X, check=False)
    planned = quantization.plan(program, quantization.spec(core.trace(fn, PARAMS, X)))
    ranges = quantization.calibrate_edges(planned, [(X,)])
    made = quantization.encode(planned, ranges, X)
    assert spread(fn(PARAMS, X), p.run(made)(X)) < COARSE.get(name, 0.05)
    check_agreement(planned, ranges, made, X)


# Bits, and whether activations are symmetric: each block has one of them, and its kernels the bits.
STORED = [(4, "affine"), (8, "symmetric"), (4, "symmetric")]


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_as_it_is_trained_and_as_it_is_deployed(name):
    fn, (bits, scheme) = BLOCKS[name], STORED[list(BLOCKS).index(name) % len(STORED)]
    graph = core.trace(fn, PARAMS, X)
    rule = {"weight": bits, "activation": quantization.Quantizer(bits, scheme)}
    spec = quantization.spec(graph, [(".*", rule)] if graph.sites else None)
    planned = quantization.plan(p.lower(fn, PARAMS, X, check=False), spec)
    ranges = quantization.calibrate_edges(planned, [(X,)])
    made = quantization.encode(planned, ranges, X, check=False)
    check_agreement(planned, ranges, made, X)
    # One after the other, too, though what lies next to half a step may fall on either side.
    fake = quantization.as_deployed(planned)(planned.program.params, ranges, X)
    assert spread(fake, p.run(made)(X)) < 0.05


def test_what_is_no_operation_stays_as_it_is():
    program = p.lower(lambda params, x: jnp.sort(x, -1) @ params["one"], PARAMS, X)
    (call,) = (op for op in program.operations if isinstance(op, p.Call))
    assert "sort" in call.equation
    wanted = jnp.sort(X[:5], -1) @ PARAMS["one"]
    np.testing.assert_allclose(p.run(program)(X[:5]), wanted, atol=1e-5)
