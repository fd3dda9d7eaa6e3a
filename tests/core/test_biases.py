"""What `at_sites` gives as the bias of a site, and adds in its place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import core, models

X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 5)), jnp.float32)
PARAMS = {
    "w": jnp.asarray(np.random.default_rng(1).standard_normal((5, 3)), jnp.float32),
    "c": jnp.array([1.0, 2.0, 4.0]),
}


def plain(site, x, kernel, apply):
    return apply(x, kernel), None


def watched(fn, params, *inputs, change=0.0):
    """The outputs with every bias changed, and {site: (scale, bias)}."""
    seen = {}

    def at_bias(site, scale, bias):
        seen[site.name] = np.asarray(scale).tolist(), np.asarray(bias).tolist()
        return bias + change

    return core.at_sites(fn, plain, None, at_bias)(params, *inputs)[0], seen


CHAINS = {
    "add": (lambda y, c: c + y, [1, 1, 1], [1, 2, 4]),
    "sub from": (lambda y, c: c - y, [-1, -1, -1], [1, 2, 4]),
    "mul": (lambda y, c: c * (y + 1.0), [1, 2, 4], [1, 2, 4]),
    "div": (lambda y, c: (y - 1.0) / c, [1, 1 / 2, 1 / 4], [-1, -1 / 2, -1 / 4]),
    "neg": (lambda y, c: -(y + c), [-1, -1, -1], [-1, -2, -4]),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit, jax.checkpoint])
def test_scale_and_bias_are_those_of_the_whole_chain(name, wrap):
    chain, scale, bias = CHAINS[name]

    def fn(params, x):
        return wrap(lambda w, c, x: chain(x @ w, c[None]))(params["w"], params["c"], x)

    def run(at_bias):
        return core.at_sites(fn, plain, None, at_bias)(PARAMS, X)[0]

    y = fn(PARAMS, X)
    np.testing.assert_array_equal(run(lambda site, scale, bias: bias), y)
    got = run(lambda site, scale, bias: bias + 10.0 * scale + 100.0 * bias)
    expected = y + 10.0 * jnp.float32([scale]) + 100.0 * jnp.float32([bias])
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_what_is_read_twice_or_differs_between_examples_is_no_bias():
    def twice(params, x):
        y = x @ params["w"]
        return (y + 1.0) * y

    def own(params, x):
        return x @ params["w"] + x[:, :1]

    for fn in (twice, own):
        assert watched(fn, PARAMS, X)[1] == {}


def test_what_follows_the_tensor_of_a_join():
    def same(join, x):
        return x, None

    def fn(params, x):
        y = x @ params["w"]
        both = jnp.concatenate([y, y + 1.0], -1)  # a result
        scaled = jax.nn.relu(2.0 * both - params["d"][None])
        return scaled, jax.nn.relu(y * 4.0 + params["c"][None])  # an operand, read twice

    params = PARAMS | {"d": jnp.arange(6.0)}
    seen = []

    def at_bias(at, scale, bias):
        seen.append((at.name, np.asarray(scale).tolist(), np.asarray(bias).tolist()))
        return bias + 0.25

    outs, _ = core.at_sites(fn, plain, same, at_bias)(params, X)
    assert seen == [
        ("w/concatenate/0", [1.0] * 3, [1.0] * 3),
        ("w/concatenate", [2.0] * 6, [0.0, -1.0, -2.0, -3.0, -4.0, -5.0]),
        ("w/concatenate/0", [4.0] * 3, [1.0, 2.0, 4.0]),
    ]
    assert watched(fn, params, X)[1] == {}  # of sites alone
    y = X @ params["w"]
    both = jnp.concatenate([y, y + 1.25], -1)
    expected = 2.0 * both - params["d"][None] + 0.25, y * 4.0 + params["c"][None] + 0.25
    for a, b in zip(outs, expected):
        np.testing.assert_allclose(a, jax.nn.relu(b), rtol=1e-6, atol=1e-6)


def test_batch_statistics_are_none_and_running_ones_are_one():
    net = models.create("resnet8", 5, widths=[4, 4, 4])
    x = jnp.ones((2, 8, 8, 3))
    variables = net.init(jax.random.key(0), x)

    def train(params, x):
        return net.apply(params, x, True, mutable=["batch_stats"])[0]

    sites = core.trace(net.apply, variables, x).sites
    assert list(watched(train, variables, x)[1]) == [sites[-1].name]
    assert list(watched(net.apply, variables, x)[1]) == [site.name for site in sites]


def test_in_another_layout_and_dtype():
    def fn(params, x):
        y = jax.lax.conv_general_dilated(
            x, params["k"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        return y * params["s"][:, None, None] + jnp.float16(0.5)

    params = {"k": jnp.ones((3, 2, 1, 1), jnp.float16), "s": jnp.float16([[1], [2], [3]])[:, 0]}
    x = jnp.ones((2, 2, 4, 4), jnp.float16)
    fn = jax.numpy_rank_promotion("allow")(fn)
    y, seen = watched(fn, params, x, change=1.0)
    assert seen == {"k": ([1, 2, 3], [0.5, 0.5, 0.5])}
    assert y.dtype == jnp.float16
    np.testing.assert_array_equal(y, fn(params, x) + jnp.float16(1))
