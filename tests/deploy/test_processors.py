"""A file answers alike on every processor: here, and on an emulated x86 without VNNI."""

import shutil
import subprocess
import sys

import jax
import numpy as np
import public
import pytest
from lowered import deployed

from hybrid_jax import deploy
from hybrid_jax import program as p

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

HASWELL = ("qemu-x86_64", "-cpu", "Haswell,-pcid,-x2apic,-tsc-deadline,-hle,-invpcid,-rtm")

# As users open a file: no option is set. Nothing else is imported, as emulation is slow.
SESSION = {
    "onnx": """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
run = lambda x: session.run(None, {session.get_inputs()[0].name: x})[0]
""",
    "openvino": """
import sys, numpy, openvino
compiled = openvino.Core().compile_model(sys.argv[1], "CPU")
run = lambda x: compiled(x)[0]
""",
}
ANSWER = """
images = numpy.load(sys.argv[2])
numpy.save(sys.argv[3], numpy.concatenate([run(x[None]) for x in images]))
"""


@pytest.fixture(scope="module")
def trained():
    fn, params = public.network("resnet20", "resnet20_cifar10")
    calibration, _ = public.cifar10("train", 256)
    return lambda bits: deployed(fn, params, calibration, weight_bits=bits).integers


def answers(processor, runtime, file, images, folder):
    np.save(folder / "x.npy", images)
    script = SESSION[runtime] + ANSWER
    paths = file, folder / "x.npy", folder / "y.npy"
    command = [*processor, sys.executable, "-c", script, *map(str, paths)]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    return np.load(folder / "y.npy")


@pytest.mark.parametrize(
    ("runtime", "bits", "count"),
    [
        ("onnx", 8, 60),
        *(pytest.param("onnx", bits, 300, marks=pytest.mark.slow) for bits in (8, 7, 4)),
        pytest.param("openvino", 7, 100, marks=pytest.mark.slow),
    ],
)
def test_a_file_answers_alike_without_vnni(runtime, bits, count, trained, tmp_path):
    if shutil.which(HASWELL[0]) is None:
        pytest.skip(f"{HASWELL[0]} is not installed (Debian: qemu-user)")
    pytest.importorskip("onnxruntime" if runtime == "onnx" else "openvino")
    program, (images, _) = trained(bits), public.cifar10("test", count)
    deploy.export_to("onnx", tmp_path / "model.onnx", program)
    expected = np.asarray(jax.jit(p.run(program))(images)).argmax(1)
    here, there = (
        answers(processor, runtime, tmp_path / "model.onnx", images, tmp_path).argmax(1)
        for processor in ((), HASWELL)
    )
    assert (here != there).sum() <= 1
    # Where signed kernels of 8 bits saturate, 8 % of the answers are others.
    for got in (here, there):
        assert (got != expected).sum() <= max(1, 0.01 * count) * (2 if runtime == "openvino" else 1)
