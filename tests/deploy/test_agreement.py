"""Law 8, of lowering: what is deployed computes what was fake-quantized in training."""

import jax
import jax.numpy as jnp
import numpy as np
import public
import pytest
from lowered import deployed, in_integers

from hybrid_jax import core, deploy, models, quantization
from hybrid_jax import program as p

DEEP = ("densenet40", "resnet50", "vgg16_bn")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in DEEP else n for n in models.names()],
)
@pytest.mark.parametrize("weight_bits", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_a_model_is_deployed_as_it_was_trained(name, weight_bits, small_model, real_images):
    fn, _, params, x = small_model(name)
    x = real_images(x.shape[1])
    calibration, x = x[:256], x[256:]
    made = deployed(fn, params, calibration, weight_bits=weight_bits)
    expected = made.fake(x)
    # All but values next to half a step, which sums in another order may round the other way.
    for got in (jax.jit(way(made.integers))(x) for way in (p.simulate, p.run)):
        assert jnp.abs(got - expected).mean() / expected.std() <= 2e-3
        assert (got.argmax(1) == expected.argmax(1)).mean() >= 0.995


@pytest.mark.parametrize("name", ["resnet50"])
def test_tensors_that_two_layers_take_are_stored_once(name, small_model):
    fn, _, params, x = small_model(name)
    spec = quantization.spec(core.trace(fn, params, x))
    ranges = quantization.calibrate(fn, params, [(x,)], spec)
    # As training leaves them: the ranges of two layers of the same tensor have moved apart.
    moved = {
        name: jax.tree.map(lambda end, i=i: end * np.float32(1 + i / 1000), span)
        for i, (name, span) in enumerate(ranges.items())
    }
    # A range belongs to an edge, whatever the sites were trained with.
    program = in_integers(fn, params, spec, moved, x)
    assert sum(isinstance(op, p.Convert) for op in program.operations) == 1  # of the input


# Measured: 0.9985, 0.998 and 0.998 for 8, 7 and 4 bits; in OpenVINO 0.995, 0.996 and 0.993.
@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 7, 4])
def test_a_public_network_answers_in_files_as_it_was_quantized(bits, tmp_path):
    fn, params = public.network("resnet20", "resnet20_cifar10_jpeg")
    (calibration, _), (images, _) = public.cifar10("train", 256), public.cifar10("test", 2000)
    first_last = 7 if bits == 7 else 8
    made = deployed(fn, params, calibration, weight_bits=bits, first_last_bits=first_last)

    def named(run):
        parts = [run(images[i : i + 100]) for i in range(0, len(images), 100)]
        return np.concatenate([np.asarray(part) for part in parts]).argmax(1)

    expected = named(made.fake)
    for target, least in {"onnx": 0.995, "tflite": 0.995, "c": 0.995, "openvino": 0.985}.items():
        path = tmp_path / target
        try:
            deploy.export_to(target, path, made.integers)
            run = deploy.TARGETS[target].session(path, batch=100, threads=None)
        except ImportError:
            continue
        assert (named(run) == expected).mean() >= least
