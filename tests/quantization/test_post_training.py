"""What recovers accuracy without training, put together, on images of digits held out."""

import jax
import jax.numpy as jnp
import pytest

from hybrid_jax import core, training
from hybrid_jax import quantization as q

BLOCKS = ["params/(expand|project)/kernel"]


@pytest.fixture(scope="module")
def batches(digits):
    return [(digits.images[i : i + 64],) for i in range(0, 512, 64)]


def per_tensor(fn, params, x, bits):
    quantizers = {"weight": q.Quantizer(bits), "activation": q.Quantizer(bits, "affine")}
    return q.spec(core.trace(fn, params, x), [(".*", quantizers)])


@pytest.mark.slow
def test_all_together_beat_rounding(digits, batches):
    fn, refold = core.fold(digits.fn, digits.params, digits.images[:1])
    params = refold(digits.params)
    spec = per_tensor(fn, params, digits.images[:1], bits=4)
    q_fn = jax.jit(q.fake_quantized(fn, spec))

    expected = jax.jit(fn)(params, digits.held_out_images)

    def judged(params, ranges):
        logits = q_fn(params, ranges, digits.held_out_images)
        correct = jnp.argmax(logits, axis=-1) == digits.held_out_labels
        return float(correct.mean()), float(jnp.mean((logits - expected) ** 2))

    plain = judged(params, q.calibrate(fn, params, batches, spec, "mse"))
    even, _ = q.equalize(fn, params, *batches[0])
    ranges = q.calibrate(fn, even, batches, spec, "mse")
    rounded = q.adaround(fn, even, batches, spec, ranges, jax.random.key(0), BLOCKS, steps=300)
    corrected = q.correct_biases(fn, even, batches, spec, ranges, rounded)
    accuracy, error = judged(corrected, ranges)
    assert accuracy > plain[0]
    assert error < 0.5 * plain[1]


def test_reestimated_statistics_of_the_quantized_model(digits, batches):
    """`training.reestimate_batchnorm` takes the fake-quantized model in training mode."""
    spec = per_tensor(digits.fn, digits.params, digits.images[:1], bits=3)
    ranges = q.calibrate(digits.fn, digits.params, batches, spec, "mse")
    q_fn, q_train = (jax.jit(q.fake_quantized(f, spec)) for f in (digits.fn, digits.train))

    def forward(weights, statistics, images, key):
        del key
        params = {"params": weights, "batch_stats": statistics}
        logits, updates = q_train(params, ranges, images)
        return logits, updates["batch_stats"]

    weights, statistics = digits.params["params"], digits.params["batch_stats"]
    images = [batch for (batch,) in batches]
    new = training.reestimate_batchnorm(forward, weights, statistics, images)
    expected = jax.jit(digits.fn)(digits.params, digits.held_out_images)

    def error(statistics):
        params = {"params": weights, "batch_stats": statistics}
        return float(jnp.mean((q_fn(params, ranges, digits.held_out_images) - expected) ** 2))

    assert error(new) < error(statistics)
