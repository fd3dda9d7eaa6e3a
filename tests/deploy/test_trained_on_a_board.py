"""Public networks, quantized without training, as C files on an emulated Cortex-M4.

`pytest -m slow -s tests/deploy/test_trained_on_a_board.py` prints the README's table.
"""

import importlib.util

import numpy as np
import public
import pytest
from compiled import COMPILERS

from hybrid_jax import core, deploy, experts, quantization
from hybrid_jax import program as p

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMPILERS, reason="no C compiler"),
    *(
        pytest.mark.skipif(not importlib.util.find_spec(name), reason=f"no {name}")
        for name in ("ziglang", "unicorn")
    ),
]
CHOSEN, JUDGED = 500, 1000  # test images that choose a threshold, and others that judge
DEAR = 0.176  # of the images go on: 40.6 M MACs and 0.176 · 125.5 M are half of 125.5 M
SHARE = 0.5


def quantized(name, images, bits):
    """In integers, by GPTQ and with corrected biases below 8 bits."""
    fn, params = public.network(name, f"{name}_cifar10_jpeg")
    spec = quantization.spec(core.trace(fn, params, images[:1]), weight_bits=bits)
    planned = quantization.plan(p.lower(fn, params, images[:1]), spec)
    ranges = quantization.calibrate_edges(planned, [(images,)], method="mse")
    if bits < 8:
        weights = quantization.gptq_planned(planned, ranges, [(images,)])
        weights = quantization.correct_biases(planned, ranges, [(images,)], weights)
        planned = planned.replace(weights)
    return quantization.encode(planned, ranges, images[:16])


def answers(path, program, images):
    """What the file answers on this machine."""
    deploy.export_to("c", path, program)
    return deploy.TARGETS["c"].session(path, batch=1, threads=1)(images)


def test_a_trained_network_in_floats_in_int8_in_4_bits_and_a_cascade(tmp_path):
    calibration, _ = public.cifar10("train", 256)
    images, labels = public.cifar10("test", CHOSEN + JUDGED)
    fn, params = public.network("resnet20", "resnet20_cifar10_jpeg")
    small = quantized("resnet20", calibration, 4)
    programs = {
        "ResNet-20 in floats": p.lower(fn, params, calibration[:1]),
        "ResNet-20 in int8": quantized("resnet20", calibration, 8),
        "ResNet-20 W4A8": small,
    }
    sure = np.asarray(experts.max_probability(answers(tmp_path / "small.c", small, images)))
    threshold = float(np.quantile(sure[:CHOSEN], DEAR))
    stages = small, quantized("resnet56", calibration, 4)
    programs["cascade of it and ResNet-56 W4A8"] = p.Cascade(stages, (threshold,), SHARE)
    goes_on = sure[CHOSEN:] < threshold
    images, labels = images[CHOSEN:], labels[CHOSEN:]
    accuracy, mean = {}, {}
    for name, program in programs.items():
        path = tmp_path / "model.c"
        got = answers(path, program, images)
        accuracy[name] = float((got.argmax(1) == labels).mean())
        # One image that the first stage answers, and one that goes on.
        pair = [int(goes_on.argmin()), int(goes_on.argmax())]
        ran = deploy.emulate(path, images[pair])
        np.testing.assert_allclose(ran.outputs[0], got[pair], rtol=0, atol=1e-4)
        if "floats" not in name:
            assert ran.outputs[0].tobytes() == got[pair].tobytes()
        counts = np.array(ran.instructions) / 1e6
        part = goes_on.mean() if "cascade" in name else 0
        mean[name] = (1 - part) * counts[0] + part * counts[1]
        print(
            f"\n| {name} | {ran.flash / 1e3:.1f} kB | {ran.ram / 1e3:.1f} kB | {mean[name]:.0f} M |"
            f" {counts.max():.0f} M | {100 * accuracy[name]:.1f} % |",
            end="",
        )
        assert ran.stack < 2048
    floats, int8, low, both = accuracy.values()
    assert int8 >= floats - 0.01
    assert low >= floats - 0.03
    assert both >= max(floats, low) + 0.005
    assert mean["ResNet-20 in int8"] < mean["ResNet-20 in floats"] / 3
