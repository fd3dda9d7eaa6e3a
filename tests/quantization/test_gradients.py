import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import core
from hybrid_jax import quantization as q
from hybrid_jax.quantization import learning, specs

X = jnp.array([-9.0, -2.2, -0.4, 0.0, 0.6, 1.5, 3.3, 8.0])


def grid_of(scheme, bits=3):
    make = {"symmetric": q.symmetric, "affine": q.affine}[scheme]
    grid = make(q.Range(jnp.float32(-2.0), jnp.float32(4.0)), bits)
    return grid, float(grid.low - grid.zero_point), float(grid.high - grid.zero_point)


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_straight_through_formula(scheme):
    grid, n, p = grid_of(scheme)
    gradient = jax.grad(lambda x: q.fake_quant(x, grid).sum())(X)
    nearest = np.round(np.asarray(X) / float(grid.scale))
    np.testing.assert_array_equal(gradient, (n <= nearest) & (nearest <= p))


def test_straight_through_lets_the_largest_weight_move():
    # Its range is its own magnitude: rounding errors in x / scale must not count as clipping.
    x = jax.random.normal(jax.random.key(0), (9, 100))
    grid = q.symmetric(q.extent(x, (0,)), 4)
    assert np.all(jax.grad(lambda x: q.fake_quant(x, grid).sum())(x) == 1)


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_lsq_formula(scheme, mode):
    grid, n, p = grid_of(scheme)

    def f(scale, x):
        return q.lsq(x, grid._replace(scale=scale), count=8)

    derivative = {"forward": jax.jacfwd, "reverse": jax.jacrev}[mode]
    by_scale, by_x = derivative(f, argnums=(0, 1))(grid.scale, X)
    v = np.asarray(X) / float(grid.scale)
    g = 1 / np.sqrt(8 * max(p, -n))
    expected = [n if e <= n else p if e >= p else np.round(e) - e for e in v]
    np.testing.assert_allclose(by_scale, g * np.array(expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(by_x, np.diag((n < v) & (v < p)))


def test_lsq_by_hand():
    # Unit scale, 3 bits: n = −3, p = 3, and N = 3 weights: g = 1 / √(3 · 3) = 1/3.
    # v = 0.75 rounds to 1: 0.25. v = 5 is clipped: 3. v = −4 is clipped: −3. Sum 0.25.
    grid = q.symmetric(q.Range(jnp.float32(-3.0), jnp.float32(3.0)), 3)
    x = jnp.array([0.75, 5.0, -4.0])
    gradient = jax.grad(lambda s: q.lsq(x, grid._replace(scale=s), count=3).sum())(grid.scale)
    np.testing.assert_allclose(gradient, 0.25 / 3, rtol=1e-6)


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_a_step_on_the_range_is_the_same_step_on_the_scale(scheme):
    make = {"symmetric": q.symmetric, "affine": q.affine}[scheme]
    low = -4.0 if scheme == "symmetric" else 0.0
    span = q.Range(jnp.float32(low), jnp.float32(4.0))
    grid = make(span, 4)

    def by_scale(scale):
        return q.lsq(X, grid._replace(scale=scale), count=8).sum()

    def by_span(span):
        return q.lsq(X, make(span, 4), count=8).sum()

    rate = 0.01
    stepped = grid.scale - rate * jax.grad(by_scale)(grid.scale)
    moved = jax.tree.map(lambda end, d: end - rate * d, span, jax.grad(by_span)(span))
    np.testing.assert_allclose(make(moved, 4).scale, stepped, rtol=1e-6)
    assert int(make(moved, 4).zero_point) == int(grid.zero_point)
    if scheme == "affine":
        assert float(moved.low) == 0.0


def test_pact_formula():
    def f(low, high, x):
        return q.pact(x, q.Range(low, high), 4)

    low, high = jnp.float32(-2.0), jnp.float32(3.0)
    by_low, by_high, by_x = jax.jacrev(f, argnums=(0, 1, 2))(low, high, X)
    np.testing.assert_array_equal(by_low, X < -2)
    np.testing.assert_array_equal(by_high, X > 3)
    np.testing.assert_array_equal(by_x, np.diag((X >= -2) & (X <= 3)))


def test_values_do_not_depend_on_the_gradient():
    span = q.Range(jnp.float32(-2.0), jnp.float32(4.0))
    expected = q.fake_quant(X, q.affine(span, 4))
    np.testing.assert_array_equal(q.lsq(X, q.affine(span, 4), count=8), expected)
    np.testing.assert_array_equal(q.pact(X, span, 4), expected)


def test_lsq_learns_the_range_that_fits():
    # From a range ten times too wide, descent on the reconstruction error comes close to the best
    # of a fine search.
    x = jax.random.normal(jax.random.key(0), (512,))

    @jax.jit
    def error(span):
        return jnp.mean((q.lsq(x, q.symmetric(span, 3), count=1) - x) ** 2)

    span = q.Range(jnp.float32(-20.0), jnp.float32(20.0))
    step = jax.jit(lambda s: jax.tree.map(lambda end, d: end - d, s, jax.grad(error)(s)))
    start = error(span)
    for _ in range(200):
        span = step(span)
    best = min(float(error(q.Range(-a, a))) for a in jnp.linspace(0.5, 5.0, 50))
    assert error(span) < 1.05 * best < 0.1 * start


def test_the_gradient_brings_back_a_range_learned_past_zero():
    # x = 0.04 becomes 0: of (x̂ − x)² the derivative by x̂ is −0.08. LSQ hands
    # p · ∂x̂/∂scale = p · g · p of it to an end, with g = 1/√p: 15 · √15 for the affine grid, and
    # 7 · √7 for the symmetric one.
    x = jnp.array([0.04])

    def slopes(quantize, low, high):
        span = q.Range(jnp.float32(low), jnp.float32(high))
        slopes = jax.grad(lambda span: jnp.sum((quantize(span) - x) ** 2))(span)
        return [float(slope) for slope in slopes]

    learned = slopes(lambda span: q.lsq(x, q.affine(span, 4), 1), 0.0, -1e-4)
    np.testing.assert_allclose(learned, [0.0, -0.08 * 15 * 15**0.5], rtol=1e-5)
    learned = slopes(lambda span: q.lsq(x, q.symmetric(span, 4), 1), 1e-4, -1e-4)
    np.testing.assert_allclose(learned, [0.08 * 7 * 7**0.5, -0.08 * 7 * 7**0.5], rtol=1e-5)
    learned = slopes(lambda span: q.pact(x, span, 4), 0.0, -1e-4)
    np.testing.assert_allclose(learned, [0.0, -0.08], rtol=1e-5)


def test_a_rate_as_large_as_the_range_does_not_kill_the_activation():
    def fn(params, x):
        return jax.nn.relu(x) @ params["w"]

    params = {"w": jnp.array([[1.0], [-0.5], [0.75]])}
    x = 0.05 * jax.random.uniform(jax.random.key(0), (64, 3))
    spec = q.spec(core.trace(fn, params, x), activation_bits=4, first_last_bits=4)
    q_fn, expected = q.fake_quantized(fn, spec), fn(params, x)

    def loss(ranges):
        return jnp.mean((q_fn(params, ranges, x) - expected) ** 2) / jnp.mean(expected**2)

    tx, ranges = optax.adam(0.05), q.calibrate(fn, params, [(x,)], spec)

    @jax.jit
    def step(ranges, state):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(jax.grad(loss)(ranges), state)
        return optax.apply_updates(ranges, updates), state

    state, highs = tx.init(ranges), []
    for _ in range(100):
        ranges, state = step(ranges, state)
        highs.append(float(ranges["w"]["activation"].high))
    assert min(highs) < 0 < highs[-1]  # it went past zero, and came back
    assert loss(ranges) < 0.1


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_contract_of_every_learning(scheme):
    """All give the grid's nearest values; each its own gradient of the values and the range."""
    bits, count, found = jnp.int32(3), 8, {}
    for name in learning.of_scheme(scheme):
        quantizer = q.Quantizer(3, scheme, learning=name)

        def f(x, span, quantizer=quantizer):
            return specs.apply(x, quantizer, span, bits, (), count)

        span = q.Range(jnp.float32(-2.0), jnp.float32(4.0))
        value, pull = jax.vjp(f, X, span)
        np.testing.assert_array_equal(value, q.fake_quant(X, quantizer.grid(span, bits)))
        found[name] = np.hstack([np.ravel(leaf) for leaf in jax.tree.leaves(pull(X))])
        off = specs.apply(X, quantizer, span, jnp.int32(q.OFF), (), count)
        np.testing.assert_array_equal(off, X)
    # By x, then by low and high: of 'fixed' no range moves.
    assert not found["fixed"][-2:].any()
    assert all(own[-2:].any() for name, own in found.items() if name != "fixed")
    assert len({own.tobytes() for own in found.values()}) == len(found)


def test_a_dynamic_range_is_that_of_the_tensor():
    quantizer = q.Quantizer(3, "affine", learning="dynamic")
    got = specs.apply(X, quantizer, None, 3, (), 8)
    # From -9 to 8 in 7 steps of 17/7, with zero among the values.
    np.testing.assert_array_equal(got, q.fake_quant(X, quantizer.grid(quantizer.range_of(X, ()))))
    assert "dynamic" not in learning.of_activations()


def test_a_learning_of_the_users_own_is_one_by_name(monkeypatch):
    own = q.Learning(lambda x, *rest: 2 * x, ["affine"])
    monkeypatch.setitem(q.LEARNING, "twice", own)
    assert learning.of_activations()[-1] == "twice"
    assert "twice" not in learning.of_weights()
    doubled = specs.apply(X, q.Quantizer(8, "affine", learning="twice"), None, 8, (), 1)
    np.testing.assert_array_equal(doubled, 2 * X)
    with pytest.raises(ValueError, match="scheme with learning 'twice' must be one of affine, got"):
        q.Quantizer(8, "symmetric", learning="twice")
