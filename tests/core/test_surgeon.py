import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import core

SWEEP = jax.jit(core.sweep_rows, static_argnums=2)


def problem(seed, n, width=3):
    """A positive definite H of condition below 100, and weights."""
    rng = np.random.default_rng(seed)
    x = np.vstack([rng.normal(size=(n, n)) / np.sqrt(n), np.eye(n)])
    return jnp.float32(x.T @ x), jnp.asarray(rng.normal(size=(n, width)) * 3, jnp.float32)


def test_factor_by_hand():
    # H = V Vᵀ with V = [[1, 2], [0, 1]]; U = V⁻¹ = [[1, −2], [0, 1]]; UᵀU = [[1, −2], [−2, 5]].
    factor = core.inverse_factor(jnp.array([[5.0, 2.0], [2.0, 1.0]]))
    np.testing.assert_allclose(factor, [[1.0, -2.0], [0.0, 1.0]], atol=1e-6)
    np.testing.assert_allclose(factor.T @ factor, [[1.0, -2.0], [-2.0, 5.0]], atol=1e-6)


def test_sweep_by_hand():
    # Rounding (0.25, 1.5, 1):
    #   row 0: 0.25 → 0, e = 0.25
    #   row 1: 1.5 + 1 · 0.25 = 1.75 → 2, e = −0.25
    #   row 2: 1 − 2 · 0.25 + 3 · (−0.25) = −0.25 → 0, e = −0.25
    factor = jnp.array([[1.0, -1.0, 2.0], [0.0, 1.0, -3.0], [0.0, 0.0, 1.0]])
    swept = SWEEP(jnp.array([[0.25], [1.5], [1.0]]), factor, jnp.round)
    np.testing.assert_array_equal(swept, [[0.0], [2.0], [0.0]])


@pytest.mark.parametrize("n", [5, 150])
def test_the_identity_changes_nothing(n):
    gram, weights = problem(0, n)
    swept = SWEEP(weights, core.inverse_factor(gram), jnp.positive)
    np.testing.assert_array_equal(swept, weights)


def test_uncorrelated_inputs_do_not_answer():
    _, weights = problem(0, 5)
    swept = SWEEP(weights, core.inverse_factor(jnp.eye(5) * 7), jnp.round)
    np.testing.assert_array_equal(swept, jnp.round(weights))


def literal(weights, gram, project):
    """GPTQ as its paper writes it, in float64: update all later rows after each."""
    inverse = np.linalg.inv(np.float64(gram))
    factor, weights = np.linalg.cholesky(inverse).T, np.float64(weights)
    loss = 0.0
    for i in range(len(weights)):
        error = (weights[i] - project(weights[i])) / factor[i, i]
        weights[i] = project(weights[i])
        weights[i + 1 :] -= np.outer(factor[i, i + 1 :], error)
        loss += np.sum(error**2)
    return weights, loss


@hypothesis.given(seed=st.integers(0, 10**6))
@hypothesis.settings(max_examples=20)
def test_the_loss_is_the_sum_of_the_errors(seed):
    gram, weights = problem(seed, 5)
    swept = SWEEP(weights, core.inverse_factor(gram), jnp.round)
    expected, loss = literal(weights, gram, np.round)
    np.testing.assert_array_equal(swept, expected)
    change = np.float64(weights) - np.float64(swept)
    np.testing.assert_allclose(np.trace(change.T @ np.float64(gram) @ change), loss, rtol=1e-3)


def test_blocks_do_not_show():
    # A projection that is continuous, so that rounding errors stay rounding errors.
    gram, weights = problem(1, 150)
    swept = SWEEP(weights, core.inverse_factor(gram), _shrink)
    expected, _ = literal(weights, gram, lambda row: np.sign(row) * np.maximum(abs(row) - 0.5, 0))
    np.testing.assert_allclose(swept, expected, atol=1e-4)


def _shrink(row):
    return jnp.sign(row) * jnp.maximum(jnp.abs(row) - 0.5, 0.0)


def test_entries_follow_their_rows():
    gram, weights = problem(2, 150)
    kept = jnp.arange(150)[:, None] % 2 == jnp.arange(3)[None] % 2
    swept = SWEEP(
        weights, core.inverse_factor(gram), lambda row, mask: jnp.where(mask, row, 0.0), kept
    )
    np.testing.assert_array_equal(swept == 0, ~kept)


def test_damping_by_hand():
    # The mean of the diagonal is 2; a tenth of it is added.
    damped = core.damped_gram(jnp.array([[3.0, 1.0], [1.0, 1.0]]), 0.1)
    np.testing.assert_allclose(damped, [[3.2, 1.0], [1.0, 1.2]], rtol=1e-6)
    np.testing.assert_array_equal(core.damped_gram(jnp.zeros((2, 2)), 0.5), 0.5 * jnp.eye(2))


def test_a_gram_that_cannot_be_factored_is_damped_harder():
    # Rank one; float32 loses what little is added.
    x = jnp.arange(1.0, 65.0)
    gram = jnp.outer(x, x)
    assert not jnp.all(jnp.isfinite(jnp.linalg.cholesky(gram + 1e-12 * jnp.eye(64))))
    damped = core.damped_gram(gram, 1e-12)
    added = jnp.diagonal(damped - gram) / (jnp.trace(gram) / 64)
    assert 1e-12 < float(added.max()) < 1e-2
    assert jnp.all(jnp.isfinite(core.inverse_factor(damped)))
    # Each of a batch to its own need.
    both = jax.vmap(core.damped_gram, (0, None))(jnp.stack([gram, jnp.eye(64)]), 1e-12)
    np.testing.assert_array_equal(both[0], damped)
    np.testing.assert_array_equal(both[1], jnp.eye(64))


def test_what_is_not_finite_stays_visible():
    gram = jnp.array([[1.0, jnp.nan], [jnp.nan, 1.0]])
    assert jnp.any(jnp.isnan(core.damped_gram(gram)))
