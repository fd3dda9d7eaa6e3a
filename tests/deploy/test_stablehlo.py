import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from built import Build, Q

from hybrid_jax import deploy, experts
from hybrid_jax import program as p


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8)(x))
        return nn.Dense(5)(x.mean((1, 2)))


NET = Net()
GATE = experts.gate_cnn(3, features=())


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(0), (7, 8, 8, 3))


@pytest.fixture(scope="module")
def parameters(images):
    init = jax.jit(NET.init)
    return [init(jax.random.key(e), images) for e in range(3)]


@pytest.fixture(scope="module")
def gate_params(images):
    return jax.jit(GATE.init)(jax.random.key(9), images)


RUN = """
import sys
import jax
import numpy as np
from jax import export
path, images, logits, size = sys.argv[1:]
with open(path, "rb") as file:
    call = jax.jit(export.deserialize(bytearray(file.read())).call)
x, size = np.load(images), int(size)
np.save(logits, np.concatenate([call(x[i : i + size]) for i in range(0, len(x), size)]))
assert "hybrid_jax" not in sys.modules
"""


def run_elsewhere(path, images, size):
    """What a file gives in a new process, which has jax and NumPy only."""
    given, got = path.with_suffix(".in.npy"), path.with_suffix(".out.npy")
    np.save(given, images)
    # -P keeps the current folder, and with it this package's sources, off the path.
    command = [sys.executable, "-P", "-c", RUN, *map(str, (path, given, got, size))]
    subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True)
    return np.load(got)


def test_round_trip_at_any_batch(tmp_path, parameters, images):
    path = tmp_path / "net.stablehlo"
    manifest = deploy.export(path, NET.apply, parameters[0], images)
    assert manifest["jax"] == jax.__version__
    assert manifest["platforms"] == ["cpu", "cuda", "tpu"]
    loaded, apply = deploy.load(path), jax.jit(NET.apply)
    for count in (1, 3, 7):
        want = apply(parameters[0], images[:count])
        np.testing.assert_allclose(loaded(images[:count]), want, atol=1e-6)


def test_a_file_that_is_opened_again_is_not_compiled_again(tmp_path, parameters, images):
    path = tmp_path / "f"
    deploy.export(path, NET.apply, parameters[0], images)
    first = deploy.load(path)
    assert deploy.load(path) is first
    deploy.export(path, NET.apply, parameters[1], images)
    assert deploy.load(path) is not first  # another file of the same name


def test_mixture_at_any_batch_and_one_by_one(tmp_path, parameters, gate_params, images):
    edge = experts.one_of([NET.apply] * 3, GATE.apply)
    want = jax.jit(edge)(parameters, gate_params, images)
    assert len(np.unique(jax.jit(GATE.apply)(gate_params, images).argmax(-1))) > 1
    for path, x, is_open in [("batch", images, True), ("single", images[:1], False)]:
        fn, params = lambda p, x: edge(*p, x), (parameters, gate_params)
        deploy.export(tmp_path / path, fn, params, x, symbolic_batch=is_open)
        got = run_elsewhere(tmp_path / path, images, size=4 if is_open else 1)
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_mixture_switches_between_experts(tmp_path, parameters, gate_params, images):
    # For one platform the only `case` in the text is the choice of the expert; nothing outside of
    # it, the loop over images included, may hold a convolution, since the gate has none.
    edge = experts.one_of([NET.apply] * 3, GATE.apply)
    fn, params = lambda p, x: edge(*p, x), (parameters, gate_params)
    deploy.export(tmp_path / "f", fn, params, images, platforms=["cpu"])
    text = jax.export.deserialize(bytearray((tmp_path / "f").read_bytes())).mlir_module()
    assert text.count("stablehlo.while") == 1
    assert text.count('"stablehlo.case"') == 1
    before, after = text.split('"stablehlo.case"')
    branches, after = after.split("}) : (tensor<i32>)", 1)
    assert "stablehlo.convolution" not in before
    assert branches.count("}, {") == 2  # three branches
    assert branches.count("stablehlo.convolution") == text.count("stablehlo.convolution") == 6


@pytest.mark.parametrize("leaf", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_integers_stay_integers(tmp_path, leaf):
    # 64 * 64 weights: 4 kB as int8, 16 kB if folded to float32.
    weights = {"w": leaf(np.arange(4096).reshape(64, 64) % 255 - 127).astype(np.int8)}

    def fn(params, x):
        return x @ (params["w"].astype(jnp.float32) * 0.1)

    manifest = deploy.export(tmp_path / "f", fn, weights, jnp.ones((1, 64)))
    assert manifest["bytes"] < 4096 + 6000
    text = jax.export.deserialize(bytearray((tmp_path / "f").read_bytes())).mlir_module()
    assert "tensor<64x64xi8>" in text


def integer_program(seed, channels=8, outputs=4):
    """A convolution of 8 × 8 × 3 and a dense layer of 64 · channels · outputs weights."""
    b, size = Build((8, 8, 3), seed=seed).conv(channels), 64 * channels
    return b.add(p.Reshape, (size,), Q, (size,)).dense(outputs).program()


STEM = integer_program(0).operations[1].name


@pytest.mark.parametrize("form", ["conv", "matmul"])
def test_a_program_takes_a_byte_for_each_weight(tmp_path, images, form):
    # 216 + 64 · 8 · 256 weights: 131 kB in int8, 525 kB as float32; the rest is some 10 kB.
    program = integer_program(0, outputs=256)
    count = sum(op.weights.values.size for op in program.weighted)
    assert count == 216 + 64 * 8 * 256
    manifest = deploy.export_program(tmp_path / "f", program, forms={STEM: form})
    assert count < manifest["bytes"] < 1.1 * count
    assert manifest["inputs"] == [{"shape": ["b", 8, 8, 3], "dtype": "float32"}]
    assert manifest["outputs"] == [{"shape": ["b", 256], "dtype": "float32"}]
    text = jax.export.deserialize(bytearray((tmp_path / "f").read_bytes())).mlir_module()
    assert ("stablehlo.convolution" in text) == (form == "conv")
    want = jax.jit(p.run(program))(images)
    # The integers are the same in the new process, in either form.
    np.testing.assert_array_equal(run_elsewhere(tmp_path / "f", images, size=3), want)


def test_a_mixture_of_programs(tmp_path, images):
    mixture = p.Mixture(integer_program(1, 4, 2), (integer_program(2), integer_program(3, 4)))
    want = jax.jit(p.run(mixture))(images)
    forms = [{STEM: "matmul"}, {STEM: "conv"}, {}]
    deploy.export_program(tmp_path / "f", mixture, forms=forms, platforms=["cpu"])
    np.testing.assert_array_equal(run_elsewhere(tmp_path / "f", images, size=4), want)
    text = jax.export.deserialize(bytearray((tmp_path / "f").read_bytes())).mlir_module()
    assert text.count('"stablehlo.case"') == 1
    assert text.count("stablehlo.convolution") == 2


def test_a_simulated_program(tmp_path, images):
    program = integer_program(4)
    manifest = deploy.export_program(
        tmp_path / "f", program, simulated=True, symbolic_batch=False, platforms=["cpu"]
    )
    assert manifest["inputs"] == [{"shape": [1, 8, 8, 3], "dtype": "float32"}]
    want = jax.jit(p.simulate(program))(images)
    np.testing.assert_allclose(run_elsewhere(tmp_path / "f", images, size=1), want, atol=1e-4)
    text = jax.export.deserialize(bytearray((tmp_path / "f").read_bytes())).mlir_module()
    # Kernels are stored as integers all the same; nothing is summed in int32.
    assert "tensor<512x4xi8>" in text
    assert "tensor<1x4xi32>" not in text


def test_several_inputs_share_the_batch(tmp_path):
    shapes = [jax.ShapeDtypeStruct((4, 2), jnp.float32)] * 2
    deploy.export(tmp_path / "f", lambda w, x, y: w * x + y, jnp.float32(2), *shapes)
    got = deploy.load(tmp_path / "f")(jnp.ones((3, 2)), jnp.ones((3, 2)))
    np.testing.assert_array_equal(got, np.full((3, 2), 3))


def test_export_bad_arguments(tmp_path):
    x = jnp.ones((1, 3, 3))

    def fn(params, x):
        return x * params

    with pytest.raises(ValueError, match=r"platforms must be one of .*, got 'gpu'"):
        deploy.export(tmp_path / "f", fn, 1.0, x, platforms=["gpu"])
    with pytest.raises(ValueError, match=r"platforms must hold at least one of .*, got none"):
        deploy.export(tmp_path / "f", fn, 1.0, x, platforms=[])
    with pytest.raises(ValueError, match=r"inputs\[0\] must have a leading batch axis"):
        deploy.export(tmp_path / "f", fn, 1.0, jnp.float32(3))
    assert not list(tmp_path.iterdir())


def test_a_backends_own_code_is_refused_and_the_old_file_stays(tmp_path):
    x = jnp.ones((1, 3, 3))
    deploy.export(tmp_path / "f", lambda w, x: x * w, jnp.float32(1), x)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match="fn must lower to plain StableHLO for cpu, got custom calls: "
    ):
        deploy.export(
            tmp_path / "f",
            lambda w, x: jnp.linalg.qr(x * w)[0],
            jnp.float32(1),
            x,
            platforms=["cpu"],
        )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_load_refuses(tmp_path):
    path, manifest = tmp_path / "f", tmp_path / "f.json"
    deploy.export(path, lambda w, x: x * w, jnp.float32(1), jnp.ones((1, 2)))
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**facts, "jax": "99.1.0"}))
    with pytest.raises(ValueError, match=r"f must be made by jax .* or older, got 99\.1\.0"):
        deploy.load(path)
    manifest.write_text(json.dumps({**facts, "kind": "onnx"}))
    with pytest.raises(ValueError, match="f must be of kind 'stablehlo', got 'onnx'"):
        deploy.load(path)
