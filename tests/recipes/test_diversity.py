"""What tells experts apart by their training images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax.recipes import diversity


def test_a_bootstrap_sample_draws_with_replacement():
    # An image is missed by n draws with probability (1 - 1/n)^n, nearly 1/e = 0.368.
    weights = diversity.bootstrap(2000, 3, seed=1)
    assert weights.shape == (3, 2000)
    np.testing.assert_array_equal(weights.sum(1), 2000)
    np.testing.assert_allclose((weights == 0).mean(1), 0.368, atol=0.04)
    assert weights.max() > 2
    # Two experts miss the same image with probability 1/e² = 0.135: their samples are their own.
    assert (weights[:2] == 0).all(0).mean() == pytest.approx(0.135, abs=0.03)
    np.testing.assert_array_equal(weights, diversity.bootstrap(2000, 3, seed=1))


@given(st.integers(1, 12), st.integers(2, 8))
def test_every_class_is_owned_and_every_expert_owns_one(classes, count):
    own = diversity.own_classes(np.arange(classes), count)
    assert own.shape == (count, classes)
    assert own.any(0).all()
    assert own.any(1).all()


def test_classes_of_two_experts():
    labels = np.array([3, 0, 1, 4, 2])
    own = diversity.own_classes(labels, 2)  # even and odd ones
    assert own.astype(int).tolist() == [[0, 1, 0, 1, 1], [1, 0, 1, 0, 0]]


def test_clusters_part_the_images():
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(mean, 0.1, (5, 2)) for mean in (0, 5, 10)])
    own = diversity.own_cluster(features, 3, seed=0)
    np.testing.assert_array_equal(own.sum(0), 1)
    assert sorted(np.flatnonzero(row).tolist() for row in own) == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [10, 11, 12, 13, 14],
    ]
