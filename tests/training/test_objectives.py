"""Objectives: what holds of each by name, a user's own, and the loss of a step made of one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import training

LOG3 = np.log(3.0)
LOGITS = jnp.array([[LOG3, 0.0], [LOG3, 0.0]], jnp.float32)  # probabilities 3/4 and 1/4
KINDS = {  # outputs and labels of two examples, right ones first
    "classes": ("classification", LOGITS, jnp.array([0, 1])),
    "pixels": (
        "classification",
        jnp.stack([LOGITS[None], -LOGITS[None]]),  # (2, 1, 2, 2)
        jnp.array([[[0, 0]], [[0, 1]]]),
    ),
    "values": ("regression", jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[1.0, 2], [0, 3]])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_contract_of_every_objective(kind):
    name, outputs, labels = KINDS[kind]
    made = training.objective(name)
    training.check_objective(made, outputs, labels)
    loss, score = made.loss(outputs, labels), made.score(outputs, labels)
    assert loss.shape == score.shape == (2,)
    assert loss[0] < loss[1]
    assert score[0] > score[1]
    np.testing.assert_allclose(made.distillation(outputs, outputs), 0, atol=1e-6)
    assert made.distillation(outputs, outputs * 3)[0] > 0
    assert training.OBJECTIVES[name].__doc__
    np.testing.assert_allclose(jax.jit(made.loss)(outputs, labels), loss, rtol=1e-6)
    assert not np.any(jax.grad(lambda t: made.distillation(outputs, t).sum())(outputs * 2))


def test_score_and_confidence_by_hand():
    classes, values = training.objective("classification"), training.objective("regression")
    assert classes.metric == "accuracy"
    assert classes.score(LOGITS.at[0, 0].set(jnp.nan), jnp.array([0, 0])).tolist() == [0, 1]
    np.testing.assert_allclose(classes.confidence(LOGITS), [0.75, 0.75])
    # Of two pixels one is right; their largest probabilities are 3/4 and 1/2.
    pixels = jnp.array([[[[LOG3, 0.0], [0.0, 0.0]]]], jnp.float32)
    assert classes.score(pixels, jnp.array([[[1, 0]]])).tolist() == [0.5]
    np.testing.assert_allclose(classes.confidence(pixels), [0.625])
    assert values.confidence is None
    assert values.score(jnp.array([[3.0]]), jnp.array([1.0])).tolist() == [-4]


def test_void_pixels_count_in_no_score_and_teach_nothing():
    """Of an image of 1 × 3 pixels the first and the last count, of which the first is right."""
    made = training.objective("classification")
    outputs = jnp.stack([LOGITS[0]] * 3)[None, None]
    labels = jnp.array([[[0, -1, 1]]])
    assert made.score(outputs, labels).tolist() == [0.5]
    batch = {"label": labels, "teacher": -outputs}
    gradient = jax.grad(lambda x: training.example_loss(made, x, batch, 1.0).sum())(outputs)
    assert not np.any(gradient[0, 0, 1])
    assert np.all(gradient[0, 0, ::2])
    given = jax.grad(lambda x: training.example_loss(made, x, batch, 0.5).sum())(outputs)
    assert not np.any(given[0, 0, 1])


def absolute(outputs, labels):
    return jnp.abs(outputs - labels).mean(-1)


def test_functions_of_the_users_own():
    own = training.objective("regression", loss=absolute, metric=lambda o, y: -absolute(o, y))
    outputs, labels = jnp.array([[1.0, 3.0]]), jnp.array([[1.0, 0.0]])
    assert own.loss(outputs, labels).tolist() == [1.5]
    assert (own.score(outputs, labels).tolist(), own.metric) == ([-1.5], "metric")
    assert own.distillation(outputs, labels).tolist() == [4.5]  # of the regression
    assert training.objective("regression", metric=absolute).metric == "absolute"


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (
            {"loss": lambda o, y: absolute(o, y).mean()},
            r"loss must .* shape \(4,\), got shape \(\)$",
        ),
        ({"loss": lambda o, y: jnp.abs(o - y)}, r"loss must .* shape \(4,\), got shape \(4, 2\)$"),
        ({"metric": lambda o, y: "good"}, "metric must .* for each of 4 examples, .*, got 'good'$"),
        ({"metric": lambda o, y: 0.5}, "metric must .*, got 0.5$"),
        ({"metric": lambda o, y: float(o[0, 0])}, "metric must be a function of .*Concretization"),
        ({"metric": lambda o: o}, "metric must be a function of .* got TypeError: .*lambda"),
        ({"confidence": lambda o: o}, r"confidence must .*, got shape \(4, 2\)$"),
        ({"distillation": lambda o, t: o}, r"distillation must .*, got shape \(4, 2\)$"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_computed(given, match):
    own = training.objective("regression", **given)
    shape = jax.ShapeDtypeStruct((4, 2), jnp.float32)
    with pytest.raises(ValueError, match=match) as caught:
        training.check_objective(own, shape, shape)
    assert len(str(caught.value).splitlines()) == 1


def test_errors_name_the_argument():
    for changes, match in [
        ({"temperature": 0}, "temperature must be a finite number above 0, got 0"),
        ({"smoothing": -0.1}, r"smoothing must be in \[0, 1\], got -0.1"),
        ({"loss": 3}, "loss must be a function of a batch, got 3"),
        ({"name": "regresion"}, "objective must be one of .*; did you mean regression"),
    ]:
        with pytest.raises(ValueError, match=match):
            training.objective(**changes)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        training.loss_of(None, training.classification(), 1.5)
    loss_fn = training.loss_of(lambda p, s, x, key: (x, s), training.classification(), 0.5)
    with pytest.raises(ValueError, match=r"batch must hold .teacher. outputs"):
        loss_fn({}, {}, {"image": LOGITS, "label": jnp.zeros(2, int)}, None)


def test_loss_of_a_step_weighs_loss_and_score():
    """Example 0 is right, example 1 wrong; weights 3 and 1 make the accuracy 3/4."""
    loss_fn = training.loss_of(lambda p, s, x, key: (x, {"new": 1}), training.classification())
    batch = {"image": LOGITS, "label": jnp.array([0, 1]), "weight": jnp.array([3.0, 1.0])}
    loss, (state, metrics) = loss_fn({}, {}, batch, jax.random.key(0))
    assert loss == pytest.approx((3 * -np.log(3 / 4) - np.log(1 / 4)) / 4, rel=1e-6)
    assert (state, float(metrics["accuracy"])) == ({"new": 1}, 0.75)
    none = batch | {"weight": jnp.zeros(2), "label": jnp.array([7, -1])}
    loss, (_, metrics) = loss_fn({}, {}, none, None)
    assert (loss, metrics["accuracy"]) == (0, 0)


def test_padding_is_not_in_the_loss_even_if_its_forward_pass_is_nan():
    """An empty image is 0 / 0; the other is (3, 4) / 5, its loss log(1 + e^(0.6 - 0.8)).

    The gradient is x (softmax - target): p = e^0.6 / (e^0.6 + e^0.8) = 0.45017 of (0.6, 0.8).
    """
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    loss_fn = training.loss_of(
        lambda w, state, x, key: (unit(x) @ w, state), training.classification(), alpha=0.5
    )
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


@pytest.mark.parametrize("kind", KINDS)
def test_no_nan_of_weight_0_comes_through_whatever_the_objective(kind):
    """Not even where no example counts, and nothing can be put in the place of one."""
    name, outputs, labels = KINDS[kind]
    loss_fn = training.loss_of(lambda w, s, x, key: (w * x, s), training.objective(name), 0.5)
    broken = jnp.stack([outputs[0], jnp.full_like(outputs[1], jnp.nan)])
    batch = {"image": outputs, "label": labels, "teacher": broken}
    grad = jax.value_and_grad(loss_fn, has_aux=True)
    for weight in ([2.0, 0.0], [0.0, 0.0]):
        own = batch | {"weight": jnp.array(weight)}
        (loss, _), gradient = grad(jnp.float32(2), {}, own, None)
        assert np.isfinite([loss, gradient]).all()
        own["image"] = broken
        if weight[0]:
            (same, _), also = grad(jnp.float32(2), {}, own, None)
            assert (same, also) == (loss, gradient)


def test_batch_statistics_are_of_the_examples_that_count():
    loss_fn = training.loss_of(
        lambda w, state, x, key: (x, x.mean((0, 1))), training.classification()
    )
    batch = {"image": jnp.array([[1.0], [jnp.nan], [3.0], [9e9]]), "label": jnp.zeros(4, int)}
    _, (state, _) = loss_fn({}, {}, batch | {"weight": jnp.array([0.5, 0, 1, 0])}, None)
    assert state == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_any_objective_learns(kind):
    name, outputs, labels = KINDS[kind]
    made = training.objective(name)
    forward = lambda w, state, x, key: (x + w, state)  # noqa: E731
    step = training.make_step(training.loss_of(forward, made, 0.5), teacher=lambda x: x * 2)
    state = training.create_state(jnp.zeros(outputs.shape), {}, optax.sgd(0.1), jax.random.key(0))
    batch, losses = {"image": outputs, "label": labels}, []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[1] < losses[0]
    assert metrics.keys() == {"loss", made.metric}
