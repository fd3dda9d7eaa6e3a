"""Evaluation equals NumPy for any number of examples, and compiles once."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax import contrib, data, experts, training

COUNT = st.integers(1, 13)


def predict(params, images):
    return images[:, 0, 0, :] * params


def make_arrays(count):
    rng = np.random.default_rng(count)
    images = rng.normal(size=(count, 1, 1, 3)).astype(np.float32)
    return data.Arrays(images, rng.integers(0, 3, count, np.int32))


def by_numpy(arrays, scale):
    logits = arrays.images[:, 0, 0, :].astype(np.float64) * scale
    chosen = logits[np.arange(len(logits)), arrays.labels]
    loss = np.log(np.exp(logits).sum(-1)) - chosen
    return {"accuracy": np.mean(logits.argmax(-1) == arrays.labels), "loss": loss.mean()}


@settings(max_examples=25)
@given(count=COUNT, batch_size=st.sampled_from([1, 4, 5]))
def test_equals_numpy(count, batch_size):
    arrays = make_arrays(count)
    got = training.evaluate(predict, jnp.float32(2), arrays, batch_size)
    expected = by_numpy(arrays, 2.0)
    assert got["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-12)
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    logits = training.predict_logits(predict, jnp.float32(2), arrays, batch_size)
    np.testing.assert_allclose(logits, arrays.images[:, 0, 0, :] * np.float32(2))


def test_outputs_and_labels_of_any_shape():
    """Values: errors 1, 1 and 4, 0. Pixels: of five images one pixel of two is of class 1."""
    images = np.arange(5.0, dtype=np.float32).reshape(5, 1, 1, 1)
    values = data.Arrays(images, images.reshape(5, 1) + np.float32(2))
    predict = lambda params, x: x[:, 0, 0]  # noqa: E731
    got = training.evaluate(predict, None, values, 2, objective=training.regression())
    assert got == {"negative_squared_error": -4, "loss": 4}
    pixels = data.Arrays(images, np.tile(np.array([[[0, 1]]]), (5, 1, 1)))
    sure = lambda params, x: jnp.stack([x + 50, x], -1).repeat(2, 2)[:, :, :, 0]  # noqa: E731
    got = training.evaluate(sure, None, pixels, 2)
    assert got == {"accuracy": 0.5, "loss": 25}
    assert training.predict_logits(sure, None, pixels, 2, fill=True).shape == (5, 1, 2, 2)
    unlabelled = data.Arrays(images, None)
    assert training.predict_logits(predict, None, unlabelled, 2).ravel().tolist() == [*range(5)]


def test_compiles_once_for_each_size():
    traces = []

    def counted(params, images):
        traces.append(images.shape)
        return predict(params, images)

    for count, scale in [(13, 1.0), (5, 2.0), (8, 1.0)]:
        training.evaluate(counted, jnp.float32(scale), make_arrays(count), 4)
        training.predict_logits(counted, jnp.float32(scale), make_arrays(count), 4)
    assert traces == [(4, 1, 1, 3), (1, 1, 1, 3)]


def test_filled_up_all_sets_are_of_one_shape():
    traces = []

    def counted(params, images):
        traces.append(images.shape)
        return predict(params, images)

    for count in (2, 4, 7):
        arrays = make_arrays(count)
        filled = training.predict_logits(counted, jnp.float32(2), arrays, 4, fill=True)
        expected = training.predict_logits(predict, jnp.float32(2), arrays, 4)
        np.testing.assert_array_equal(filled, expected)
    assert traces == [(4, 1, 1, 3)]


def test_the_last_batch_holds_nothing_but_its_examples():
    """Five inputs, three of class 0 and two of class 1, in batches of 5 and 8, and of 3 and 2.

    Each expert has ceil(5/2) = 3 places, or ceil(3/2) = 2 and ceil(2/2) = 1: room for all. Filled
    up with copies of the first input, places of the later ones would be taken.
    """
    fn = lambda w, x: x @ w  # noqa: E731
    moe = contrib.gathered(fn, fn, experts.switch(), capacity_factor=1.0, method="unroll")
    params = jnp.stack([jnp.eye(2), jnp.eye(2)]), 4 * jnp.eye(2)  # the class is the larger input
    images = np.array([[2.0, 0.0], [0.0, 2.0], [0.0, 1.5], [1.5, 0.0], [1.0, 0.0]], np.float32)
    arrays = data.Arrays(images, np.array([0, 1, 1, 0, 0]))
    without_an_expert = jnp.array([[0.0, 1e-3]])
    predict = lambda p, x: moe(*p, x)[0] + without_an_expert  # noqa: E731
    for size in (5, 8):
        assert training.evaluate(predict, params, arrays, size)["accuracy"] == 1
        logits = training.predict_logits(predict, params, arrays, size)
        np.testing.assert_array_equal(logits.argmax(-1), arrays.labels)
    # Weight 0 does not run: without input 0, or 0 and 3, the rest still has its places.
    for weight in ([0, 1, 1, 1, 1], [0, 1, 1, 0, 2]):
        got = training.evaluate(predict, params, arrays, 4, weight=np.array(weight))
        assert got["accuracy"] == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_half_precision_logits_are_summed_in_float64(dtype):
    """log(1 + 9 e^-8) = 0.0030146 each, and 200 each, of 512."""
    arrays = data.Arrays(np.zeros((512, 1, 1, 1), np.uint8), np.zeros(512, np.int32))
    for classes, logit, expected in [(10, 8.0, 0.0030146), (2, -200.0, 200.0)]:
        logits = jnp.zeros((512, classes), dtype).at[:, 0].set(logit)
        got = training.evaluate(lambda z, x: z, logits, arrays, 512)
        assert got["loss"] == pytest.approx(expected, rel=1e-3)


def given(logits, labels, weight=None, size=8):
    """What evaluate makes of logits (n, N) that are the images."""
    arrays = data.Arrays(np.asarray(logits, np.float32), np.asarray(labels))
    return training.evaluate(lambda params, x: x, None, arrays, size, weight=weight)


def test_nan_logits_are_never_right():
    """Class 0 is the first, and where NumPy and JAX see the largest of NaN."""
    got = given([[2.0, 1.0], [np.nan, 1.0], [1.0, np.nan]], [0, 0, 1])
    assert got["accuracy"] == pytest.approx(1 / 3)
    assert np.isnan(got["loss"])
    # Infinity is a class, and its loss is no number.
    got = given([[np.inf, 1.0]], [0])
    assert got["accuracy"] == 1
    assert np.isnan(got["loss"])


def test_weights_weigh_and_weight_0_may_hold_anything():
    """Losses log 4/3 and log 4, weights 3 and 1."""
    logits = [[np.log(3), 0], [np.log(3), 0], [np.nan, 0]]
    for size in (1, 2, 3):
        got = given(logits, [0, 1, 99], np.array([3.0, 1, 0]), size)
        assert got["accuracy"] == 0.75
        assert got["loss"] == pytest.approx((3 * np.log(4 / 3) + np.log(4)) / 4)


@pytest.mark.parametrize("label", [99, -1, 2, 2**32 + 1, 2**32])
def test_labels_outside_the_classes_are_named(label):
    with pytest.raises(ValueError, match=rf"labels must be in \[0, 2\), got {label} at index 0"):
        given(np.zeros((3, 2)), [0, 1, label], size=1)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        training.evaluate(predict, 1.0, make_arrays(3), 0)
    arrays = make_arrays(3)
    for labels, got in ((arrays.labels[:0], r"\(0,\)"), (None, "None")):
        with pytest.raises(ValueError, match=f"a label for each of 3 images, got shape {got}"):
            training.evaluate(predict, 1.0, data.Arrays(arrays.images, labels), 2)
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\) .* got \(2, 1\)"):
        training.evaluate(predict, 1.0, data.Arrays(arrays.images, arrays.labels[:, None]), 2)
    for evaluate in (training.evaluate, training.predict_logits):
        with pytest.raises(ValueError, match="at least one image, got none"):
            evaluate(predict, 1.0, data.Arrays(arrays.images[:0], arrays.labels[:0]), 2)
        with pytest.raises(ValueError, match=r"outputs \(2, …\), got shape \(1, 1, 3\)"):
            evaluate(lambda params, x: x[0], 1.0, arrays, 2)
    with pytest.raises(ValueError, match="labels must be integers, got float64"):
        given(np.zeros((1, 2)), [0.0])
    for weight in ([1.0], [1.0, -1.0], [1.0, np.nan], [0.0, 0.0]):
        with pytest.raises(ValueError, match="weight must be 2 numbers of at least 0, not all 0"):
            given(np.zeros((2, 2)), [0, 1], np.array(weight))
