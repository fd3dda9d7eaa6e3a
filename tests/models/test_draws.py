"""What a training function draws at random is drawn whole and cut with the channels it meets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, random

from hybrid_jax import core

RNG = np.random.default_rng(0)
PARAMS = {
    name: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for name, shape in {"a": (3, 6), "b": (6, 2)}.items()
}
KEY = random.key(0, impl="rbg")  # compiles quicker than the default
X = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)


def by_example(key, y):
    keys = random.split(key, len(y))
    return jax.vmap(lambda key, row: row * random.bernoulli(key, 0.5, row.shape))(keys, y)


def in_a_loop(key, y):
    def body(y, key):
        return y * random.uniform(key, y.shape), None

    return lax.scan(body, y, random.split(key, 3))[0]


DRAWS = {
    "of values": lambda key, y: jnp.where(random.bernoulli(key, 0.5, y.shape), y, 0),
    "of channels": lambda key, y: y * random.uniform(key, (1, y.shape[1])),
    "of examples": lambda key, y: y * random.exponential(key, (len(y), 1)),
    "of an order of examples": lambda key, y: y + y[random.permutation(key, len(y))],
    "of a branch": lambda key, y: lax.cond(random.bernoulli(key), jnp.sin, jnp.cos, y) - 1,
    "by example": by_example,
    "in a loop": in_a_loop,
}


def small_and_masked(draw, key):
    def train(params, x, key):
        return draw(key, x @ params["a"]) @ params["b"]

    graph = core.trace(lambda params, x: x @ params["a"] @ params["b"], PARAMS, X)
    keep = {"a": np.array([0, 1, 1, 0, 0, 1], bool)}
    kept = core.kept_indices(graph, core.expand(keep, graph.groups, PARAMS))
    small = core.narrow(train, PARAMS, kept)
    return (
        jax.jit(small)(core.slice_tree(PARAMS, kept), X, key),
        jax.jit(train)(core.mask_removed(PARAMS, kept), X, key),
    )


@pytest.mark.parametrize("name", DRAWS)
def test_the_small_network_draws_what_the_large_one_drew(name):
    def draw(key, y):
        with jax.numpy_dtype_promotion("standard"):
            return DRAWS[name](key, y)

    small, masked = small_and_masked(draw, KEY)
    np.testing.assert_allclose(small, masked, atol=1e-5)
    assert jnp.abs(small - X @ PARAMS["a"] @ PARAMS["b"]).max() > 1e-3


def weighed_by_all(key, y):
    mask = random.uniform(key, y.shape)
    return y * mask / mask.sum()


def by_an_order_of_channels(key, y):
    return y * random.permutation(key, jnp.arange(6.0))[None]


@pytest.mark.parametrize(
    ("draw", "reason"),
    [(weighed_by_all, "is reduced over where"), (by_an_order_of_channels, "is mixed along by")],
)
def test_a_draw_whose_channels_know_of_each_other_is_refused(draw, reason):
    with pytest.raises(ValueError, match=f"kept must keep '.' whole on axis .*{reason}"):
        small_and_masked(draw, KEY)
