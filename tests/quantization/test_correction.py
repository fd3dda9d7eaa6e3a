import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import core
from hybrid_jax import quantization as q


def network(params, x):
    return jax.nn.relu(x @ params["a"] + params["b"][None]) @ params["c"]


PARAMS = {
    "a": jnp.array([[1.4, -0.8]]),
    "b": jnp.array([0.5, 0.0]),
    "c": jnp.array([[2.3], [1.0]]),
}
X = jnp.array([[1.0], [2.0]])


def folded(bits):
    """The folded network, its parameters and spec, and ranges with which kernels round to ints."""
    fn, refold = core.fold(network, PARAMS, X)
    rules = [(".*", {"weight": q.Quantizer(bits), "activation": 32})]
    params = refold(PARAMS)
    spec = q.spec(core.trace(fn, params, X), rules)
    span = q.Range(jnp.float32(-7.0), jnp.float32(7.0))
    return fn, params, spec, {name: {"weight": span} for name in ("a", "c")}


def test_biases_by_hand():
    # Float: a gives (1.4, −0.8) and (2.8, −1.6), in the mean (2.1, −1.2). On the grid of step 1 the
    # kernel is (1, −1), the mean (1.5, −1.5): b becomes (0.5, 0) + (0.6, 0.3) = (1.1, 0.3).
    # Float: relu gives (1.9, 0) and (3.3, 0), c gives 4.37 and 7.59, in the mean 5.98.
    # Now relu gives (2.1, 0) and (3.1, 0), and c = (2, 1) gives 4.2 and 6.2, in the mean 5.2.
    fn, params, spec, ranges = folded(bits=4)
    new = q.correct_biases(fn, params, [(X[:1],), (X[1:],)], spec, ranges)
    np.testing.assert_allclose(new["a/bias"], [1.1, 0.3], rtol=1e-5)
    np.testing.assert_allclose(new["c/bias"], [0.78], rtol=1e-5)
    for name in "ac":
        np.testing.assert_array_equal(new[name], params[name])


def test_correcting_what_was_rounded_and_corrected_changes_nothing():
    fn, params, spec, ranges = folded(bits=4)
    rounded = params | {name: jnp.round(params[name]) for name in "ac"}
    new = q.correct_biases(fn, params, [(X,)], spec, ranges, rounded)
    np.testing.assert_array_equal(new["a"], rounded["a"])
    np.testing.assert_allclose(new["a/bias"], [1.1, 0.3], rtol=1e-5)
    again = q.correct_biases(fn, params, [(X,)], spec, ranges, new)
    np.testing.assert_allclose(again["c/bias"], new["c/bias"], rtol=1e-5)


def test_without_quantization_biases_stay():
    fn, params, spec, ranges = folded(bits=32)
    new = q.correct_biases(fn, params, [(X,)], spec, ranges)
    jax.tree.map(np.testing.assert_array_equal, new, params)


def test_bad_arguments():
    fn, params, spec, ranges = folded(bits=4)
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        q.correct_biases(fn, params, [], spec, ranges)
    with pytest.raises(TypeError, match="batches must yield tuples of inputs, got ArrayImpl"):
        q.correct_biases(fn, params, [X], spec, ranges)
    with pytest.raises(ValueError, match="params must have folded biases, as"):
        q.correct_biases(network, PARAMS, [(X,)], spec, ranges)
    with pytest.raises(ValueError, match="the shift of the mean must be finite, got 2 NaN"):
        q.correct_biases(fn, params, [(X.at[0].set(jnp.nan),)], spec, ranges)
    with pytest.raises(ValueError, match=r"ranges must have \['c'\]\['weight'\]"):
        q.correct_biases(fn, params, [(X,)], spec, {"a": ranges["a"]})
