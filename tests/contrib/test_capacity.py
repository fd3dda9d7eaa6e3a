import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routings import CHECKS, weights

from hybrid_jax import contrib, experts

LOGITS = jnp.log(jnp.array([[1.0, 6.0, 3.0], [5.0, 2.0, 3.0]]))


@pytest.mark.parametrize("check", CHECKS)
def test_every_choice_is_a_routing(check, choice, key):
    check(choice, key)


def test_expert_choice():
    # Probabilities in tenths (1, 6, 3) and (5, 2, 3). Of 2 inputs and 3 experts with K = 1 each
    # has ceil(2/3) = 1 place: expert 0 picks input 1 (5), expert 1 input 0 (6), and expert 2 has a
    # tie (3 and 3): the lower index, input 0. So input 0 has experts 1 and 2, of 6 and 3.
    want = [[0, 6 / 9, 3 / 9], [1, 0, 0]]
    np.testing.assert_allclose(weights(contrib.expert_choice(1), LOGITS), want, rtol=1e-6)
    want = [[0, 0.6, 0.3], [0.5, 0, 0]]
    got = weights(contrib.expert_choice(1, normalize=False), LOGITS)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    # K = 2: ceil(4/3) = 2 places, so everything: the softmax.
    np.testing.assert_allclose(
        weights(contrib.expert_choice(2), LOGITS), weights(experts.soft(), LOGITS)
    )


@pytest.mark.parametrize(("k", "factor", "places"), [(1, 1.0, 3), (2, 1.0, 5), (1, 0.5, 2)])
def test_every_expert_picks_as_many(k, factor, places, key):
    # 9 inputs, 4 experts: ceil(9/4), ceil(18/4), ceil(4.5/4).
    got = weights(contrib.expert_choice(k, factor), jax.random.normal(key, (9, 4)))
    np.testing.assert_array_equal((got > 0).sum(0), places)


def test_an_input_that_no_expert_picks_has_no_weight():
    # Input 2 is second for both, and each has ceil(3/2 * 1/2) = 1 place.
    logits = jnp.array([[2.0, 0.0], [0.0, 2.0], [0.5, 0.0]])
    got = weights(contrib.expert_choice(1, 0.5), logits)
    np.testing.assert_array_equal(got, [[1, 0], [0, 1], [0, 0]])
    gradient = jax.grad(lambda z: weights(contrib.expert_choice(1, 0.5), z).sum())(logits)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_an_expert_does_not_pick_what_is_ruled_out():
    # One place each. Experts 0 and 2 pick inputs 1 and 2, whose probability is 1; for expert 1 all
    # is ruled out, and the tie would go to input 0.
    logits = jnp.array([[0.0, -jnp.inf, 0.0], [0.0, -jnp.inf, -jnp.inf], [-jnp.inf, -jnp.inf, 0.0]])
    got = weights(contrib.expert_choice(1), logits)
    np.testing.assert_array_equal(got, [[0, 0, 0], [1, 0, 0], [0, 0, 1]])
