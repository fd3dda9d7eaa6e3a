"""Law 8: what is deployed, for every target: its integers, its answers, and what it says of itself.

That every operation agrees with ONNX Runtime within one unit in the last place given equal inputs,
and that the C file is the integer reference to the bit, is in the tests of these targets.
"""

import errno
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from built import Build, Q
from operation_cases import CLASSES

from hybrid_jax import deploy
from hybrid_jax import program as p
from hybrid_jax.core.functions import FUNCTIONS
from hybrid_jax.deploy import (
    artifact,
    c_statements,
    litert,
    litert_functions,
    litert_operations,
    onnx_functions,
    onnx_operations,
)

EXTRAS = {"openvino": "openvino"}


def installed(target):
    if target in EXTRAS:
        pytest.importorskip(EXTRAS[target])
    return deploy.TARGETS[target]


@pytest.fixture
def write(tmp_path):
    """write(target, program) -> the path of the file."""

    def written(target, program, name="model"):
        path = tmp_path / f"{name}{installed(target).suffix}"
        deploy.export_to(target, path, program)
        return path

    return written


@pytest.mark.parametrize("target", deploy.TARGETS)
def test_the_answers_of_fake_quantization_on_real_images(target, write, lowered):
    path = write(target, lowered.integers)
    dense = lowered.integers if target == "c" else lowered.floats
    checked = deploy.check(
        target,
        path,
        write(target, dense, "dense"),
        lowered.images,
        lowered.expected,
        batches=(1, 32),
        pairs=2,
    )
    assert checked.count == len(lowered.images)
    assert checked.agreement >= 0.999
    assert np.abs(checked.outputs - lowered.expected).max() == np.float32(checked.max_difference)
    assert set(checked.latencies) == {1, 32}
    if target in ("packed", "tflite"):  # elsewhere the graph outweighs 3 kB of weights
        assert checked.bytes <= checked.dense_bytes


@pytest.mark.parametrize("target", deploy.TARGETS)
def test_a_file_says_what_it_takes_is_the_same_each_time_and_whole(target, write, lowered):
    path, again = (write(target, lowered.integers, name) for name in ("model", "again"))
    assert path.read_bytes() == again.read_bytes()
    _, manifest = artifact.read(path)
    batch = {"stablehlo": "b", "tflite": "b", "onnx": "N", "openvino": "N", "c": 1}.get(target)
    if batch:
        assert manifest["inputs"] == [{"shape": [batch, 8, 8, 1], "dtype": "float32"}]
        assert manifest["outputs"] == [{"shape": [batch, 10], "dtype": "float32"}]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="it was changed or damaged"):
        installed(target).session(path, batch=1, threads=1)


@pytest.mark.parametrize("module", [c_statements, onnx_operations, litert_operations])
def test_every_operation_has_a_rule(module):
    assert set(module.RULES) == CLASSES


def test_every_step_is_written():
    assert set(litert_functions.STEPS) == set(FUNCTIONS) == {*onnx_functions._STEPS, "atan2"}


@pytest.mark.parametrize("target", deploy.TARGETS)
def test_a_full_disk_leaves_the_old_file(target, write, lowered, monkeypatch):
    path = write(target, lowered.integers)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        deploy.export_to(target, path, lowered.integers)
    assert path.read_bytes() == before
    assert sorted(p.name for p in pathlib.Path(path).parent.iterdir()) == [
        path.name,
        f"{path.name}.json",
    ]


@pytest.mark.parametrize(
    ("values", "bits", "message"),
    [
        ([[16], [-7]], 4, r"values must be multiples of 8 in \[−56, 56\] with bits 4, got -7"),
        ([[-64], [8]], 4, r"values must be multiples of 8 in \[−56, 56\] with bits 4, got -64"),
        ([[64], [63]], 7, r"values must be multiples of 1 in \[−63, 63\] with bits 7, got 64"),
        ([[32], [0]], 1, "values must be −32 and 32 with bits 1, got 0"),
        ([[64], [0]], 32, r"bits must be an integer in \[1, 8\], got 32"),
    ],
)
def test_a_kernel_whose_integers_are_not_of_its_bits_is_refused(values, bits, message):
    ones = np.ones(1, np.float32)
    with pytest.raises(ValueError, match=message):
        p.Weights(np.int8(values), ones, ones, bits)


KERNEL_BITS = {"stablehlo": [8], "onnx": [4, 8], "tflite": [8], "packed": [4, 8], "c": [4, 8]}


@pytest.mark.parametrize("target", KERNEL_BITS)
def test_the_manifest_says_in_how_many_bits_a_file_holds_kernels(target, tmp_path):
    path = tmp_path / "model"
    b = Build((4, 4, 16)).conv(16).conv(16, bits=4)
    program = b.add(p.Mean, (16,), Q).program()
    assert deploy.export_to(target, path, program)["kernel_bits"] == KERNEL_BITS[target]
    if target == "onnx":
        onnx = pytest.importorskip("onnx")
        kernels = [k.data_type for k in onnx.load(path).graph.initializer if len(k.dims) == 4]
        assert kernels == [onnx.TensorProto.UINT8, onnx.TensorProto.INT4]
    if target == "tflite":
        details = litert.interpret(path).get_tensor_details()
        kernels = [d["dtype"] for d in details if tuple(d["shape"]) == (16, 3, 3, 16)]
        assert kernels == [np.int8] * 2
    if target == "stablehlo":
        text = jax.export.deserialize(bytearray(path.read_bytes())).mlir_module()
        assert len(re.findall(r"constant dense<.*tensor<3x3x16x16xi8>", text)) == 2
    if target == "c":
        assert re.findall(r"int8_t weights_\d+\[(\d+)\]", path.read_text()) == ["2304", "1152"]


def test_the_manifest_of_floats_says_32_bits(tmp_path, lowered):
    for target in ("stablehlo", "onnx", "tflite", "packed"):
        manifest = deploy.export_to(target, tmp_path / "model", lowered.floats)
        assert manifest["kernel_bits"] == [32], target


@pytest.mark.parametrize("target", deploy.TARGETS)
def test_what_is_no_operation_is_refused_with_a_reason(target, write):
    program = p.lower(lambda w, x: jnp.sort(x @ w, -1), jnp.eye(3), jnp.ones((1, 3)))
    if target == "stablehlo":
        run = installed(target).session(write(target, program), batch=1, threads=1)
        np.testing.assert_array_equal(run(np.float32([[3, 1, 2]])), [[1, 2, 3]])
        return
    wanted = r"got .*= sort.*: 'sort' is no operation of an inference .*; write it otherwise"
    if target == "packed":
        wanted = "packed program must be of numbers, names and arrays"
    with pytest.raises(ValueError, match=wanted):
        write(target, program)


def test_bad_targets_and_batches(tmp_path, lowered):
    with pytest.raises(ValueError, match="target must be one of"):
        deploy.export_to("onx", tmp_path / "x", lowered.integers)
    path = tmp_path / "x.safetensors"
    deploy.save_program(path, lowered.integers)
    x, y = lowered.images[:4], lowered.expected[:4]
    with pytest.raises(ValueError, match="batches"):
        deploy.check("packed", path, path, x, y, batches=(8,))
    with pytest.raises(ValueError, match="expected must have shape"):
        deploy.check("packed", path, path, x, y[:2], batches=(1,), pairs=1)
