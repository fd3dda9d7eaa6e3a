import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import build

from hybrid_jax import core
from hybrid_jax import program as p
from hybrid_jax import quantization as q


def network(params, x):
    return jax.nn.relu(x @ params["a"] + params["b"][None]) @ params["c"]


PARAMS = {
    "a": jnp.array([[1.4, -0.8]]),
    "b": jnp.array([0.5, 0.0]),
    "c": jnp.array([[2.3], [1.0]]),
}
X = jnp.array([[1.0], [2.0]])


def planned(bits):
    """A plan in which kernels alone are quantized, and ranges that round them to integers."""
    rules = [(".*", {"weight": q.Quantizer(bits), "activation": 32})]
    spec = q.spec(core.trace(network, PARAMS, X), rules)
    span = q.Range(jnp.float32(-7.0), jnp.float32(7.0))
    made = q.plan(p.lower(network, PARAMS, X), spec)
    return made, {name: {"weight": span} for name in "ac"}


def test_biases_by_hand():
    # Float: a gives (1.4, −0.8) and (2.8, −1.6), in the mean (2.1, −1.2). On the grid of step 1 the
    # kernel is (1, −1), the mean (1.5, −1.5): b becomes (0.5, 0) + (0.6, 0) = (1.1, 0), as relu
    # cuts all of the second channel off.
    # Float: relu gives (1.9, 0) and (3.3, 0), c gives 4.37 and 7.59, in the mean 5.98.
    # Now relu gives (2.1, 0) and (3.1, 0), and c = (2, 1) gives 4.2 and 6.2, in the mean 5.2.
    made, ranges = planned(bits=4)
    new = q.correct_biases(made, ranges, [(X[:1],), (X[1:],)])
    np.testing.assert_allclose(new["a"]["bias"], [1.1, 0.0], rtol=1e-5)
    np.testing.assert_allclose(new["c"]["bias"], [0.78], rtol=1e-5)
    for name in "ac":
        np.testing.assert_array_equal(new[name]["kernel"], PARAMS[name])


def test_edges_are_as_they_are_stored():
    # x in steps of 1: 0.4 and 1.4 become 0 and 1, and 3 · 0.4 of the mean is lost.
    params, x = {"w": jnp.full((1, 1), 3.0)}, jnp.array([[0.4], [1.4]])

    def fn(params, x):
        return x @ params["w"]

    spec = q.spec(core.trace(fn, params, x))
    made = q.plan(p.lower(fn, params, x), spec)
    ranges = q.calibrate_edges(made, [(x,)])
    (name,) = made.stored
    ranges[name]["activation"] = q.Range(jnp.float32(0.0), jnp.float32(255.0))
    new = q.correct_biases(made, ranges, [(x,)])
    np.testing.assert_allclose(new["w"]["bias"], [1.2], rtol=1e-5)
    with pytest.raises(ValueError, match=r"ranges must have \['x'\]\['activation'\]"):
        q.correct_biases(made, {"w": ranges["w"]}, [(x,)])


def test_correcting_what_was_rounded_and_corrected_changes_nothing():
    made, ranges = planned(bits=4)
    rounded = {
        n: own | {"kernel": np.round(own["kernel"])} for n, own in made.program.params.items()
    }
    new = q.correct_biases(made, ranges, [(X,)], rounded)
    np.testing.assert_array_equal(new["a"]["kernel"], rounded["a"]["kernel"])
    np.testing.assert_allclose(new["a"]["bias"], [1.1, 0.0], rtol=1e-5)
    again = q.correct_biases(made, ranges, [(X,)], new)
    for name in "ac":
        np.testing.assert_allclose(again[name]["bias"], new[name]["bias"], rtol=1e-5)


def test_without_quantization_biases_stay():
    made, ranges = planned(bits=32)
    new = q.correct_biases(made, ranges, [(X,)])
    chex.assert_trees_all_equal(new, made.program.params)


LAYERS = ["conv", "strided", "depthwise", "residual", "branches", "gate"]


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 3])
def test_means_of_a_network_become_those_in_floats(bits):
    net = build([(name, 2, "relu") for name in LAYERS], "two")
    x = net.images(16)
    with jax.numpy_rank_promotion("allow"):
        spec = q.spec(core.trace(net.fn, net.params, x), weight_bits=bits, first_last_bits=bits)
        made = q.plan(p.lower(net.fn, net.params, x[:2]), spec)
        ranges = q.calibrate_edges(made, [(x,)])
        new = q.correct_biases(made, ranges, [(x[:8],), (x[8:],)])
        q_fn, wanted = jax.jit(q.as_deployed(made)), net.fn(net.params, x)[0].mean(0)
        before, after = (
            float(jnp.abs(q_fn(params, ranges, x)[0].mean(0) - wanted).max())
            for params in (made.program.params, new)
        )
        assert after < min(2e-3, 0.2 * before)
        q.encode(made.replace(new), ranges, x)  # which compares integers with floats


def test_bad_arguments():
    made, ranges = planned(bits=4)
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        q.correct_biases(made, ranges, [])
    with pytest.raises(TypeError, match="batches must yield tuples of inputs, got ArrayImpl"):
        q.correct_biases(made, ranges, [X])
    with pytest.raises(ValueError, match="the shift of the mean must be finite, got 2 NaN"):
        q.correct_biases(made, ranges, [(X.at[0].set(jnp.nan),)])
    with pytest.raises(ValueError, match=r"ranges must have \['c'\]\['weight'\]"):
        q.correct_biases(made, {"a": ranges["a"]}, [(X,)])
