import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routings import CHECKS, ROUTINGS
from routings import weights as weights_of

from hybrid_jax import experts

LOGITS = jnp.log(jnp.array([[1.0, 6.0, 3.0], [5.0, 2.0, 3.0]]))


def weights(routing, logits=LOGITS, key=None):
    return weights_of(routing, logits, key)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_every_routing(check, name, key):
    check(ROUTINGS[name], key)


def test_soft():
    # softmax(log a) = a / sum(a): 1, 6, 3 of 10.
    np.testing.assert_allclose(weights(experts.soft())[0], [0.1, 0.6, 0.3], rtol=1e-6)
    # At temperature 1/2 the numbers are squared: 1, 36, 9 of 46.
    got = weights(experts.soft(0.5))[0]
    np.testing.assert_allclose(got, [1 / 46, 36 / 46, 9 / 46], rtol=1e-5)


def test_top_k():
    # Kept: 6 and 3 of 9; 5 and 3 of 8.
    want = [[0, 6 / 9, 3 / 9], [5 / 8, 0, 3 / 8]]
    np.testing.assert_allclose(weights(experts.top_k(2)), want, rtol=1e-6)
    # Not normalized: 6 and 3 of 10; 5 and 3 of 10.
    want = [[0, 0.6, 0.3], [0.5, 0, 0.3]]
    np.testing.assert_allclose(weights(experts.top_k(2, normalize=False)), want, rtol=1e-6)
    np.testing.assert_array_equal(weights(experts.top_k(1)), [[0, 1, 0], [1, 0, 0]])
    np.testing.assert_allclose(weights(experts.top_k(3)), weights(experts.soft()), rtol=1e-6)


def test_switch_has_a_gradient_and_top_1_has_none():
    np.testing.assert_allclose(weights(experts.switch())[0], [0, 0.6, 0], rtol=1e-6)
    # d p_1 / d z = p_1 (onehot - p) = 0.6 * (-0.1, 0.4, -0.3).
    gradient = jax.grad(lambda z: weights(experts.switch(), z).sum())(LOGITS[:1])
    np.testing.assert_allclose(gradient[0], [-0.06, 0.24, -0.18], rtol=1e-5)
    gradient = jax.grad(lambda z: weights(experts.top_k(1), z)[0, 1])(LOGITS)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_straight_through_learns_from_every_expert():
    routing = experts.straight_through(experts.top_k(1))
    np.testing.assert_array_equal(weights(routing), [[0, 1, 0], [1, 0, 0]])
    # d p_2 / d z = p_2 (onehot - p) = 0.3 * (-0.1, -0.6, 0.7), for an expert that was not chosen.
    gradient = jax.grad(lambda z: weights(routing, z)[0, 2])(LOGITS)
    np.testing.assert_allclose(gradient[0], [-0.03, -0.18, 0.21], rtol=1e-5)


def test_noise_tries_other_experts_and_is_off_without_a_key(key):
    logits = jnp.zeros((400, 4))
    routed = experts.noisy_top_k(1, noise=0.5)(logits, key)
    np.testing.assert_allclose(jnp.std(routed.scores), 0.5, atol=0.03)
    np.testing.assert_allclose(routed.weights.mean(0), 0.25, atol=0.1)
    np.testing.assert_array_equal(routed.weights, weights(experts.top_k(1), routed.scores))
    without = experts.noisy_top_k(1)(LOGITS)
    np.testing.assert_array_equal(without.weights, weights(experts.top_k(1)))
    np.testing.assert_array_equal(without.scores, LOGITS)


def test_random_is_even_and_deaf(key):
    logits = jnp.tile(jnp.array([[100.0, 0.0]]), (400, 1))
    got = weights(experts.random(), logits, key)
    np.testing.assert_array_equal(got.sum(1), 1)
    np.testing.assert_allclose(got.mean(0), 0.5, atol=0.1)
    with pytest.raises(ValueError, match=r"key must be a jax.random.key .* got None"):
        experts.random()(logits)


def test_oracle_prefers_right_then_likely():
    # Probabilities of label 0. Image 0: expert 0 says 0.45 and is wrong (class 1 has 0.55), expert
    # 1 says 0.4 and is right: expert 1. Image 1: both right, expert 0 surer. Image 2: both wrong,
    # expert 1 less so.
    probabilities = jnp.array(
        [
            [[0.45, 0.55, 0.0], [0.9, 0.1, 0.0], [0.1, 0.9, 0.0]],
            [[0.4, 0.3, 0.3], [0.6, 0.2, 0.2], [0.2, 0.8, 0.0]],
        ]
    )
    got = experts.oracle(jnp.log(probabilities + 1e-6), jnp.zeros(3, jnp.int32))
    np.testing.assert_array_equal(got, [[0, 1], [1, 0], [0, 1]])


@pytest.mark.parametrize("k", [0, 1.5, True])
def test_bad_k(k):
    with pytest.raises(ValueError, match=f"k must be an integer of at least 1, got {k}"):
        experts.top_k(k)


def test_bad_temperature_and_noise():
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, got 0"):
        experts.soft(0)
    with pytest.raises(ValueError, match="noise must be a finite number above 0, got -1"):
        experts.noisy_top_k(1, -1)


def test_the_oracle_never_takes_nan_for_right():
    # Expert 0 is NaN, and expert 1 right, then wrong; where all are NaN it is the first.
    logits = jnp.array([[[jnp.nan, 0.0]] * 3, [[1.0, 0.0], [0.0, 1.0], [jnp.nan, 0.0]]])
    got = experts.oracle(logits, jnp.zeros(3, jnp.int32))
    np.testing.assert_array_equal(got, [[0, 1], [0, 1], [1, 0]])
