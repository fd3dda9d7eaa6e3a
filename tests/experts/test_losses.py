import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from hybrid_jax import experts


def test_importance():
    # Totals (3, 1): mean 2, variance 1, so 1 / 2^2.
    weights = jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(experts.importance(weights), 0.25)
    np.testing.assert_allclose(experts.importance(jnp.full((3, 4), 0.25)), 0)
    # All on one of E: totals (B, 0, ...): mean B/E, variance B^2 (1/E - 1/E^2), so E - 1.
    np.testing.assert_allclose(experts.importance(jnp.eye(4)[:1].repeat(5, 0)), 3, rtol=1e-6)


def test_load():
    # One input, logits (1, 0, -1), no noise drawn, k = 1, deviation 2. What each has to beat: the
    # best of the others: 0, 1, 1. So the chances are Phi(1/2), Phi(-1/2), Phi(-1).
    logits = jnp.array([[1.0, 0.0, -1.0]])
    chance = scipy.stats.norm.cdf([0.5, -0.5, -1.0])
    want = chance.var() / chance.mean() ** 2
    np.testing.assert_allclose(experts.load(logits, logits, 1, noise=2.0), want, rtol=1e-5)
    # k = 2: to beat is the second of the others: -1, -1, 0, so Phi(1), Phi(1/2), Phi(-1/2).
    chance = scipy.stats.norm.cdf([1.0, 0.5, -0.5])
    want = chance.var() / chance.mean() ** 2
    np.testing.assert_allclose(experts.load(logits, logits, 2, noise=2.0), want, rtol=1e-5)


def test_load_is_the_chance_over_new_noise(key):
    # A draw of all the noise, then of one expert's again: its chance to be the best.
    logits = jnp.array([[0.3, 0.0, -0.4]])
    scores = jnp.array([[0.1, 0.9, -0.2]])
    chance = []
    for e in range(3):
        other = jnp.delete(scores[0], e).max()
        drawn = logits[0, e] + 0.7 * jax.random.normal(jax.random.fold_in(key, e), (100_000,))
        chance.append(float((drawn > other).mean()))
    want = np.var(chance) / np.mean(chance) ** 2
    np.testing.assert_allclose(experts.load(logits, scores, 1, noise=0.7), want, rtol=0.05)


def test_load_gradient_evens():
    logits = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    gradient = jax.grad(lambda z: experts.load(z, logits, 1))(logits)
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 1] < 0).all()


@pytest.mark.parametrize("k", [0, 3])
def test_load_bad_k(k):
    with pytest.raises(ValueError, match=rf"k must be an integer in \[1, 2\], got {k}"):
        experts.load(jnp.zeros((1, 3)), jnp.zeros((1, 3)), k)


def test_load_of_one_expert():
    with pytest.raises(ValueError, match=r"the number of experts must be .* at least 2, got 1"):
        experts.load(jnp.zeros((3, 1)), jnp.zeros((3, 1)), 1)


def test_switch_balance():
    # Probabilities (3/4, 1/4) for three inputs and (1/4, 3/4) for one. Shares of inputs (3/4, 1/4),
    # mean probabilities (10/16, 6/16): 2 (3/4 * 10/16 + 1/4 * 6/16) = 2 * 36/64 = 9/8.
    logits = jnp.log(jnp.array([[3.0, 1.0], [3.0, 1.0], [3.0, 1.0], [1.0, 3.0]]))
    np.testing.assert_allclose(experts.switch_balance(logits), 9 / 8, rtol=1e-6)
    # All inputs to one of 4 with certainty: 4 * 1 * 1.
    logits = jnp.zeros((5, 4)).at[:, 2].set(100.0)
    np.testing.assert_allclose(experts.switch_balance(logits), 4)


def test_entropy():
    # (3/4, 1/4): log 4 - 3/4 log 3; and a sure one: 0. Their mean.
    logits = jnp.array([[jnp.log(3.0), 0.0], [1000.0, 0.0]])
    want = (np.log(4) - 0.75 * np.log(3)) / 2
    np.testing.assert_allclose(experts.entropy(logits), want, rtol=1e-6)
    assert np.isfinite(jax.grad(experts.entropy)(logits)).all()


def test_z_loss():
    # logsumexp(0, 0) = log 2 and logsumexp(log 3, 0) = log 4 = 2 log 2: (1 + 4) / 2 log^2 2.
    logits = jnp.array([[0.0, 0.0], [jnp.log(3.0), 0.0]])
    np.testing.assert_allclose(experts.z_loss(logits), 2.5 * np.log(2) ** 2, rtol=1e-6)


@pytest.mark.parametrize("loss", [experts.switch_balance, experts.entropy, experts.z_loss])
def test_of_one_expert(loss):
    # One expert: balanced (1), sure (0), and logsumexp(z) = z: the mean of 4 and 0.
    want = {experts.switch_balance: 1, experts.entropy: 0, experts.z_loss: 2}[loss]
    np.testing.assert_allclose(loss(jnp.array([[2.0], [0.0]])), want, atol=1e-6)
    np.testing.assert_array_equal(experts.importance(jnp.ones((2, 1))), 0)


@pytest.mark.parametrize(
    "loss",
    [
        experts.importance,
        experts.entropy,
        experts.z_loss,
        experts.switch_balance,
        lambda logits: experts.load(logits, logits, 1),
        lambda logits: experts.expected_cost(logits, [1.0, 2.0, 3.0]),
    ],
)
def test_nan_is_not_hidden(loss):
    assert np.isnan(loss(jnp.zeros((4, 3)).at[1, 2].set(jnp.nan)))
