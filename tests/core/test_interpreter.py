"""The interpreter changes only what it is told to, and sees through every nesting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core as jex

from hybrid_jax import core
from hybrid_jax.core import interpreter

W = jax.random.normal(jax.random.key(0), (4, 4)) / 2
X = jax.random.normal(jax.random.key(1), (3, 4))


@jax.custom_vjp
def straight_through(w, x):
    return jnp.round(x @ w)


straight_through.defvjp(
    lambda w, x: (jnp.round(x @ w), (w, x)), lambda saved, ct: (saved[1].T @ ct, ct @ saved[0].T)
)


@jax.custom_jvp
def tripled(w, x):
    return x @ w


@tripled.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return tripled(w, x), 3 * (dx @ w) + 3 * (x @ dw)


COLUMNS = jnp.ones((1, W.shape[1]))


@jax.custom_vjp
def with_a_constant(w, x):
    return x @ w + COLUMNS


def with_a_constant_forward(w, x):
    return x @ w + COLUMNS, (w, x)  # inputs, kept as they are


with_a_constant.defvjp(with_a_constant_forward, lambda res, dy: (res[1].T @ dy, dy @ res[0].T))


def looped(w, x):
    def body(carry):
        i, y = carry
        return i + 1, y @ w

    return lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]


NESTINGS = {
    "plain": lambda w, x: x @ w,
    "left operand": lambda w, x: (w @ x.T).T,
    "jit": jax.jit(lambda w, x: x @ w),
    "remat": jax.checkpoint(lambda w, x: jnp.sin(x @ w)),
    "scan": lambda w, x: lax.scan(lambda c, w: (jnp.sin(c @ w), None), x, jnp.stack([w, 2 * w]))[0],
    "scan over inputs": lambda w, x: lax.scan(lambda c, x: (c, x @ w), 0, x)[1],
    "cond": lambda w, x: lax.cond(x[0, 0] > 9, lambda x: x, lambda x: x @ w, x),
    "while": looped,
    "custom_jvp": tripled,
    "custom_vjp": straight_through,
    "custom_vjp with a constant": with_a_constant,
    "cast": lambda w, x: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32),
    "vmap": lambda w, x: jax.vmap(lambda row: w.T @ row)(x),
}


def wrapped(name):
    return lambda params, x: NESTINGS[name](params["w"], x) * params["scale"]


PARAMS = {"w": W, "scale": jnp.float32(2)}


def identity(site, x, kernel, apply):
    return apply(x, kernel), None


def doubled(site, x, kernel, apply):
    return apply(x, 2 * kernel), None


@pytest.mark.parametrize("name", NESTINGS)
def test_the_identity_is_bit_equal_with_its_gradient(name):
    fn = wrapped(name)
    again = core.at_sites(fn, identity)
    np.testing.assert_array_equal(jax.jit(fn)(PARAMS, X), jax.jit(again)(PARAMS, X)[0])
    if name == "while":
        return
    gradient = jax.jit(jax.grad(lambda p: fn(p, X).sum()))(PARAMS)
    gradient_again = jax.jit(jax.grad(lambda p: again(p, X)[0].sum()))(PARAMS)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_again)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", NESTINGS)
def test_every_nesting_has_its_site(name):
    fn = wrapped(name)
    graph = core.trace(fn, PARAMS, X)
    [site] = graph.sites
    assert (site.name, site.path, site.kind) == ("w", "w", "dot")
    calls = 2 if name == "scan" else 3 if name == "scan over inputs" else 1
    assert site.calls == calls
    # One row of X meets the 4 x 4 kernel: 16, twice in the scan over two kernels.
    assert site.macs == graph.macs == (32 if name == "scan" else 16)
    changed, _ = jax.jit(core.at_sites(fn, doubled))(PARAMS, X)
    if name in ("plain", "jit", "cond", "custom_jvp", "vmap", "left operand", "cast"):
        np.testing.assert_array_equal(changed, 2 * jax.jit(fn)(PARAMS, X))
    else:
        assert not np.array_equal(changed, jax.jit(fn)(PARAMS, X))


@pytest.mark.parametrize("name", ["custom_jvp", "custom_vjp"])
def test_derivative_rules_are_kept_and_their_sites_replaced(name):
    fn = wrapped(name)
    value, gradient = jax.value_and_grad(lambda p: core.at_sites(fn, doubled)(p, X)[0].sum())(
        PARAMS
    )
    by_hand = {"custom_jvp": lambda w: X @ (2 * w), "custom_vjp": lambda w: jnp.round(X @ (2 * w))}
    np.testing.assert_allclose(value, 2 * by_hand[name](W).sum(), rtol=1e-6)
    # The rule says 3 x^T ct for custom_jvp and x^T ct for custom_vjp; ct is the scale, 2.
    factor = 3 if name == "custom_jvp" else 1
    np.testing.assert_allclose(gradient["w"], factor * X.T @ jnp.full((3, 4), 2.0), rtol=1e-5)


def test_records_of_scans_branches_and_derivatives():
    def largest(site, x, kernel, apply):
        return apply(x, kernel), jnp.abs(x).max()

    def record(name, x=X):
        return jax.jit(core.at_sites(wrapped(name), largest))(PARAMS, x)[1]

    assert record("plain")["w"] == jnp.abs(X).max()
    assert record("custom_vjp")["w"] == record("custom_jvp")["w"] == jnp.abs(X).max()
    assert record("scan")["w"].shape == (2,)
    assert record("scan")["w"][0] == jnp.abs(X).max()
    assert record("cond")["w"] == jnp.abs(X).max()
    assert record("cond", 10 + jnp.abs(X))["w"] == 0, "the branch with the site was not taken"
    assert record("while") == {}


def test_a_kernel_used_twice_is_two_sites():
    graph = core.trace(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], {"w": W}, X)
    assert [(site.name, site.path) for site in graph.sites] == [("w", "w"), ("w#2", "w")]


def test_products_without_a_kernel_count_but_are_no_sites():
    graph = core.trace(lambda p, x: (x @ x.T) @ (p["w"] @ p["w"])[:3], {"w": W}, X)
    # The last product has a kernel made of parameters alone, which costs an example nothing;
    # x x^T is 3*4*3/3 = 12 an example, and the site 3*3*4/3 = 12.
    assert [site.macs for site in graph.sites] == [12]
    assert graph.macs == 12 + 12


def test_a_site_says_how_it_lies():
    def fn(params, x):
        x = lax.conv_general_dilated(
            x,
            params["k"],
            (2, 2),
            "SAME",
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
            feature_group_count=2,
        )
        return x

    params, x = {"k": jnp.ones((6, 2, 3, 3))}, jnp.ones((5, 4, 8, 8))
    [site] = core.trace(fn, params, x).sites
    assert (site.kind, site.groups) == ("conv", 2)
    assert (site.kernel_out_axes, site.kernel_in_axes) == ((0,), (1, 2, 3))
    # 6 channels x 4 x 4 places x (2 inputs x 3 x 3) taps.
    assert site.macs == 6 * 4 * 4 * 2 * 3 * 3
    assert site.input_shape == (5, 4, 8, 8)
    assert site.output_shape == (5, 6, 4, 4)


def test_no_recompilation_and_no_leak_from_one_trace_into_the_next():
    offset = jnp.ones((1, 4))

    @jax.jit
    def outer(params, x, shift):
        # The function closes over a tracer of this trace.
        return core.at_sites(lambda p, x: (x + shift) @ p["w"] + offset, identity)(params, x)[0]

    first, second = outer(PARAMS, X, X), outer(PARAMS, X, 2 * X)
    np.testing.assert_allclose(second - first, X @ W, atol=1e-5)
    assert outer._cache_size() == 1

    shared = core.at_sites(wrapped("plain"), identity)
    jitted = jax.jit(shared)
    jitted(PARAMS, X)
    np.testing.assert_array_equal(jitted(PARAMS, 2 * X)[0], jax.jit(shared)(PARAMS, 2 * X)[0])
    assert jitted._cache_size() == 1


@pytest.mark.parametrize("reverse", [False, True])
def test_an_inlined_jaxpr_is_one_list_of_equations(reverse):
    @jax.checkpoint
    def step(carry, x):
        return jax.nn.relu(carry - x), (carry * x, jax.jit(jnp.sin)(x))

    def fn(start, xs):
        end, made = jax.lax.scan(step, start, xs, reverse=reverse)
        return end, made, jax.lax.cond(end[0] > 0, jnp.cos, jnp.exp, end)

    args = jnp.array([1.0, 2.0]), jnp.array([[0.5, 3.0], [0.25, -1.0], [2.0, 0.0]])
    closed = interpreter.inline(jax.make_jaxpr(fn)(*args))
    names = {eqn.primitive.name for eqn in closed.eqns}
    assert "cond" in names
    assert not names & set(interpreter.INLINE)
    expected = jax.tree.leaves(fn(*args))
    for got, wanted in zip(jex.jaxpr_as_fun(closed)(*args), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
