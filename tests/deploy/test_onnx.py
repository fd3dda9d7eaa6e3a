import collections
import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from built import Build
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered import deployed
from operation_cases import (
    CASES,
    EVERY,
    FORMS,
    ONES,
    PAIR,
    RELU,
    RELU6,
    STEPS,
    A,
    B,
    alone,
    cast,
    expression,
    inputs,
    together,
    weights,
)

from hybrid_jax import deploy, models
from hybrid_jax import program as p
from hybrid_jax.deploy import artifact, onnx_sessions, onnx_writer
from hybrid_jax.program import UNBOUNDED, operations

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

IMAGE, NONE = (6, 6, 16), ((0, 0), (0, 0))
OUT = p.Encoding(0.0297, 120)
FOUR_BITS = p.Encoding(0.293, 0, 0, 15)
# Whose largest value of no value at all ONNX has not.
REFUSED = ["max pool in wide padding"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """OpenVINO's package tells its makers of its use where CI is not 'true'."""
    monkeypatch.setenv("CI", "true")


@pytest.fixture(params=["onnx", "openvino"])
def session(request):
    if request.param == "openvino":
        pytest.importorskip("openvino")
        # What is compared is an operation, not the bfloat16 that it computes some floats in.
        return functools.partial(onnx_sessions.openvino_session, precision="f32")
    return onnx_sessions.onnx_session


def contents(program, **options):
    return deploy.to_onnx(program, **options).SerializeToString()


def allowed(session):
    """Steps by which sums of products may differ: OpenVINO multiplies by its scales one by one."""
    return 0 if session is onnx_sessions.onnx_session else 1


def steps_apart(session, program, xs):
    """By how many steps of its encoding the last result differs from the reference's."""
    got, want = session(contents(program))(*xs), np.asarray(jax.jit(p.run(program))(*xs))
    (last,) = program.operations[-1].inputs
    return np.abs(np.rint((got - want) / program.encoding(last).scale)).astype(int)


def walked(form):
    """All cases as one program, but for those of six axes, which OpenVINO confuses in it."""
    six = [name for name in CASES if name.endswith("six")]
    yield together(form, [*REFUSED, *six])
    yield from (([name], alone(name, form)) for name in six if (name, form) in EVERY)


@pytest.mark.parametrize("form", FORMS)
def test_operations_agree_at_any_batch(session, form):
    for names, program in walked(form):
        xs, run = [x for name in names for x in inputs(name)], session(contents(program))
        want = [np.asarray(y) for y in jax.tree.leaves(jax.jit(p.run(program))(*xs))]
        for batch in (1, 3, 4):
            found = jax.tree.leaves(run(*(x[:batch] for x in xs)))
            for name, got, ours in zip(names, found, want, strict=True):
                check_operation(session, name, form, got, ours[:batch])


def check_operation(session, name, form, got, want):
    assert got.shape == want.shape, name
    difference = np.abs(got - want)
    if form == "integers":
        steps = np.rint(difference / alone(name, form).encoding("last").scale)
        assert steps.max() <= max(CASES[name].most, allowed(session)), name
        # What lies next to a tie is rounded by chance.
        assert steps.mean() < (0.03 if name == "add" else 0.001), name
    else:
        assert difference.max() <= 1e-5 * np.abs(want).max(), name


@pytest.mark.parametrize("given_", [B, A, p.Encoding(0.0247, 128, 1, 255), FOUR_BITS])
@pytest.mark.parametrize("made", [p.Encoding(0.0297), OUT, FOUR_BITS])
def test_operations_agree_in_any_encoding(session, given_, made):
    names = "conv", "dense", "matmul", "maximum", "clip", "add", "multiply", "mean", "convert"
    for name in names:
        program = recoded(name, given_, made)
        differences = steps_apart(session, program, inputs(name))
        assert differences.max() <= 1, name
        # What lies next to a tie is rounded by chance, where few inputs make an output.
        by_chance = name in ("add", "multiply", "mean", "convert")
        assert differences.mean() < (0.02 if by_chance else 0.001), name


def recoded(name, given_, made):
    """A case in integers whose first input and result are stored so, and the second in 4 bits."""
    program = alone(name, "integers")
    stored = {"a": given_, "c": FOUR_BITS, "last": made}
    tensors = {
        edge: dataclasses.replace(tensor, encoding=stored.get(edge))
        for edge, tensor in program.tensors.items()
    }
    return dataclasses.replace(program, tensors=tensors)


def between(op, taken, given_, shape, made):
    """An operation of 'a' that makes 'b', between conversions; its shapes and encodings."""
    tensors = {"x": p.Tensor(taken), "a": p.Tensor(taken, given_)}
    tensors |= {"b": p.Tensor(shape, made), "y": p.Tensor(shape)}
    return p.Program("x", "y", tensors, (p.Convert(("x",), "a"), op, p.Convert(("b",), "y")))


@settings(deadline=None, max_examples=8)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(5, 7),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 2),
    grouping=st.sampled_from([(3, 5, 1), (4, 4, 4), (8, 12, 4), (16, 16, 1)]),
    zero=st.integers(0, 255),
    bits=st.integers(2, 8),
    kernel_bits=st.sampled_from([7, 8]),
    clip=st.sampled_from([RELU, RELU6, UNBOUNDED, (-0.3, 0.4)]),
)
def test_any_convolution_agrees(
    seed, size, kernel, strides, padding, grouping, zero, bits, kernel_bits, clip
):
    taken, outputs, groups = grouping
    shape = tuple(
        (size + sum(pair) - k) // stride + 1
        for pair, k, stride in zip(padding, kernel, strides, strict=True)
    )
    made = weights(*kernel, taken // groups, outputs, bits=kernel_bits, seed=seed)
    op = p.Conv(("a",), "b", "conv", made, strides, padding, (1, 1), groups, clip)
    out = p.Encoding(0.0297 * 255 / (2**bits - 1), zero % 2**bits, 0, 2**bits - 1)
    program = between(op, (size, size, taken), p.Encoding(0.0213, zero), (*shape, outputs), out)
    xs = [np.random.default_rng(seed).normal(0, 1.5, (4, size, size, taken)).astype(np.float32)]
    assert steps_apart(onnx_sessions.onnx_session, program, xs).max() == 0


@pytest.mark.parametrize("name", STEPS)
def test_every_step_of_an_expression_is_written_or_refused(session, name):
    program = expression(*STEPS[name])
    if name == "atan2":
        with pytest.raises(ValueError, match="of steps that ONNX has, got 'atan2' in 'z'; write"):
            contents(program)
        return
    got, want = (np.asarray(run(*PAIR)[0]) for run in (session(contents(program)), p.run(program)))
    if session is not onnx_sessions.onnx_session:  # which has no NaN
        got, want = (array[np.isfinite(want)] for array in (got, want))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_integers_and_booleans_within_an_expression(session):
    # (int8(50 · x) + 100) wrapped, as uint8, chosen from by whether x > y, as a number of cases
    steps = [
        p.Step("mul", (0, 2)),
        cast("int8", 5),
        p.Step("add", (6, 3)),
        cast("uint8", 7),
        cast("int32", 8),
        p.Step("gt", (0, 1)),
        cast("int32", 10),
        p.Step("select_n", (11, 4, 9)),
        p.Step("rem", (12, 4)),
        p.Step("ne", (13, 11)),
        p.Step("select_n", (14, 12, 13)),
    ]
    program = expression(*steps, constants=[np.float32(50), np.int8(100), np.int32(7)])
    (got, _), (want, _) = session(contents(program))(*PAIR), p.run(program)(*PAIR)
    assert len(set(np.asarray(want).ravel())) > 5
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("steps", "refused"),
    [
        ([cast("uint32")], "'convert_element_type' of uint32"),
        ([p.Step("gt", (0, 1)), p.Step("mul", (3, 3))], "'mul' of bool"),
        ([cast("int32"), p.Step("not", (3,))], "'not'"),
    ],
)
def test_steps_of_dtypes_that_onnx_has_no_form_of(steps, refused):
    with pytest.raises(ValueError, match=refused):
        contents(expression(*steps))


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


def optimized(model, folder):
    """The nodes that ONNX Runtime, left to itself, runs for a model, those of branches included."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

    def nodes(graph):
        for node in graph.node:
            yield node
            for attribute in node.attribute:
                yield from nodes(attribute.g)

    return collections.Counter(
        node.op_type for node in nodes(onnx.load(options.optimized_model_filepath).graph)
    )


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


# 255 · (64 + 64) is below 2^15 and 255 · (127 + 2) above; of 4 bits the input is at most 15.
@pytest.mark.parametrize(
    ("values", "encoding", "vnni", "stored"),
    [
        ([64, 64, -64, -64], B, False, np.int8),
        ([127, 2, 0, 0], B, False, np.uint8),
        ([-127, -2, 0, 0], B, False, np.uint8),
        ([127, 0, -127, 0], B, False, np.int8),
        ([127, 127, 127, 127], FOUR_BITS, False, np.int8),
        ([127, 2, 0, 0], B, True, np.int8),
    ],
)
def test_kernels_whose_pairs_of_products_saturate_are_unsigned(values, encoding, vnni, stored):
    ones = np.ones(1, np.float32)
    kernel = p.Weights(np.int8(values)[:, None], ones, 0 * ones, 8)
    steps = p.Convert(("x",), "q"), p.Dense(("q",), "y", "dense", kernel)
    tensors = {"x": p.Tensor((4,)), "q": p.Tensor((4,), encoding), "y": p.Tensor((1,))}
    model = deploy.to_onnx(p.Program("x", "y", tensors, steps), vnni=vnni)
    arrays = [onnx.numpy_helper.to_array(constant) for constant in model.graph.initializer]
    (found,) = (array for array in arrays if array.shape == (4, 1))
    np.testing.assert_array_equal(found, np.int32(values)[:, None] + 128 * (stored == np.uint8))
    assert found.dtype == stored


@pytest.mark.parametrize(("opset", "stored"), [(20, 8), (21, 4)])
def test_kernels_of_four_bits_take_four_and_compute_as_int8(session, opset, stored, tmp_path):
    op = p.Conv(("a",), "b", "conv", weights(3, 3, 16, 9, bits=4), padding=ONES)
    program = between(op, IMAGE, B, (6, 6, 9), A)
    manifest = onnx_writer.export_onnx(tmp_path / "model.onnx", program, opset=opset)
    assert manifest["kernel_bits"] == [stored]
    model = onnx.load(tmp_path / "model.onnx")
    sizes = {len(constant.raw_data) for constant in model.graph.initializer}
    assert 3 * 3 * 16 * 9 * stored // 8 in sizes
    assert optimized(model, tmp_path)["QLinearConv"] == 1
    assert steps_apart(session, program, [on_grid(B)]).max() <= allowed(session)


def test_a_kernel_that_multiplies_floats_takes_32_bits_in_the_file(tmp_path):
    few = p.Weights(
        np.int8([[8, -56], [16, 0]]), np.ones(2, np.float32), np.zeros(2, np.float32), 4
    )
    tensors = {"x": p.Tensor((2,)), "y": p.Tensor((2,))}
    program = p.Program("x", "y", tensors, (p.Dense(("x",), "y", "dense", few),))
    manifest = onnx_writer.export_onnx(tmp_path / "model.onnx", program)
    (kernel,) = (c for c in onnx.load(tmp_path / "model.onnx").graph.initializer if len(c.dims) > 1)
    assert kernel.data_type == onnx.TensorProto.FLOAT
    assert manifest["kernel_bits"] == [32]


def on_grid(encoding):
    x = np.random.default_rng(0).normal(0, 1.5, (4, *IMAGE)).astype(np.float32)
    return np.asarray(operations.rounded(x, encoding))


def test_an_encoding_after_another_is_not_merged_with_it(session, tmp_path):
    # ONNX Runtime makes of two pairs of QuantizeLinear and DequantizeLinear one with its own scale,
    # although the bias behind is in steps of the second.
    shape = IMAGE
    for second in (p.Encoding(0.0117), p.Encoding(0.0311, 120), FOUR_BITS):
        tensors = {
            "x": p.Tensor(shape),
            "q": p.Tensor(shape, A),
            "a": p.Tensor(shape, B),
            "b": p.Tensor(shape, second),
            "c": p.Tensor(shape, OUT),
            "y": p.Tensor(shape),
        }
        steps = (
            p.Convert(("x",), "q"),
            p.Conv(("q",), "a", "a", weights(3, 3, 16, 16, bits=7), padding=ONES, clip=RELU),
            p.Convert(("a",), "b"),
            p.Conv(("b",), "c", "c", weights(3, 3, 16, 16, bits=7, seed=1), padding=ONES),
            p.Convert(("c",), "y"),
        )
        program = p.Program("x", "y", tensors, steps)
        assert steps_apart(session, program, [on_grid(A)]).max() <= allowed(session)
        counts = optimized(deploy.to_onnx(program), tmp_path)
        assert (counts["QLinearConv"], counts["Conv"]) == (2, 0)


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


def test_operations_of_an_old_opset():
    names, program = together("integers", REFUSED)
    xs = [x for name in names for x in inputs(name)]
    old, new = (
        onnx_sessions.onnx_session(contents(program, opset=opset))(*xs) for opset in (13, 21)
    )
    for name, ours, theirs in zip(names, old, new, strict=True):
        np.testing.assert_array_equal(ours, theirs, name)


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


def test_a_pool_that_onnx_has_no_form_of():
    tensors = {"x": p.Tensor(IMAGE), "y": p.Tensor(IMAGE)}
    far = p.MaxPool(("x",), "y", (2, 2), (1, 1), ((2, 0), (0, 0)))
    with pytest.raises(ValueError, match="MaxPool 'y' must have padding below its window"):
        deploy.to_onnx(p.Program("x", "y", tensors, (far,)))


def test_an_accumulator_that_may_overflow():
    huge = p.Weights(np.ones((16, 1), np.int8), np.float32([1e-9]), np.float32([100.0]), 8)
    program = between(p.Dense(("a",), "b", "dense", huge), (16,), A, (1,), None)
    with pytest.raises(ValueError, match="accumulator below 2"):
        deploy.to_onnx(program)


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
