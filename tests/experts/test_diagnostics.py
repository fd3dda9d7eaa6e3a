import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import experts


def test_usage_counts_the_largest_weight():
    # Experts 0, 0, 2 and (a tie) 0.
    weights = jnp.array([[0.6, 0.4, 0.0], [1.0, 0.0, 0.0], [0.2, 0.0, 0.8], [0.5, 0.5, 0.0]])
    np.testing.assert_array_equal(experts.usage(weights), [0.75, 0, 0.25])
    got = experts.usage_per_class(weights, jnp.array([1, 1, 1, 0]), 3)
    np.testing.assert_allclose(got, [[1, 0, 0], [2 / 3, 0, 1 / 3], [0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_usage_entropy_bounds(count):
    even = experts.usage_entropy(jnp.full(count, 1 / count))
    np.testing.assert_allclose(even, np.log(count), atol=1e-6)
    np.testing.assert_array_equal(experts.usage_entropy(jnp.eye(count)[0]), 0)


def test_collapse():
    # An even share of 4 is 0.25, a tenth of it 0.025.
    two = jnp.array([0.5, 0.46, 0.02, 0.02])
    np.testing.assert_array_equal(experts.unused(two), [False, False, True, True])
    assert not experts.collapsed(two)
    assert experts.collapsed(jnp.array([0.94, 0.02, 0.02, 0.02]))
    assert not experts.collapsed(jnp.ones(1))
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got 1.5"):
        experts.unused(two, 1.5)


def test_disagreement():
    # Classes named for 4 images: 0 0 1 2, 0 1 1 2, 2 1 0 0. They differ on 1, 4 and 3 of 4.
    top = jnp.array([[0, 0, 1, 2], [0, 1, 1, 2], [2, 1, 0, 0]])
    got = experts.disagreement(jnp.eye(3)[top])
    np.testing.assert_array_equal(got, [[0, 0.25, 1], [0.25, 0, 0.75], [1, 0.75, 0]])


def test_an_input_without_an_expert_uses_none():
    # Experts 1 and 0, and an input that no expert took: a third each, and nobody's third.
    weights = jnp.array([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(experts.usage(weights), [1 / 3, 1 / 3], rtol=1e-6)
    per_class = experts.usage_per_class(weights, jnp.array([0, 1, 1]), 2)
    np.testing.assert_allclose(per_class, [[0, 1], [0.5, 0]])
    assert np.isnan(experts.usage(weights.at[0, 0].set(jnp.nan))).all()


def test_weights_of_inputs():
    # Weights 3 and 1 for experts 0 and 1, 0 for what is NaN and of no class.
    weights, weight = jnp.array([[1.0, 0.0], [0.0, 1.0], [jnp.nan, 0.0]]), jnp.array([3, 1, 0])
    np.testing.assert_allclose(experts.usage(weights, weight=weight), [0.75, 0.25])
    got = experts.usage_per_class(weights, jnp.array([0, 0, -1]), 2, weight=weight)
    np.testing.assert_allclose(got, [[0.75, 0.25], [0, 0]])


def test_labels_of_no_class():
    for label in (2, -1):
        message = rf"labels must be in \[0, 2\), got {label} at index 0"
        with pytest.raises(ValueError, match=message):
            experts.usage_per_class(jnp.eye(2), jnp.array([label, 0]), 2)
        with pytest.raises(ValueError, match=message):
            experts.oracle(jnp.zeros((3, 2, 2)), jnp.array([label, 0]))


def test_disagreement_on_maps_and_nan():
    # Two maps of 2 positions: classes 0 1 and 0 0, that is half; NaN is no class.
    maps = jnp.eye(2)[jnp.array([[[0, 1]], [[0, 0]]])]
    np.testing.assert_array_equal(experts.disagreement(maps), [[0, 0.5], [0.5, 0]])
    nan = maps.at[0, 0, 0, 0].set(jnp.nan)
    np.testing.assert_array_equal(experts.disagreement(nan), [[0, 1], [1, 0]])
