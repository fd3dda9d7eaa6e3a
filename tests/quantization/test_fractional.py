import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import core, cost
from hybrid_jax import quantization as q


def line(params, x):
    return x @ params["w"]


@pytest.fixture(scope="module")
def one_weight():
    params, x = {"w": jnp.array([[0.4]])}, jnp.array([[1.0]])
    spec = q.spec(core.trace(line, params, x), [("w", {"weight": q.Quantizer(8)})])
    unit = q.Range(jnp.float32(0.0), jnp.float32(1.0))
    return params, x, spec, {"w": {"weight": unit, "activation": unit}}


def test_value_and_gradient_by_hand(one_weight):
    params, x, spec, ranges = one_weight

    def y(b):
        bits = {"w": {"weight": b, "activation": jnp.float32(8.0)}}
        return q.fractional(line, spec)(params, ranges, bits, x)[0, 0]

    both = jax.jit(jax.value_and_grad(y))
    # 0.4 in steps of 1, 1/3, 1/7: 0, 1/3 and 3/7. At 2.25 bits 1/4 of 1/3; the slope is 1/3.
    np.testing.assert_allclose(both(2.25), (1 / 12, 1 / 3), rtol=1e-5)
    np.testing.assert_allclose(both(3.5), ((1 / 3 + 3 / 7) / 2, 3 / 7 - 1 / 3), rtol=1e-5)
    # An integer counts as the lower of two: the slope is that to the next.
    np.testing.assert_allclose(both(3.0), (1 / 3, 3 / 7 - 1 / 3), rtol=1e-5)
    # 8 is the higher: in steps of 1/127 and 1/63 it is 51/127 and 25/63.
    np.testing.assert_allclose(both(8.0), (51 / 127, 51 / 127 - 25 / 63), rtol=1e-4)
    assert both._cache_size() == 1


def test_gradient_of_an_activation_and_of_the_penalty_by_hand(one_weight):
    params, _, spec, ranges = one_weight
    x, graph = jnp.array([[0.6]]), core.trace(line, params, jnp.ones((1, 1)))

    def objective(b):
        bits = {"w": {"weight": jnp.float32(3.0), "activation": b}}
        y = q.fractional(line, spec)(params, ranges, bits, x)[0, 0]
        return y, q.bit_operations(graph, bits)

    # 0.6 in steps of 1/3 is 2/3, in steps of 1/7 it is 4/7; the weight is 1/3. One MAC · 3 bits.
    values, slopes = jax.jvp(objective, (jnp.float32(2.5),), (jnp.float32(1.0),))
    np.testing.assert_allclose(values, ((2 / 3 + 4 / 7) / 2 / 3, 7.5), rtol=1e-5)
    np.testing.assert_allclose(slopes, ((4 / 7 - 2 / 3) / 3, 3.0), rtol=1e-5)


def test_integers_are_fake_quantization(model):
    graph = core.trace(model.fn, model.params, model.x)
    spec = q.spec(graph)
    ranges = q.calibrate(model.fn, model.params, [(model.x,)], spec)
    q_fn, f_fn = q.fake_quantized(model.fn, spec), q.fractional(model.fn, spec)
    rng = np.random.default_rng(0)

    @jax.jit
    def both(ranges, bits):
        real = jax.tree.map(lambda b: b.astype(jnp.float32), bits)

        def integer(ranges):
            return q_fn(model.params, ranges, model.x, bits=bits)

        def mixed(ranges):
            return f_fn(model.params, ranges, real, model.x)

        gradients = [jax.grad(lambda r, f=f: (f(r) ** 2).sum())(ranges) for f in (integer, mixed)]
        return (integer(ranges), mixed(ranges)), gradients

    for _ in range(2):
        bits = jax.tree.map(lambda _: jnp.int32(rng.integers(2, 9)), spec.bits())
        for expected, found in both(ranges, bits):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), expected, found
            )
    weight, activation = (
        {site: int(roles[role]) for site, roles in bits.items()}
        for role in ("weight", "activation")
    )
    counted = cost.count(graph, None, weight, activation).bops
    np.testing.assert_allclose(q.bit_operations(graph, bits), counted, rtol=1e-6)


def test_bits_fall_under_a_penalty_and_rise_where_the_loss_asks():
    """Of two inputs one is summed up with equal weights, which two bits hold; one is not."""

    def fn(params, x):
        return jnp.concatenate([x @ params["plain"], x @ params["fine"]], axis=1)

    key = jax.random.key(0)
    params = {
        "plain": jnp.sign(jax.random.normal(key, (16, 1))),
        "fine": jnp.tanh(jax.random.normal(key, (16, 1))),
    }
    x = jax.random.uniform(key, (64, 16))
    graph = core.trace(fn, params, x)
    spec = q.spec(graph)
    ranges = q.calibrate(fn, params, [(x,)], spec)
    expected, f_fn = fn(params, x), q.fractional(fn, spec)

    def objective(weight, penalty):
        bits = {name: {"weight": b, "activation": jnp.float32(8.0)} for name, b in weight.items()}
        error = jnp.mean((f_fn(params, ranges, bits, x) - expected) ** 2)
        return error + penalty * q.bit_operations(graph, bits) / (16 * 64)

    tx, gradient = optax.adam(0.1), jax.jit(jax.grad(objective))

    def learn(penalty):
        bits = {name: jnp.float32(4.5) for name in params}
        state = tx.init(bits)
        with jax.numpy_dtype_promotion("standard"):
            for _ in range(80):
                updates, state = tx.update(gradient(bits, jnp.float32(penalty)), state)
                bits = jax.tree.map(lambda b, u: jnp.clip(b + u, 2.0, 8.0), bits, updates)
        return {name: float(b) for name, b in bits.items()}

    free, dear = learn(0.0), learn(0.03)
    assert free["fine"] > 5
    assert dear["plain"] == 2
    assert 2.5 < dear["fine"] < free["fine"]
    assert learn(100.0) == {"plain": 2, "fine": 2}
    assert gradient._cache_size() == 1
    # Rounded within a budget that the learned bits nearly meet.
    learned = {name: {"weight": b, "activation": 8.0} for name, b in dear.items()}
    budget = 16 * 8 * (2 + int(dear["fine"]))
    found = q.round_bits(learned, cost.formula(graph), spec, {"bops": budget})
    assert found.bits["plain"] == {"weight": 2, "activation": 8}
    assert found.bits["fine"] == {"weight": int(dear["fine"]), "activation": 8}
    assert found.costs["bops"] == budget


def test_rounding_by_hand(one_weight):
    params, x, spec, _ = one_weight
    formula = cost.formula(core.trace(line, params, x))
    learned = {"w": {"weight": jnp.float32(3.6), "activation": jnp.float32(5.5)}}

    def rounded(budget, **kwargs):
        found = q.round_bits(learned, formula, spec, {"bops": budget}, **kwargs)
        return tuple(found.bits["w"].values()), found.damage

    bits, distance = rounded(1000)
    assert bits in ((4, 5), (4, 6))
    np.testing.assert_allclose(distance, 0.16 + 0.25, rtol=1e-5)
    # At most 18: (3, 6) is 0.36 + 0.25 away, (4, 4) 0.16 + 2.25.
    assert rounded(18)[0] == (3, 6)
    # A device with 2, 4 and 8: (4, 4) for 16; then (2, 4) is 2.56 + 2.25.
    assert rounded(1000, choices=(2, 4, 8))[0] == (4, 4)
    assert rounded(15, choices=(2, 4, 8))[0] == (2, 4)
    with pytest.raises(ValueError, match="budget of bops must be at least 4, got 3"):
        rounded(3)


def test_bad_bits(one_weight):
    params, x, spec, ranges = one_weight
    f_fn = q.fractional(line, spec)
    with pytest.raises(ValueError, match=r"bits must be in \[2, 8\], got 1.5"):
        f_fn(params, ranges, {"w": {"weight": 1.5, "activation": 8.0}}, x)
    with pytest.raises(ValueError, match=r"bits must be in \[2, 8\], got nan"):
        f_fn(params, ranges, {"w": {"weight": float("nan"), "activation": 8.0}}, x)
    with pytest.raises(ValueError, match="site of bits must be one of v, got 'w'"):
        f_fn(params, ranges, {"v": {"weight": 2.0, "activation": 8.0}}, x)
    with pytest.raises(ValueError, match=r"role of bits\['w'\] must be one of weight, got 'activ"):
        f_fn(params, ranges, {"w": {"weight": 2.0}}, x)
    with pytest.raises(ValueError, match=r"ranges must have \['w'\]\['weight'\], got v"):
        f_fn(params, {"v": ranges["w"]}, {"w": {"weight": 2.0, "activation": 8.0}}, x)
    graph = core.trace(line, params, x)
    with pytest.raises(ValueError, match="site of bits must be one of v, got 'w'"):
        q.bit_operations(graph, {"v": {"weight": 2.0, "activation": 8.0}})
    floats = q.Spec((q.SiteSpec("w", q.Quantizer(8, "e4m3"), spec["w"].activation),))
    with pytest.raises(ValueError, match="bits of a scheme to be learned must be 8, or 32 for off"):
        q.fractional(line, floats)(params, ranges, {"w": {"weight": 4.0, "activation": 8.0}}, x)
