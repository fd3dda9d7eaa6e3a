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


def test_padding_is_not_in_the_loss_even_if_its_forward_pass_is_nan():
    """An empty image is 0 / 0; the other is (3, 4) / 5, its loss log(1 + e^(0.6 - 0.8)).

    The gradient is x (softmax - target): p = e^0.6 / (e^0.6 + e^0.8) = 0.45017 of (0.6, 0.8).
    """
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    loss_fn = training.classification(lambda w, state, x, key: (unit(x) @ w, state), alpha=0.5)
    teacher = jnp.array([[0.6, 0.8], [jnp.nan, 0.0]])
    batch = {
        "image": jnp.array([[3.0, 4.0], [0.0, 0.0]]),
        "label": jnp.array([1, -1]),
        "weight": jnp.array([1.0, 0.0]),
        "teacher": teacher,
    }
    grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, (_, metrics)), gradient = grad(jnp.eye(2), {}, batch, None)
    assert loss == pytest.approx(0.5 * np.log1p(np.exp(-0.2)), rel=1e-5)  # the teacher agrees
    assert metrics["accuracy"] == 1
    np.testing.assert_allclose(
        gradient, 0.5 * 0.45017 * np.outer([0.6, 0.8], [1, -1]), rtol=1e-4, atol=1e-6
    )


def test_batch_statistics_are_of_the_examples_that_count():
    loss_fn = training.classification(lambda w, state, x, key: (x, x.mean((0, 1))))
    batch = {"image": jnp.array([[1.0], [jnp.nan], [3.0], [9e9]]), "label": jnp.zeros(4, int)}
    _, (state, _) = loss_fn({}, {}, batch | {"weight": jnp.array([0.5, 0, 1, 0])}, None)
    assert state == 2


def test_losses_alone_let_no_nan_of_weight_0_through():
    logits, labels = jnp.array([[LOG3, 0.0], [jnp.nan, jnp.inf]]), jnp.array([0, 99])
    weight = jnp.array([1.0, 0.0])
    for loss in (
        lambda z: training.cross_entropy(z, labels, smoothing=0.5, weight=weight),
        lambda z: training.distillation_loss(z, logits, labels, alpha=0.5, weight=weight),
    ):
        assert np.isfinite(loss(logits))
        gradient = jax.grad(loss)(logits)
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[1], 0)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\), got 99 at index 1"):
        training.cross_entropy(logits, labels)
    assert np.isnan(jax.jit(training.cross_entropy)(jnp.zeros((2, 2)), labels))


def test_a_class_that_is_ruled_out_makes_no_nan():
    """Of three classes the last is ruled out: the loss is that of the others, log 4/3."""
    logits = jnp.array([[LOG3, 0.0, -jnp.inf]])
    got, gradient = jax.value_and_grad(training.cross_entropy)(logits, jnp.array([0]))
    assert got == pytest.approx(np.log(4 / 3), rel=1e-6)
    np.testing.assert_allclose(gradient, [[-1 / 4, 1 / 4, 0]], rtol=1e-6)
    distill = lambda z: training.distillation_loss(z, logits, jnp.array([0]), 1.0, 1.0)  # noqa: E731
    for student, expected in [
        (logits, 0),
        (jnp.zeros((1, 3)), 0.75 * np.log(9 / 4) + 0.25 * np.log(3 / 4)),
    ]:
        got, gradient = jax.value_and_grad(distill)(student)
        assert got == pytest.approx(expected, abs=1e-6)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_losses_of_half_precision_logits_are_in_float32(dtype):
    """log(1 + 9 e^-8) = 0.0030146, of which bfloat16 makes 0; 512 of 200 are no float16."""
    sure = jnp.zeros((512, 10), dtype).at[:, 0].set(8.0)
    wrong = jnp.zeros((512, 2), dtype).at[:, 0].set(-200.0)
    labels = jnp.zeros(512, int)
    got = training.cross_entropy(sure, labels, weight=jnp.ones(512, dtype))
    assert got.dtype == jnp.float32
    assert got == pytest.approx(0.0030146, rel=1e-3)
    assert training.cross_entropy(wrong, labels) == 200
    assert training.distillation_loss(wrong, wrong, labels, alpha=0.0) == 200


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
