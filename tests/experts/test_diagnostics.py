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
