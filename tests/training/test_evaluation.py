"""Evaluation equals NumPy for any number of examples, and compiles once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax import data, training

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


@settings(deadline=None, max_examples=25)
@given(count=COUNT, batch_size=st.sampled_from([1, 4, 5]))
def test_equals_numpy(count, batch_size):
    arrays = make_arrays(count)
    got = training.evaluate(predict, jnp.float32(2), arrays, batch_size)
    expected = by_numpy(arrays, 2.0)
    assert got["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-12)
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    logits = training.predict_logits(predict, jnp.float32(2), arrays, batch_size)
    np.testing.assert_allclose(logits, arrays.images[:, 0, 0, :] * np.float32(2))


def test_a_stack_gives_one_number_for_each_expert():
    arrays, scales = make_arrays(7), jnp.array([1.0, -1.0])
    stacked = jax.vmap(predict, in_axes=(0, None))
    got = training.evaluate(stacked, scales, arrays, 4)
    for key in ("accuracy", "loss"):
        expected = [by_numpy(arrays, scale)[key] for scale in (1.0, -1.0)]
        np.testing.assert_allclose(got[key], expected, rtol=1e-5)
    assert training.predict_logits(stacked, scales, arrays, 4).shape == (2, 7, 3)


def test_compiles_once():
    traces = []

    def counted(params, images):
        traces.append(images.shape)
        return predict(params, images)

    for count, scale in [(13, 1.0), (6, 2.0)]:
        training.evaluate(counted, jnp.float32(scale), make_arrays(count), 4)
    assert traces == [(4, 1, 1, 3)]


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        training.evaluate(predict, 1.0, make_arrays(3), 0)
    arrays = make_arrays(3)
    with pytest.raises(ValueError, match="got 3 images and 0 labels"):
        training.evaluate(predict, 1.0, data.Arrays(arrays.images, arrays.labels[:0]), 2)
