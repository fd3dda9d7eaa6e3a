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
    """Also for more examples than it was read for, and compared with."""
    fn = BLOCKS[name]
    program = p.lower(fn, PARAMS, X[:2])
    assert not any(isinstance(op, p.Call) for op in program.operations)
    wanted, got = jax.jit(lambda params, x: (fn(params, x), p.run(program)(x)))(PARAMS, X[:4])
    pairs = zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True)
    assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)
    assert spread(wanted, got) < 1e-4


# Bits of kernels and of activations, and whether the latter are symmetric.
STORED = [(8, "affine"), (4, "affine"), (8, "symmetric"), (4, "symmetric")]


# Each block as it is stored in each way; in the long run all but one of them.
IN_TURN = [
    pytest.param(name, *stored, marks=() if i % len(STORED) == j else pytest.mark.slow)
    for i, name in enumerate(BLOCKS)
    for j, stored in enumerate(STORED)
]


@pytest.mark.parametrize(("name", "bits", "scheme"), IN_TURN)
def test_a_block_in_integers(name, bits, scheme):
    fn, graph = BLOCKS[name], core.trace(BLOCKS[name], PARAMS, X)
    rule = {"weight": bits, "activation": quantization.Quantizer(bits, scheme)}
    spec = quantization.spec(graph, [(".*", rule)] if graph.sites else None)
    planned = quantization.plan(p.lower(fn, PARAMS, X, check=False), spec)
    ranges = quantization.calibrate_edges(planned, [(X,)])
    plain = (bits, scheme) == STORED[0]
    made = quantization.encode(planned, ranges, X, check=plain)
    check_agreement(planned, ranges, made, X)

    @jax.jit
    def all_three(params, x):
        return fn(PARAMS, x), quantization.as_deployed(planned)(params, ranges, x), p.run(made)(x)

    floats, fake, got = all_three(planned.program.params, X)
    # One after the other, too, though what lies next to half a step may fall on either side.
    assert spread(fake, got) < 0.05
    assert not plain or spread(floats, got) < COARSE.get(name, 0.05)


def test_what_is_no_operation_stays_as_it_is():
    program = p.lower(lambda params, x: jnp.sort(x, -1) @ params["one"], PARAMS, X)
    (call,) = (op for op in program.operations if isinstance(op, p.Call))
    assert "sort" in call.equation
    wanted = jnp.sort(X[:5], -1) @ PARAMS["one"]
    np.testing.assert_allclose(p.run(program)(X[:5]), wanted, atol=1e-5)
