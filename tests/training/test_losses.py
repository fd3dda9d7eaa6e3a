"""Losses by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import training

LOG3 = np.log(3.0)


def test_cross_entropy_by_hand():
    """Logits (log 3, 0): probabilities 3/4 and 1/4. Smoothed by 1/2, the target is 3/4, 1/4."""
    logits = jnp.array([[LOG3, 0.0], [LOG3, 0.0]], jnp.float32)
    labels = jnp.array([0, 1])
    first, second = -np.log(3 / 4), -np.log(1 / 4)
    for weight, expected in [
        (None, (first + second) / 2),
        ([3.0, 1.0], (3 * first + second) / 4),
        ([0.0, 0.0], 0.0),
    ]:
        weight = None if weight is None else jnp.array(weight)
        got = training.cross_entropy(logits, labels, weight=weight)
        assert got == pytest.approx(expected, rel=1e-6)
    smoothed = training.cross_entropy(logits[:1], labels[:1], smoothing=0.5)
    assert smoothed == pytest.approx(3 / 4 * first + 1 / 4 * second, rel=1e-6)


def test_distillation_by_hand():
    """At T = 2, logits 2 log 3 and 0 are probabilities 3/4 and 1/4; the student's are 1/2, 1/2.

    KL = 3/4 log(3/2) + 1/4 log(1/2), times T² = 4; the labels' part is log 2.
    """
    teacher = jnp.array([[2 * LOG3, 0.0]], jnp.float32)
    got = training.distillation_loss(
        jnp.zeros((1, 2)), teacher, jnp.array([0]), temperature=2.0, alpha=0.25
    )
    divergence = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert got == pytest.approx(0.75 * np.log(2) + 0.25 * 4 * divergence, rel=1e-6)


def test_distillation_gradient_is_hintons_formula():
    """d/dz of T² KL is T (softmax(z/T) - softmax(v/T)), mean over B; none reaches the teacher."""
    rng = np.random.default_rng(0)
    student, teacher = jnp.asarray(rng.normal(size=(2, 4, 5)), jnp.float32)
    loss = lambda z, v: training.distillation_loss(  # noqa: E731
        z, v, jnp.zeros(4, jnp.int32), temperature=3.0, alpha=1.0
    )
    to_student, to_teacher = jax.grad(loss, argnums=(0, 1))(student, teacher)
    expected = 3 * (jax.nn.softmax(student / 3) - jax.nn.softmax(teacher / 3)) / 4
    np.testing.assert_allclose(to_student, expected, atol=1e-6)
    assert not np.any(to_teacher)


def test_classification_weighs_loss_and_accuracy():
    """Example 0 is right, example 1 wrong; weights 3 and 1 make the accuracy 3/4."""
    logits = jnp.array([[LOG3, 0.0], [LOG3, 0.0]], jnp.float32)
    loss_fn = training.classification(lambda params, state, images, key: (logits, {"new": 1}))
    batch = {"image": None, "label": jnp.array([0, 1]), "weight": jnp.array([3.0, 1.0])}
    loss, (state, metrics) = loss_fn({}, {}, batch, jax.random.key(0))
    assert loss == pytest.approx((3 * -np.log(3 / 4) - np.log(1 / 4)) / 4, rel=1e-6)
    assert (state, float(metrics["accuracy"])) == ({"new": 1}, 0.75)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"temperature": 0}, "temperature must be a finite number above 0, got 0"),
        ({"smoothing": -0.1}, r"smoothing must be in \[0, 1\], got -0.1"),
    ],
)
def test_errors_name_the_argument(changes, match):
    with pytest.raises(ValueError, match=match):
        training.classification(lambda *args: None, **changes)
    with pytest.raises(ValueError, match=match):
        training.distillation_loss(
            jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.zeros(1, jnp.int32), **changes
        )
