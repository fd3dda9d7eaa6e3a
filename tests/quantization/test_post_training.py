"""What recovers accuracy without training, put together, on images of digits held out."""

import jax
import jax.numpy as jnp
import pytest

from hybrid_jax import core, training
from hybrid_jax import program as p
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
    spec = per_tensor(digits.fn, digits.params, digits.images[:1], bits=4)
    images, program = digits.held_out_images, p.lower(digits.fn, digits.params, digits.images[:1])
    expected = p.run(program)(images)

    def planned(program):
        made = q.plan(program, spec)
        return made, q.calibrate_edges(made, batches, "mse")

    def judged(made, ranges, params):
        logits = jax.jit(q.as_deployed(made))(params, ranges, images)
        correct = jnp.argmax(logits, axis=-1) == digits.held_out_labels
        return float(correct.mean()), float(jnp.mean((logits - expected) ** 2))

    plain = judged(*planned(program), program.params)
    made, ranges = planned(q.equalize(program, *batches[0])[0])
    rounded = q.adaround(made, ranges, batches, jax.random.key(0), BLOCKS, steps=300)
    corrected = q.correct_biases(made, ranges, batches, rounded)
    accuracy, error = judged(made, ranges, corrected)
    assert accuracy > plain[0]
    assert error < 0.5 * plain[1]
    integers = q.encode(made.replace(corrected), ranges, images[:8])
    agree = p.run(integers)(images).argmax(-1) == jax.jit(q.as_deployed(made))(
        corrected, ranges, images
    ).argmax(-1)
    assert agree.mean() > 0.99


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
