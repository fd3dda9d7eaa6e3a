import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hybrid_jax.quantization.blocks import cut, marked

X = jax.random.normal(jax.random.key(0), (5, 3))
PARAMS = {
    name: jax.random.normal(jax.random.key(i), (3, 3))
    for i, name in enumerate(["a", "b", "c", "d"])
}


def residual(p, x):
    x = jax.nn.relu(x @ p["a"])
    y = jax.jit(lambda p, x: jax.nn.relu(x @ p["b"]) @ p["c"])(p, x) + p["bias"][None]
    return (x + y) @ p["d"]


def block(fn, sites, params):
    jaxpr = jax.make_jaxpr(marked(fn))(params, X).jaxpr
    variables = dict(zip(sorted(params), jaxpr.invars))
    return cut(jaxpr, sites, {site: variables[site] for site in sites}, jaxpr.invars[len(params) :])


def test_a_residual_block_ends_where_the_next_site_begins():
    params = PARAMS | {"bias": jnp.ones(3)}
    found = block(residual, ["b", "c"], params)
    assert (found.sites, found.taps) == (("b", "c"), (("d",),))
    # It takes its input, as the site sees it and for the sum; and the bias, as a row.
    assert [v.aval.shape for v in found.streams] == [(5, 3), (5, 3)]
    assert [v.aval.shape for v in found.constants] == [(1, 3)]
    (got,) = found([X, X], [params["bias"][None]], [params["b"], params["c"]])
    expected = X + jax.nn.relu(X @ params["b"]) @ params["c"] + 1.0
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_one_site_ends_at_all_sites_that_read_it_and_at_outputs():
    def fn(p, x):
        y = x @ p["a"]
        return jax.nn.relu(y) @ p["b"] + y @ p["c"], y

    assert block(fn, ["a"], PARAMS).taps == (("b",), ("c", 1))
    assert block(fn, ["b"], PARAMS).taps == ((0,),)


def test_what_lies_behind_another_site_is_no_tap():
    def dense_block(p, x):
        y = x @ p["a"]
        z = jnp.concatenate([x, y], axis=1) @ p["b"]
        return jnp.concatenate([y, z], axis=1) @ p["c"]

    wide = {"a": jnp.ones((3, 3)), "b": jnp.ones((6, 3)), "c": jnp.ones((6, 2))}
    assert block(dense_block, ["a"], wide).taps == (("b",),)
    assert block(dense_block, ["a", "b"], wide).taps == (("c",),)


def test_sites_that_cannot_be_a_block():
    def chain(p, x):
        return x @ p["a"] @ p["b"] @ p["c"]

    with pytest.raises(ValueError, match="every site that lies between its own, got 'c' cut off"):
        block(chain, ["a", "c"], PARAMS)

    def loop(p, x):
        return lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]

    with pytest.raises(ValueError, match="must lie outside loops and branches, got 'w'"):
        block(loop, ["w"], {"w": jnp.ones((2, 3, 3))})
