import functools

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import experts

LOGITS = jnp.log(jnp.array([[1.0, 6.0, 3.0], [5.0, 2.0, 3.0]]))


compiled = functools.cache(jax.jit)


def weights(routing, logits=LOGITS, key=None):
    return compiled(routing)(logits, key).weights


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


def test_expert_choice():
    # Probabilities in tenths (1, 6, 3) and (5, 2, 3). Of 2 inputs and 3 experts with K = 1 each
    # has ceil(2/3) = 1 place: expert 0 picks input 1 (5), expert 1 input 0 (6), and expert 2 has a
    # tie (3 and 3): the lower index, input 0. So input 0 has experts 1 and 2, of 6 and 3.
    want = [[0, 6 / 9, 3 / 9], [1, 0, 0]]
    np.testing.assert_allclose(weights(experts.expert_choice(1)), want, rtol=1e-6)
    want = [[0, 0.6, 0.3], [0.5, 0, 0]]
    got = weights(experts.expert_choice(1, normalize=False))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    # K = 2: ceil(4/3) = 2 places, so everything: the softmax.
    np.testing.assert_allclose(weights(experts.expert_choice(2)), weights(experts.soft()))


@pytest.mark.parametrize(("k", "factor", "places"), [(1, 1.0, 3), (2, 1.0, 5), (1, 0.5, 2)])
def test_every_expert_picks_as_many(k, factor, places, key):
    # 9 inputs, 4 experts: ceil(9/4), ceil(18/4), ceil(4.5/4).
    got = weights(experts.expert_choice(k, factor), jax.random.normal(key, (9, 4)))
    np.testing.assert_array_equal((got > 0).sum(0), places)


def test_an_input_that_no_expert_picks_has_no_weight():
    # Input 2 is second for both, and each has ceil(3/2 * 1/2) = 1 place.
    logits = jnp.array([[2.0, 0.0], [0.0, 2.0], [0.5, 0.0]])
    got = weights(experts.expert_choice(1, 0.5), logits)
    np.testing.assert_array_equal(got, [[1, 0], [0, 1], [0, 0]])
    gradient = jax.grad(lambda z: weights(experts.expert_choice(1, 0.5), z).sum())(logits)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_an_expert_does_not_pick_what_is_ruled_out():
    # One place each. Experts 0 and 2 pick inputs 1 and 2, whose probability is 1; for expert 1 all
    # is ruled out, and the tie would go to input 0.
    logits = jnp.array([[0.0, -jnp.inf, 0.0], [0.0, -jnp.inf, -jnp.inf], [-jnp.inf, -jnp.inf, 0.0]])
    got = weights(experts.expert_choice(1), logits)
    np.testing.assert_array_equal(got, [[0, 0, 0], [1, 0, 0], [0, 0, 1]])


@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(
    logits=hypothesis.extra.numpy.arrays(
        np.float32, (5, 4), elements=st.floats(-50, 50, width=32, allow_subnormal=False)
    )
)
def test_weights_are_a_choice(case, logits):
    routed = compiled(case.routing)(jnp.asarray(logits), jax.random.key(1))
    got = np.asarray(routed.weights)
    assert got.shape == routed.scores.shape == logits.shape
    assert got.dtype == routed.scores.dtype == logits.dtype
    assert (got >= 0).all()
    assert ((got > 0).sum(1) <= case.most).all()
    one = np.isclose(got.sum(1), 1, rtol=1e-5)
    if case.sums == "one":
        assert one.all()
    elif case.sums == "one or zero":
        assert (one | (got.sum(1) == 0)).all()
    else:
        assert (got.sum(1) <= 1 + 1e-5).all()
        assert case.most == 4 or (got.sum(1) >= 0.25 - 1e-6).all()  # the largest of 4 probabilities


def test_compiled_mapped_and_differentiated(case, key):
    logits, keys = jax.random.normal(key, (2, 5, 4)), jax.random.split(key)
    want = [case.routing(z, k).weights for z, k in zip(logits, keys, strict=True)]
    got = [weights(case.routing, z, k) for z, k in zip(logits, keys, strict=True)]
    np.testing.assert_allclose(got, want, atol=1e-6)
    mapped = jax.jit(jax.vmap(case.routing))(logits, keys).weights
    np.testing.assert_allclose(mapped, want, atol=1e-6)

    def loss(logits):
        return jnp.square(case.routing(logits, key).weights[:, 1]).sum()

    assert np.isfinite(jax.jit(jax.grad(loss))(logits[0])).all()


def test_no_second_compilation(case, key):
    route = jax.jit(case.routing)
    route(jnp.zeros((5, 4)), key)
    route(jnp.eye(5, 4), jax.random.key(1))
    assert route._cache_size() == 1


def test_nan_is_never_routed_in_silence(case, key):
    logits = jax.random.normal(key, (5, 4))
    got = np.asarray(weights(case.routing, logits.at[1, 2].set(jnp.nan), key))
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[[0, 2, 3, 4]]).all()


def test_what_the_gate_rules_out_has_no_weight(case, key):
    logits = jax.random.normal(key, (5, 4)).at[:, 3].set(-jnp.inf)
    got = weights(case.routing, logits, key)
    assert np.isfinite(got).all()
    assert (got[:, 3] == 0).all() or case.chooser == "chance"


def test_ties_go_to_the_lowest_index(case, key):
    noiseless = key if case.chooser == "chance" else None
    chosen = np.asarray(weights(case.routing, jnp.zeros((5, 4)), noiseless)) > 0
    if case.chooser == "input":  # the first experts, for every input
        np.testing.assert_array_equal(chosen, np.tile(np.arange(4) < case.most, (5, 1)))
    elif case.chooser == "expert":  # the first inputs, for every expert
        np.testing.assert_array_equal(chosen, np.sort(chosen[:, :1].repeat(4, 1), 0)[::-1])


def test_one_expert_gets_everything(case, key):
    np.testing.assert_array_equal(weights(case.alone, jnp.zeros((2, 1)), key), 1)


def test_more_than_all_experts(case, key):
    if case.make:
        with pytest.raises(ValueError, match=r"k must be an integer in \[1, 4\], got 5"):
            weights(case.make(5), jnp.zeros((2, 4)), key)


@pytest.mark.parametrize("k", [0, 1.5, True])
def test_bad_k(k):
    with pytest.raises(ValueError, match=f"k must be an integer of at least 1, got {k}"):
        experts.top_k(k)


def test_bad_temperature_and_noise():
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, got 0"):
        experts.soft(0)
    with pytest.raises(ValueError, match="noise must be a finite number above 0, got -1"):
        experts.noisy_top_k(1, -1)


def test_padding_is_not_routed_and_takes_no_place(case, key):
    """Among padding that the gate would prefer, and with NaN, the inputs go where they went."""
    key = key if case.chooser == "chance" else None
    logits, real = jax.random.normal(jax.random.key(3), (5, 4)), jnp.array([1, 2, 4, 5, 7])
    padded = jnp.full((8, 4), 100.0).at[0].set(jnp.nan).at[real].set(logits)
    weight = jnp.zeros(8).at[real].set(2.0)
    got = compiled(case.routing)(padded, key, weight).weights
    np.testing.assert_array_equal(got[jnp.array([0, 3, 6])], 0)
    if case.chooser != "chance":
        np.testing.assert_allclose(got[real], weights(case.routing, logits), rtol=1e-6)

    def loss(logits):
        return jnp.square(case.routing(logits, key, weight).weights[:, 1]).sum()

    gradient = jax.grad(loss)(padded)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[jnp.array([0, 3, 6])], 0)


def test_the_oracle_never_takes_nan_for_right():
    # Expert 0 is NaN, and expert 1 right, then wrong; where all are NaN it is the first.
    logits = jnp.array([[[jnp.nan, 0.0]] * 3, [[1.0, 0.0], [0.0, 1.0], [jnp.nan, 0.0]]])
    got = experts.oracle(logits, jnp.zeros(3, jnp.int32))
    np.testing.assert_array_equal(got, [[0, 1], [0, 1], [1, 0]])
