"""Networks in an ONNX file: how they are fused, what they answer, what runtimes take."""

import collections
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from built import Build
from lowered import deployed
from onnx_files import FOUR_BITS, IMAGE, OUT, contents, on_grid, onnx, optimized, steps_apart
from operation_cases import ONES, RELU, A, B, weights

from hybrid_jax import deploy, models
from hybrid_jax import program as p
from hybrid_jax.deploy import artifact, onnx_sessions, onnx_writer

NONE = ((0, 0), (0, 0))


def network(seed=0):
    """A program with every kind of operation, all in integers but the first and the last tensor."""
    sums, wide, capped = p.Encoding(0.0419), p.Encoding(0.0117), p.Encoding(0.0171)
    b = Build(IMAGE, p.Encoding(0.0303, 128), seed).conv(16, clip=RELU, to=B, bits=7)
    stem = b.last
    b.conv(16, to=A, bits=7)
    b.add(p.Add, IMAGE, sums, RELU, inputs=(b.last, stem))
    b.pool(p.MaxPool, (2, 2), (2, 2)).conv(16, groups=16, to=p.Encoding(0.111, 0, 0, 15), bits=7)
    b.conv(32, (1, 1), padding=NONE, clip=RELU, to=wide, bits=7)
    b.pool(p.AveragePool, (2, 2), (1, 1))
    average = b.last
    b.add(p.Mean, (32,), p.Encoding(0.0083)).dense(8, p.Encoding(0.0061), RELU, 7)
    b.dense(32, p.Encoding(0.0101, 128), bits=7)
    gates = p.Encoding(1 / 255)
    b.add(p.Function, (32,), gates, (p.Step("logistic", (0,)),))
    b.add(p.Reshape, (1, 1, 32), gates, (1, 1, 32))
    b.add(p.Multiply, (2, 2, 32), wide, inputs=(average, b.last))
    b.add(p.Concatenate, (2, 2, 64), wide, 2, inputs=(b.last, average))
    b.add(p.Slice, (2, 2, 32), wide, (0, 0, 16), (2, 2, 48), (1, 1, 1))
    b.add(p.Pad, (4, 4, 32), wide, ((1, 1), (1, 1), (0, 0)))
    b.conv(16, padding=NONE, clip=(0.0, 2.0), to=capped, bits=7)
    b.add(p.Reshape, (64,), capped, (64,)).dense(32, p.Encoding(0.0121), RELU, 7)
    return b.dense(10, bits=7).program()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(7).normal(0, 1, (64, *IMAGE)).astype(np.float32)


COMPUTING = {
    "QLinearConv": 5,
    "QGemm": 4,
    "QLinearAdd": 1,
    "QLinearMul": 1,
    "QLinearAveragePool": 1,
    "QLinearGlobalAveragePool": 1,
    "QLinearSigmoid": 1,
    "QuantizeLinear": 1,  # the input
    "Concat": 1,
    "Slice": 1,
    "Pad": 1,
    "Clip": 2,  # four bits; (0, 2)
}
MOVING = {"Reshape", "Flatten", "MaxPool", "NhwcMaxPool"}


def test_every_operation_of_a_network_is_one_integer_operation(tmp_path):
    counts = optimized(deploy.to_onnx(network()), tmp_path)
    assert {kind: n for kind, n in counts.items() if kind not in MOVING} == COMPUTING


def test_openvino_computes_a_network_in_integers(images):
    openvino = pytest.importorskip("openvino")
    model = openvino.Core().read_model(contents(network()))
    compiled = openvino.compile_model(model, "CPU")
    layers = collections.defaultdict(set)
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        layers[info["layerType"].value].add(info["runtimePrecision"].value)
    for kind in ("Convolution", "FullyConnected", "Pooling", "Concatenation"):
        assert layers[kind] == {"u8"}, kind


def test_a_network_agrees_at_any_batch(session, images):
    # Logits have a deviation of 0.55; measured differences are below 0.021.
    program = network()
    run, want = session(contents(program), 2), np.asarray(jax.jit(p.run(program))(images))
    got = run(images)
    assert np.abs(got - want).max() < 0.05
    assert (got.argmax(-1) == want.argmax(-1)).all()
    for count in (1, 5):
        np.testing.assert_array_equal(run(images[:count]), got[:count])


def test_a_scale_of_a_tensor_has_no_axis():
    model = deploy.to_onnx(network())
    ranks = {constant.name: len(constant.dims) for constant in model.graph.initializer}
    scales = [ranks[node.input[1]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(scales) > 10
    assert set(scales) == {0}


def test_two_encodings_of_the_input(session):
    parts = {"a": B, "b": FOUR_BITS}
    tensors = {
        "x": p.Tensor(IMAGE),
        "y": p.Tensor((6, 6, 8)),
        "sum": p.Tensor((6, 6, 8), OUT),
    }
    tensors |= {name: p.Tensor(IMAGE, encoding) for name, encoding in parts.items()}
    tensors |= {f"{name}_made": p.Tensor((6, 6, 8), OUT) for name in parts}
    steps = [p.Convert(("x",), name) for name in parts]
    steps += [
        p.Conv((name,), f"{name}_made", name, weights(3, 3, 16, 8, bits=7), padding=ONES)
        for name in parts
    ]
    steps += [p.Add(("a_made", "b_made"), "sum"), p.Convert(("sum",), "y")]
    program = p.Program("x", "y", tensors, tuple(steps))
    assert steps_apart(session, program, [on_grid(B)]).max() <= 1


def gate(encoding):
    """Chooses by which of the first three channels has the largest mean."""
    tensors = {
        "x": p.Tensor(IMAGE),
        "q": p.Tensor(IMAGE, encoding),
        "m": p.Tensor((16,)),
        "y": p.Tensor((3,)),
    }
    floats = p.Weights(np.eye(16, 3, dtype=np.float32), None, np.zeros(3, np.float32))
    steps = (p.Convert(("x",), "q"), p.Mean(("q",), "m"), p.Dense(("m",), "y", "gate", floats))
    return p.Program("x", "y", tensors, steps)


def test_an_expert_is_fused_as_it_is_alone(tmp_path):
    mixture = p.Mixture(gate(A), tuple(network(seed) for seed in range(3)))
    counts = optimized(deploy.to_onnx(mixture), tmp_path)
    assert counts["If"] == 2  # so that one of three runs
    assert {kind: counts[kind] for kind in ("QLinearConv", "QGemm", "Conv")} == {
        "QLinearConv": 3 * COMPUTING["QLinearConv"],
        "QGemm": 3 * COMPUTING["QGemm"],
        "Conv": 0,
    }


def normal(x):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def tokens(params, image, place):
    """A block of a transformer over patches of bytes, with a token more; classes, and a mask."""
    batch = len(image)
    x = (image.astype(jnp.float32) / 255 - 0.4) / 0.2
    x = x.reshape(batch, 4, 2, 4, 6).transpose(0, 1, 3, 2, 4).reshape(batch, 16, 12) @ params["in"]
    x = jnp.concatenate([x, (place @ params["place"])[:, None]], 1) + params["places"]
    q, k, v = (
        (normal(x) @ params[name]).reshape(batch, 17, 2, 8).transpose(0, 2, 1, 3) for name in "qkv"
    )
    seen = jax.nn.softmax(q @ k.transpose(0, 1, 3, 2) / 8**0.5)
    x = x + (seen @ v).transpose(0, 2, 1, 3).reshape(batch, 17, 16) @ params["o"]
    x = x + jax.nn.gelu(normal(x) @ params["up"]) @ params["down"]
    logits = x.mean(1) @ params["out"]
    return logits, logits.max(-1) > 0, x[:, 0]


TOKENS = {"in": (12, 16), "place": (2, 16), "places": (1, 17, 16), "up": (16, 32)}
TOKENS |= {"down": (32, 16), "out": (16, 5)} | dict.fromkeys("qkvo", (16, 16))


def test_a_transformer_of_two_inputs_and_three_outputs(session, tmp_path):
    rng = np.random.default_rng(2)
    params = {n: rng.normal(0, 0.3, shape).astype(np.float32) for n, shape in TOKENS.items()}
    inputs = rng.integers(0, 256, (32, 8, 8, 3), np.uint8), rng.random((32, 2), np.float32)
    floats, integers, _ = deployed(tokens, params, *inputs)
    for program, distance in ((floats, 1e-5), (integers, 0.02)):
        run, want = session(contents(program)), jax.jit(p.run(program))(*inputs)
        for count in (1, 3, 32):
            got = run(*(x[:count] for x in inputs))
            assert [y.dtype for y in got] == [np.float32, bool, np.float32]
            for y, expected in zip(got, want, strict=True):
                difference = np.abs(np.float32(y) - np.float32(expected[:count]))
                assert difference.max() <= distance * np.abs(expected).max()
    counts = optimized(deploy.to_onnx(integers), tmp_path)
    assert (counts["QLinearMatMul"], counts["Erf"]) == (1, 0)
    manifest = onnx_writer.export_onnx(tmp_path / "tokens.onnx", integers)
    ends = [(end["shape"], end["dtype"]) for end in manifest["inputs"] + manifest["outputs"]]
    assert ends == [
        (["N", 8, 8, 3], "uint8"),
        (["N", 2], "float32"),
        (["N", 5], "float32"),
        (["N"], "bool"),
        (["N", 16], "float32"),
    ]
    data = (tmp_path / "tokens.onnx").read_bytes()
    assert not [path for path in (pathlib.Path.cwd(), tmp_path) if bytes(path) in data]
    with pytest.raises(ValueError, match="must be 2 arrays, got 1"):
        run(inputs[0])
    with pytest.raises(ValueError, match=r"must be of dtype uint8, got float32"):
        run(np.float32(inputs[0]), inputs[1])
    with pytest.raises(ValueError, match=r"must have shape \(B, 2\) with B = 1, 2"):
        run(inputs[0], inputs[1][:, :1])


def test_a_network_in_floats(session, digits):
    program = p.lower(digits.fn, digits.params, digits.images)
    got = session(contents(program))(np.asarray(digits.held_out_images))
    want = digits.fn(digits.params, digits.held_out_images)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("name", models.names())
def test_every_model_that_we_ship(small_model, real_images, name, tmp_path):
    model = small_model(name)
    x = real_images(model.images.shape[1])[:64]
    program = deployed(model.fn, model.params, x).integers
    want = np.asarray(jax.jit(p.run(program))(x))
    got = onnx_sessions.onnx_session(contents(program))(np.asarray(x))
    # Sums may round to the other side of a tie; what is behind them passes on one step.
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()
    assert (got.argmax(-1) == want.argmax(-1)).mean() >= 0.98
    counts = optimized(deploy.to_onnx(program), tmp_path)
    layers = collections.Counter(type(op) for op in program.operations)
    assert counts["QLinearConv"] == layers[p.Conv]
    assert counts["QGemm"] == layers[p.Dense]
    assert counts["QLinearAdd"] == layers[p.Add]
    floats = {"Conv", "Gemm", "FusedConv", "FusedGemm", "Add", "DequantizeLinear"}
    assert not set(counts) & {*floats, "Transpose"}
    assert counts["QuantizeLinear"] == 1


def test_opsets(images, tmp_path):
    program = network()
    newest = onnx.defs.onnx_opset_version()
    want = onnx_sessions.onnx_session(contents(program))(images)
    for opset in (13, 17, 23):
        model = deploy.to_onnx(program, opset=opset)
        assert optimized(model, tmp_path)["QLinearConv"] == COMPUTING["QLinearConv"]
        assert [entry.version for entry in model.opset_import] == [opset]
        got = onnx_sessions.onnx_session(model.SerializeToString())(images)
        np.testing.assert_array_equal(got, want)
    for opset in (12, newest + 1, 21.5):
        with pytest.raises(ValueError, match=rf"opset must be an integer in \[13, {newest}\]"):
            deploy.to_onnx(program, opset=opset)


def test_an_opset_newer_than_the_runtime():
    model = deploy.to_onnx(network())
    model.opset_import[0].version = 999
    with pytest.raises(ValueError, match=r"that ONNX Runtime [\d.]+ takes: .*pset 999"):
        onnx_sessions.onnx_session(model.SerializeToString())


def test_what_is_no_model(session):
    with pytest.raises(ValueError, match=r"file must be a model that .+ takes: "):
        session(b"no model")


def test_a_file_and_its_manifest(tmp_path, session, images):
    path = tmp_path / "net.onnx"
    manifest = onnx_writer.export_onnx(path, network())
    assert (manifest["onnx"], manifest["opset"]) == (onnx.__version__, 21)
    want = session(contents(network()))(images)
    np.testing.assert_array_equal(session(path)(images), want)
    for wrong in (images[:0], images[:, :5], images[0]):
        with pytest.raises(ValueError, match=r"x must have shape \(B, 6, 6, 16\)"):
            session(path)(wrong)
    with pytest.raises(ValueError, match="threads must be an integer"):
        session(path, 0)
    artifact.write(path, b"", {"kind": "stablehlo"})
    with pytest.raises(ValueError, match="must be of kind 'onnx'"):
        session(path)


def test_what_is_not_installed_is_named(monkeypatch):
    data = contents(network())
    for name in ("onnxruntime", "openvino", "onnx"):
        monkeypatch.setitem(sys.modules, name, None)
    for call, extra in {
        lambda: deploy.to_onnx(network()): "onnx",
        lambda: onnx_sessions.onnx_session(data): "onnx",
        lambda: onnx_sessions.openvino_session(data): "openvino",
    }.items():
        with pytest.raises(ImportError, match=rf"hybrid_jax\[{extra}\]"):
            call()
