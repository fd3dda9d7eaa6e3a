"""Law 8: what is deployed, for every target: its integers, its answers, and what it says of itself.

That every operation agrees with ONNX Runtime within one unit in the last place given equal inputs,
and that the C file is the integer reference to the bit, is in the tests of these targets.
"""

import dataclasses
import errno
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowered import in_integers

from hybrid_jax import core, deploy, models, quantization
from hybrid_jax import program as graph
from hybrid_jax import program as p
from hybrid_jax.deploy import litert

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
    assert set(checked.latencies) == {1, 32}
    if target in ("packed", "tflite"):  # elsewhere the graph outweighs 3 kB of weights
        assert not checked.larger


@pytest.mark.parametrize("target", deploy.TARGETS)
def test_a_mixture_answers_as_the_expert_that_its_gate_chooses(target, write, lowered):
    def first_pixels(params, x):
        return x.reshape(x.shape[0], -1) @ params

    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.standard_normal((64, 2)), jnp.float32)
    x = jnp.asarray(lowered.images)
    spec = quantization.spec(core.trace(first_pixels, params, x[:1]))
    ranges = quantization.calibrate(first_pixels, params, [(x,)], spec)
    gate = in_integers(first_pixels, params, spec, ranges, x)
    # Two experts that answer differently: the second is the first with its classes reversed.
    head = next(op for op in lowered.integers.operations if op.output == lowered.integers.output)
    other = _with_reversed_classes(lowered.integers, head)
    mixture = p.Mixture(gate, (lowered.integers, other))
    images = lowered.images[:64]
    chosen = np.asarray(p.run(gate)(images)).argmax(-1)
    assert 0 < chosen.mean() < 1
    each = np.stack([np.asarray(p.run(own)(images)) for own in (lowered.integers, other)])
    expected = each[chosen, np.arange(64)]
    session = installed(target).session(write(target, mixture), batch=1, threads=1)
    got = np.concatenate([session(images[i : i + 1]) for i in range(64)])
    assert (got.argmax(-1) == expected.argmax(-1)).all()
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def _with_reversed_classes(program, head):
    w = head.weights
    turned = dataclasses.replace(
        w,
        values=np.ascontiguousarray(w.values[..., ::-1]),
        scale=w.scale[::-1].copy(),
        bias=w.bias[::-1].copy(),
    )
    operations = tuple(
        dataclasses.replace(op, weights=turned) if op is head else op for op in program.operations
    )
    return dataclasses.replace(program, operations=operations)


@pytest.mark.parametrize("name", models.names())
def test_integers_of_every_model_against_onnx_runtime(small_model, write, name, digits):
    """On real images: digits, as large and as many-coloured as the model wants."""
    model = small_model(name)
    side, count = model.images.shape[1], 64
    images = jax.image.resize(digits.images[:count], (count, side, side, 1), "bilinear")
    images = jnp.broadcast_to(images, (count, side, side, 3)) - 0.3
    spec = quantization.spec(core.trace(model.fn, model.params, images[:1]))
    ranges = quantization.calibrate(model.fn, model.params, [(images,)], spec)
    program = in_integers(model.fn, model.params, spec, ranges, images)
    ours = np.asarray(jax.jit(p.run(program))(images))
    session = deploy.TARGETS["onnx"].session(write("onnx", program), batch=count, threads=1)
    theirs = session(np.asarray(images))
    # Sums may round to the other side of a tie; what is behind them passes on one step.
    assert np.abs(ours - theirs).max() <= 0.05 * np.abs(ours).max()
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() >= 0.98


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


def chain(*bits, channels=16, seed=0):
    """A float image to integers, a 3×3 convolution of each of these bits, a mean to floats."""
    rng = np.random.default_rng(seed)
    tensors = {"x": p.Tensor((4, 4, channels))}
    steps, last = [graph.Convert(("x",), "0")], "0"
    for i, width in enumerate(bits):
        tensors[last] = p.Tensor((4, 4, channels), p.Encoding(0.1, 128))
        most, step = 2 ** (width - 1) - 1, {8: 1, 4: 8}[width]
        values = (rng.integers(-most, most + 1, (3, 3, channels, channels)) * step).astype(np.int8)
        scale, bias = rng.uniform(0.001, 0.002, (2, channels)).astype(np.float32)
        weights = p.Weights(values, scale, bias, width)
        steps.append(
            graph.Conv((last,), str(i + 1), f"conv {i}", weights, padding=((1, 1), (1, 1)))
        )
        last = str(i + 1)
    tensors[last] = p.Tensor((4, 4, channels), p.Encoding(0.1, 128))
    tensors |= {"mean": p.Tensor((channels,), p.Encoding(0.1, 128))}
    tensors |= {"y": p.Tensor((channels,))}
    steps += [graph.Mean((last,), "mean"), graph.Convert(("mean",), "y")]
    return p.Program("x", "y", tensors, tuple(steps))


KERNEL_BITS = {"stablehlo": [8], "onnx": [4, 8], "tflite": [8], "packed": [4, 8], "c": [4, 8]}


@pytest.mark.parametrize("target", KERNEL_BITS)
def test_the_manifest_says_in_how_many_bits_a_file_holds_kernels(target, tmp_path):
    path = tmp_path / "model"
    assert deploy.export_to(target, path, chain(8, 4))["kernel_bits"] == KERNEL_BITS[target]
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
