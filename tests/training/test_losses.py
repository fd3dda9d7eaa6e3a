"""Losses by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import core, training

LOG3 = np.log(3.0)
LOGITS = jnp.array([[LOG3, 0.0], [LOG3, 0.0]], jnp.float32)  # probabilities 3/4 and 1/4


def test_cross_entropy_by_hand():
    """Smoothed by 1/2, the target is 3/4, 1/4."""
    labels = jnp.array([0, 1])
    first, second = -np.log(3 / 4), -np.log(1 / 4)
    np.testing.assert_allclose(training.cross_entropy(LOGITS, labels), [first, second], rtol=1e-6)
    smoothed = training.cross_entropy(LOGITS, labels, smoothing=0.5)
    assert smoothed[0] == pytest.approx(3 / 4 * first + 1 / 4 * second, rel=1e-6)
    # Of an image of 1 × 2 pixels, their mean.
    of_pixels = training.cross_entropy(LOGITS[None, None], labels[None, None])
    np.testing.assert_allclose(of_pixels, [(first + second) / 2], rtol=1e-6)


def test_void_pixels_do_not_count():
    """Of 1 × 3 pixels two count; of an image without any, nothing. What is there may be NaN."""
    logits = jnp.stack([LOGITS[0], jnp.full(2, jnp.nan), LOGITS[1]])[None, None]
    logits = jnp.concatenate([logits, logits])
    labels = jnp.array([[[0, core.VOID, 1]], [[-1, -1, -1]]])
    first, second = -np.log(3 / 4), -np.log(1 / 4)
    expected = [(first + second) / 2, 0.0]
    for own in (labels, np.asarray(labels)):
        np.testing.assert_allclose(training.cross_entropy(logits, own), expected, rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: training.cross_entropy(x, labels).sum()))(logits)
    np.testing.assert_allclose(gradient[0, 0, ::2], [[-1 / 8, 1 / 8], [3 / 8, -3 / 8]], rtol=1e-6)
    assert not np.any(gradient[0, 0, 1])
    assert not np.any(gradient[1])
    # A label of an image is a class in any case.
    assert np.isnan(jax.jit(training.cross_entropy)(LOGITS, jnp.array([0, -1]))).tolist() == [0, 1]


def test_distillation_by_hand():
    """At T = 2, logits 2 log 3 and 0 are probabilities 3/4 and 1/4; the student's are 1/2, 1/2.

    KL = 3/4 log(3/2) + 1/4 log(1/2), times T² = 4.
    """
    got = training.distillation_loss(jnp.zeros((2, 2)), 2 * LOGITS, temperature=2.0)
    divergence = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    np.testing.assert_allclose(got, [4 * divergence] * 2, rtol=1e-6)
    of_pixels = training.distillation_loss(jnp.zeros((1, 1, 2, 2)), 2 * LOGITS[None, None], 2.0)
    np.testing.assert_allclose(of_pixels, [4 * divergence], rtol=1e-6)


def test_distillation_gradient_is_hintons_formula():
    """d/dz of T² KL is T (softmax(z/T) - softmax(v/T)); none reaches the teacher."""
    rng = np.random.default_rng(0)
    student, teacher = jnp.asarray(rng.normal(size=(2, 4, 5)), jnp.float32)
    loss = lambda z, v: training.distillation_loss(z, v, temperature=3.0).sum()  # noqa: E731
    to_student, to_teacher = jax.grad(loss, argnums=(0, 1))(student, teacher)
    expected = 3 * (jax.nn.softmax(student / 3) - jax.nn.softmax(teacher / 3))
    np.testing.assert_allclose(to_student, expected, atol=1e-6)
    assert not np.any(to_teacher)


def test_squared_error_by_hand():
    """(1² + 3²) / 2 and 2²; (B, 1) outputs and (B,) labels are no (B, B) differences."""
    got = training.squared_error(jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 5.0]]))
    np.testing.assert_allclose(got, [5.0])
    for labels in (jnp.array([3.0, 1.0]), jnp.array([[3.0], [1.0]])):
        np.testing.assert_allclose(
            training.squared_error(jnp.array([[1.0], [1.0]]), labels), [4.0, 0.0]
        )
    with pytest.raises(ValueError, match=r"labels must have 2 values for each .* got shape \(1, 1"):
        training.squared_error(jnp.zeros((1, 2)), jnp.zeros((1, 1)))


def test_labels_outside_the_classes():
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\), got 99 at index 1"):
        training.cross_entropy(LOGITS, jnp.array([0, 99]))
    assert np.isnan(jax.jit(training.cross_entropy)(LOGITS, jnp.array([0, 99]))[1])
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\) .* got \(2, 1\)"):
        training.cross_entropy(LOGITS, jnp.zeros((2, 1), int))


def test_a_class_that_is_ruled_out_makes_no_nan():
    """Of three classes the last is ruled out: the loss is that of the others, log 4/3."""
    logits = jnp.array([[LOG3, 0.0, -jnp.inf]])
    hard = lambda z: training.cross_entropy(z, jnp.array([0])).sum()  # noqa: E731
    got, gradient = jax.value_and_grad(hard)(logits)
    assert got == pytest.approx(np.log(4 / 3), rel=1e-6)
    np.testing.assert_allclose(gradient, [[-1 / 4, 1 / 4, 0]], rtol=1e-6)
    distill = lambda z: training.distillation_loss(z, logits, 1.0).sum()  # noqa: E731
    for student, expected in [
        (logits, 0),
        (jnp.zeros((1, 3)), 0.75 * np.log(9 / 4) + 0.25 * np.log(3 / 4)),
    ]:
        got, gradient = jax.value_and_grad(distill)(student)
        assert got == pytest.approx(expected, abs=1e-6)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_losses_of_half_precision_outputs_are_in_float32(dtype):
    """log(1 + 9 e^-8) = 0.0030146, of which bfloat16 makes 0; 400² is no float16."""
    sure = jnp.zeros((1, 10), dtype).at[:, 0].set(8.0)
    got = training.cross_entropy(sure, jnp.zeros(1, int))
    assert got.dtype == jnp.float32
    assert got[0] == pytest.approx(0.0030146, rel=1e-3)
    got = training.squared_error(jnp.full((1, 2), 400, dtype), jnp.zeros((1, 2)))
    assert got[0] == 160000
