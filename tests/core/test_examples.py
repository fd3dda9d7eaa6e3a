"""Which examples count, and means over them, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import core

NAN, INF = jnp.nan, jnp.inf


def test_an_example_of_weight_0_is_in_no_mean_and_no_gradient():
    values = jnp.array([1.0, NAN, 5.0, INF])
    for weight, mean in [([1, 0, 0, 0], 1), ([3.0, 0, 1, 0], 2), ([True, False, True, False], 3)]:
        got, gradient = jax.value_and_grad(core.weighted_mean)(values, jnp.array(weight))
        assert got == mean
        share = np.array(weight, np.float32) / sum(weight)
        np.testing.assert_allclose(gradient, share)
    assert core.weighted_mean(values, jnp.zeros(4)) == 0
    # What counts is not hidden, nor is a weight that is no number.
    assert np.isnan(core.weighted_mean(values, jnp.array([0, 1, 0, 0])))
    assert np.isnan(core.weighted_mean(values, jnp.array([1, 0, NAN, 0])))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.bool_, jnp.int32])
def test_a_mean_is_in_float32(dtype):
    # In bfloat16 a running sum of ones stops at 256, and 1/3 has 8 bits.
    values = jnp.tile(jnp.array([1, 0, 0], dtype), 4096)
    for weight in (None, jnp.ones(len(values), dtype)):
        got = core.weighted_mean(values, weight)
        assert got.dtype == jnp.float32
        assert got == pytest.approx(1 / 3, rel=1e-6)


def test_a_mean_of_maps_is_one_map():
    values = jnp.array([[[1.0, 2.0]], [[5.0, 6.0]], [[NAN, 0.0]]])
    got = core.weighted_mean(values, jnp.array([3.0, 1.0, 0.0]))
    np.testing.assert_allclose(got, [[2.0, 3.0]])


def test_those_that_count_stand_in_for_the_others_in_turn():
    weight = jnp.array([0.0, 2.0, 0.0, 0.5, 0.0])
    examples = {"x": jnp.array([NAN, 1.0, NAN, 3.0, NAN]), "label": jnp.array([-1, 1, -1, 3, -1])}
    got = jax.jit(core.filled)(examples, weight)
    assert got["x"].tolist() == got["label"].tolist() == [1, 1, 3, 3, 1]
    whole = core.filled(examples["label"], jnp.ones(5))
    np.testing.assert_array_equal(whole, examples["label"])
    none = core.filled(examples["label"], jnp.zeros(5))
    np.testing.assert_array_equal(none, examples["label"])


def test_what_has_probability_0_adds_nothing():
    values = jnp.array([2.0, -INF])
    got, gradient = jax.value_and_grad(core.expectation, 1)(jnp.array([1.0, 0.0]), values)
    assert (got, gradient.tolist()) == (2, [1, 0])
    assert core.expectation(jnp.array([0.5, 0.5]), values) == -INF


def test_nan_is_no_class():
    logits = jnp.array([[1.0, 2.0], [NAN, 2.0], [1.0, NAN], [INF, 0.0], [3.0, 3.0]])
    assert core.top_class(logits).tolist() == [1, -1, -1, 0, 0]


def test_labels_are_checked_as_they_came():
    # Cast to int32 these would be 1, -1 and 0.
    for label in (2**32 + 1, 2**32 - 1, 2**63):
        with pytest.raises(
            ValueError, match=rf"labels must be in \[0, 10\), got {label} at index 1"
        ):
            core.check_labels("labels", np.array([3, label], np.uint64), 10)
    with pytest.raises(ValueError, match="labels must be integers, got float32"):
        core.one_hot(jnp.array([0.0]), 2)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\), got -1 at index 0"):
        core.one_hot(jnp.array([-1]), 2)
    # An example that does not count may have any.
    got = core.one_hot(jnp.array([-1, 1]), 2, jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(got, [[1, 0], [0, 1]])
    # 300 classes are more than a label of 8 bits has.
    assert core.one_hot(jnp.array([255], jnp.uint8), 300).argmax() == 255


def test_a_traced_label_outside_is_nan():
    got = jax.jit(core.one_hot, static_argnums=1)(jnp.array([0, 2, -1]), 2)
    np.testing.assert_array_equal(got, [[1, 0], [NAN, NAN], [NAN, NAN]])


def test_bad_weights_and_empty_batches_are_named():
    with pytest.raises(ValueError, match=r"weight must have shape \(3,\), .* got \(2,\)"):
        core.weighted_mean(jnp.zeros(3), jnp.ones(2))
    with pytest.raises(ValueError, match=r"weight must have shape \(3,\), .* got \(3, 1\)"):
        core.filled(jnp.zeros(3), jnp.ones((3, 1)))
    with pytest.raises(ValueError, match=r"mean must be over at least one example, .* \(0, 4\)"):
        core.weighted_mean(jnp.zeros((0, 4)))
