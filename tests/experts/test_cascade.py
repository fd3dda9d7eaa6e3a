import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import experts

# Probabilities of 3 experts for 4 inputs of 2 classes. Expert 0 is sure of input 0 alone at 0.8;
# of the others expert 1 is sure of inputs 1 and 0 at 0.7.
PROBABILITIES = jnp.array(
    [
        [[0.9, 0.1], [0.7, 0.3], [0.5, 0.5], [0.4, 0.6]],
        [[0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.55, 0.45]],
        [[0.1, 0.9], [0.1, 0.9], [0.2, 0.8], [0.5, 0.5]],
    ]
)
LOGITS = jnp.log(PROBABILITIES)

cascade = jax.jit(experts.cascade, static_argnames="confidence")


def test_confidence():
    # Of 6, 3 and 1 tenths: 0.6; of two equal ones 1/2.
    logits = jnp.log(jnp.array([[6.0, 3.0, 1.0], [1.0, 1.0, 0.0]]))
    np.testing.assert_allclose(experts.max_probability(logits), [0.6, 0.5], rtol=1e-6)


def test_hand_worked():
    # Thresholds 0.8 and 0.65: expert 0 keeps input 0 (0.9) and hands on 0.7, 0.5 and 0.6; expert 1
    # keeps input 1 (0.7) and hands on 0.6 and 0.55.
    got = cascade(LOGITS, jnp.array([0.8, 0.65]))
    np.testing.assert_array_equal(got.stage, [0, 1, 2, 2])
    np.testing.assert_array_equal(got.went_on, [3, 2])
    want = [LOGITS[0, 0], LOGITS[1, 1], LOGITS[2, 2], LOGITS[2, 3]]
    np.testing.assert_array_equal(got.logits, want)
    assert got.stage.dtype == got.went_on.dtype == jnp.int32


def test_a_share_of_the_answer_before():
    # Half of (log 7, log 3) beside (log 3, log 7): odds of (3 / 7) · √(7 / 3), a probability of
    # 0.6, so that input 1 goes on to the last: all but input 0 do.
    got = cascade(LOGITS, jnp.array([0.8, 0.65]), share=0.5)
    np.testing.assert_array_equal(got.stage, [0, 2, 2, 2])
    second = LOGITS[1] + 0.5 * LOGITS[0]
    np.testing.assert_allclose(got.logits[1:], (LOGITS[2] + 0.5 * second)[1:], rtol=1e-6)


def test_a_confidence_of_ones_own_of_answers_of_any_shape():
    # Each answer is (2, 1): by their first numbers 0.9 and 0.7 are sure at 0.6, then 0.6 is.
    values = PROBABILITIES[..., None]
    got = cascade(values, 0.6, confidence=lambda y: y[:, 0, 0])
    np.testing.assert_array_equal(got.stage, [0, 0, 1, 2])
    np.testing.assert_array_equal(got.went_on, [2, 1])
    want = [values[0, 0], values[0, 1], values[1, 2], values[2, 3]]
    np.testing.assert_array_equal(got.logits, want)


def test_an_expert_that_is_sure_answers_whatever_comes_after():
    # Expert 1 is unsure of input 0, but is not asked.
    logits = LOGITS.at[1, 0].set(0.0).at[2, 0].set(jnp.nan)
    got = cascade(logits, 0.8)
    assert got.stage[0] == 0
    np.testing.assert_array_equal(got.logits[0], LOGITS[0, 0])


@pytest.mark.parametrize(("threshold", "stage"), [(0.0, 0), (1.0, 2)])
def test_the_ends(threshold, stage):
    got = cascade(LOGITS, threshold)
    np.testing.assert_array_equal(got.stage, stage)
    np.testing.assert_array_equal(got.logits, LOGITS[stage])


def test_nan_is_the_answer_and_is_not_handed_on():
    logits = LOGITS.at[0, 2, 0].set(jnp.nan)
    got = cascade(logits, 0.8)
    assert got.stage[2] == 0
    assert np.isnan(got.logits[2]).any()


def test_one_expert_answers_all():
    got = experts.cascade(LOGITS[:1], 0.8)
    np.testing.assert_array_equal(got.logits, LOGITS[0])
    assert got.went_on.shape == (0,)


def test_a_threshold_may_change_without_compiling():
    run = jax.jit(lambda threshold: experts.cascade(LOGITS, threshold).went_on.sum())
    counts = [int(run(jnp.float32(t))) for t in (0.0, 0.65, 0.95)]
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[-1]
    assert run._cache_size() == 1


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 1.3"):
        experts.cascade(LOGITS, 1.3)
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got nan"):
        experts.cascade(LOGITS, jnp.nan)
    with pytest.raises(ValueError, match=r"threshold must .* shape \(2,\), .* got shape \(3,\)"):
        experts.cascade(LOGITS, [0.5] * 3)
