import collections
import functools
import json
import math
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax import core, deploy, models, quantization
from hybrid_jax.deploy import artifact, onnx_sessions, onnx_writer
from hybrid_jax.deploy.program import (
    UNBOUNDED,
    Add,
    AveragePool,
    Clip,
    Concatenate,
    Conv,
    Convert,
    Dense,
    Encoding,
    Lookup,
    MaxPool,
    Mean,
    Mixture,
    Multiply,
    Operation,
    Pad,
    Program,
    Reshape,
    Slice,
    Softmax,
    Tensor,
    Transpose,
    Weights,
)

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

RELU, RELU6 = (0.0, math.inf), (0.0, 6.0)
SAME = ((1, 1), (1, 1))
IMAGE = (6, 6, 16)

POSITIVE = Encoding(0.0213)
SIGNED = Encoding(0.0311, 121)
SYMMETRIC = Encoding(0.0247, 128, 1, 255)
FOUR_BITS = Encoding(0.293, 0, 0, 15)
INPUTS = {"positive": POSITIVE, "signed": SIGNED, "symmetric": SYMMETRIC, "four": FOUR_BITS}


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


def weights(rng, *shape, bits=7):
    most = 2 ** (bits - 1) - 1
    scale = rng.uniform(1.0, 3.0, shape[-1]) / (most + 1) / np.sqrt(np.prod(shape[:-1]))
    bias = rng.normal(0, 0.2, shape[-1])
    integers = rng.integers(-most, most + 1, shape).astype(np.int8)
    return Weights(integers, scale.astype(np.float32), bias.astype(np.float32), bits)


RNG = np.random.default_rng(0)
KERNEL, MATRIX = weights(RNG, 3, 3, 16, 8), weights(RNG, 16, 8)
DEPTHWISE, GROUPED = weights(RNG, 3, 3, 1, 16), weights(RNG, 3, 3, 4, 16)


def single(make, inputs, output):
    """A program of one operation whose inputs are (the start of) x, converted to encodings."""
    tensors, steps, names = {"x": Tensor(inputs[0].shape)}, [], []
    for i, given_ in enumerate(inputs):
        name = "x"
        if given_.shape != inputs[0].shape:
            tensors[f"part_{i}"] = Tensor(given_.shape)
            ends = (0,) * len(given_.shape), given_.shape, (1,) * len(given_.shape)
            steps.append(Slice(("x",), f"part_{i}", *ends))
            name = f"part_{i}"
        if given_.encoding:
            tensors[f"in_{i}"] = given_
            steps.append(Convert((name,), f"in_{i}"))
            name = f"in_{i}"
        names.append(name)
    tensors |= {"made": output, "y": Tensor(output.shape)}
    steps += [make(tuple(names), "made"), Convert(("made",), "y")]
    return Program("x", "y", tensors, tuple(steps))


def image(encoding, shape=IMAGE):
    return Tensor(shape, encoding)


def conv(kernel=KERNEL, **options):
    return lambda inputs, output: Conv(inputs, output, "conv", kernel, **options)


def of(kind, *arguments, **options):
    return lambda inputs, output: kind(inputs, output, *arguments, **options)


def dense(inputs, output):
    return Dense(inputs, output, "dense", MATRIX, RELU)


OUT, OUT_SIGNED = Encoding(0.0297), Encoding(0.0297, 120)
POOL = (3, 3), (2, 2), SAME
SMALL, GATE = (3, 3, 16), Tensor((1, 1, 16), Encoding(1 / 255))

# What moves or compares integers, or accumulates them: the same to the last bit.
EXACT = {
    "strided": (conv(strides=(2, 2)), [image(SIGNED)], image(OUT_SIGNED, (2, 2, 8))),
    "depthwise": (conv(DEPTHWISE, padding=SAME, groups=16), [image(SIGNED)], image(OUT_SIGNED)),
    "grouped and dilated": (
        conv(GROUPED, padding=((2, 2), (2, 2)), groups=4, dilation=(2, 2), clip=(0, 2.0)),
        [image(SIGNED)],
        image(OUT),
    ),
    "relu6": (conv(clip=RELU6), [image(POSITIVE)], image(Encoding(0.05), (4, 4, 8))),
    "max pool": (of(MaxPool, *POOL), [image(SIGNED)], image(SIGNED, SMALL)),
    "pad": (of(Pad, ((1, 2), (0, 1), (3, 0))), [image(SIGNED)], image(SIGNED, (9, 7, 19))),
    "slice": (
        of(Slice, (1, 0, 2), (6, 5, 9), (2, 1, 3)),
        [image(SIGNED)],
        image(SIGNED, (3, 5, 3)),
    ),
    "transpose": (of(Transpose, (1, 2, 0)), [image(SIGNED)], image(SIGNED, (6, 16, 6))),
    "reshape": (of(Reshape), [image(SIGNED)], image(SIGNED, (4, 9, 16))),
    "flatten": (of(Reshape), [image(SIGNED)], image(SIGNED, (576,))),
    "unflatten": (of(Reshape), [image(SIGNED, (36,))], image(SIGNED, (3, 3, 4))),
    "clip": (of(Clip, -0.5, 0.5), [image(SIGNED)], image(SIGNED)),
    "one concatenation": (
        of(Concatenate, 2),
        [image(SIGNED), image(SIGNED)],
        image(SIGNED, (6, 6, 32)),
    ),
}
EXACT |= {
    f"{kind} of {name} to {out.high} {out.zero_point}": case
    for name, given_ in INPUTS.items()
    for out in (OUT, OUT_SIGNED, FOUR_BITS)
    for kind, case in {
        "conv": (conv(padding=SAME), [image(given_)], image(out, (6, 6, 8))),
        "dense": (dense, [image(given_, (16,))], image(out, (8,))),
    }.items()
}
ROUNDED = {
    "add": (of(Add, RELU), [image(SIGNED), image(POSITIVE)], image(OUT)),
    "add, signed": (of(Add), [image(SIGNED), image(SIGNED)], image(Encoding(0.0613, 121))),
    "add to four bits": (of(Add), [image(SIGNED), image(FOUR_BITS)], image(FOUR_BITS)),
    "multiply": (of(Multiply), [image(SIGNED), GATE], image(OUT_SIGNED)),
    "average pool": (of(AveragePool, *POOL), [image(SIGNED)], image(OUT_SIGNED, SMALL)),
    "mean": (of(Mean), [image(SIGNED)], image(Encoding(0.0071, 128), (16,))),
    "concatenate": (
        of(Concatenate, 0),
        [image(SIGNED), image(FOUR_BITS)],
        image(OUT_SIGNED, (12, 6, 16)),
    ),
    "convert": (of(Convert), [image(SIGNED)], image(OUT)),
    "convert to four bits": (of(Convert), [image(POSITIVE)], image(FOUR_BITS)),
    "logistic": (of(Lookup, "logistic"), [image(SIGNED)], image(Encoding(1 / 255))),
    "tanh": (of(Lookup, "tanh"), [image(SIGNED)], image(Encoding(1 / 127, 127))),
    "exp": (of(Lookup, "exp"), [image(SIGNED)], image(Encoding(0.193))),
}
FLOATS = {
    "conv": (conv(padding=SAME, clip=RELU6), [image(None)], image(None, (6, 6, 8))),
    "conv of integers": (conv(clip=RELU), [image(SIGNED)], image(None, (4, 4, 8))),
    "dense of integers": (dense, [image(SIGNED, (16,))], image(None, (8,))),
    "dense": (dense, [image(None, (16,))], image(None, (8,))),
    "add": (of(Add, (-1.0, math.inf)), [image(None), image(None)], image(None)),
    "multiply": (of(Multiply), [image(POSITIVE), GATE], image(None)),
    "max pool": (of(MaxPool, *POOL), [image(None)], image(None, SMALL)),
    "average pool": (of(AveragePool, *POOL), [image(SIGNED)], image(None, SMALL)),
    "mean": (of(Mean), [image(SIGNED)], image(None, (16,))),
    "clip": (of(Clip, -0.5, 0.5), [image(None)], image(None)),
    "pad": (of(Pad, ((1, 2), (0, 1), (3, 0))), [image(None)], image(None, (9, 7, 19))),
    "softmax": (of(Softmax), [image(None)], image(None)),
    "logistic": (of(Lookup, "logistic"), [image(None)], image(None)),
    "tanh": (of(Lookup, "tanh"), [image(None)], image(None)),
    "exp": (of(Lookup, "exp"), [image(None)], image(None)),
}


def contents(program, **options):
    return deploy.to_onnx(program, **options).SerializeToString()


def compare(session, program, seed=0, count=4):
    """What a runtime makes of random images, and what the reference does.

    The images lie on the grid of the first conversion, so that no tie is in it.
    """
    x = np.random.default_rng(seed).normal(0, 1.5, (count, *program.tensors["x"].shape))
    grids = [program.encoding(op.output) for op in program.operations if isinstance(op, Convert)]
    if grids and grids[0]:
        x = np.rint(x / grids[0].scale) * grids[0].scale
    x = x.astype(np.float32)
    return session(contents(program))(x), np.asarray(jax.jit(deploy.run(program))(x))


def units(session, program, seed=0):
    """By how many steps of its encoding the result differs."""
    got, want = compare(session, program, seed)
    (last,) = program.operations[-1].inputs
    difference = (got - want) / program.encoding(last).scale
    return np.abs(np.rint(difference)).astype(int)


def allowed(session):
    """Units by which sums of products may differ: OpenVINO multiplies by its scales one by one."""
    return 0 if session is onnx_sessions.onnx_session else 1


@pytest.mark.parametrize("name", EXACT)
def test_integer_operations_agree_to_the_last_bit(session, name):
    differences = units(session, single(*EXACT[name]))
    assert differences.max() <= allowed(session)
    assert differences.mean() < 0.001


@pytest.mark.parametrize("name", ROUNDED)
def test_operations_agree_within_one_unit(session, name):
    differences = units(session, single(*ROUNDED[name]))
    assert differences.max() <= 1
    assert differences.mean() < 0.1  # what lies next to a tie


@pytest.mark.parametrize("name", FLOATS)
def test_operations_agree_in_floats(session, name):
    got, want = compare(session, single(*FLOATS[name]))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


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
    rng, (inputs, outputs, groups) = np.random.default_rng(seed), grouping
    shape = tuple(
        (size + sum(pair) - k) // stride + 1
        for pair, k, stride in zip(padding, kernel, strides, strict=True)
    )
    made = weights(rng, *kernel, inputs // groups, outputs, bits=kernel_bits)
    make = conv(made, strides=strides, padding=padding, groups=groups, clip=clip)
    out = Encoding(0.0297 * 255 / (2**bits - 1), zero % 2**bits, 0, 2**bits - 1)
    given_ = image(Encoding(0.0213, zero), (size, size, inputs))
    program = single(make, [given_], image(out, (*shape, outputs)))
    assert units(onnx_sessions.onnx_session, program, seed).max() == 0


def network(seed=0):
    """A program with every kind of operation, all in integers but the first and the last tensor."""
    rng = np.random.default_rng(seed)

    def kernel(*shape):
        return weights(rng, *shape)

    encoded = {
        "q": (IMAGE, Encoding(0.0303, 128)),
        "stem": (IMAGE, POSITIVE),
        "conv": (IMAGE, SIGNED),
        "sum": (IMAGE, Encoding(0.0419)),
        "pooled": (SMALL, Encoding(0.0419)),
        "depthwise": (SMALL, Encoding(0.111, 0, 0, 15)),
        "pointwise": ((3, 3, 32), Encoding(0.0117)),
        "average": ((2, 2, 32), Encoding(0.0117)),
        "means": ((32,), Encoding(0.0083)),
        "squeezed": ((8,), Encoding(0.0061)),
        "excited": ((32,), Encoding(0.0101, 128)),
        "gates": ((32,), Encoding(1 / 255)),
        "gate": ((1, 1, 32), Encoding(1 / 255)),
        "gated": ((2, 2, 32), Encoding(0.0117)),
        "both": ((2, 2, 64), Encoding(0.0117)),
        "some": ((2, 2, 32), Encoding(0.0117)),
        "padded": ((4, 4, 32), Encoding(0.0117)),
        "capped": ((2, 2, 16), Encoding(0.0171)),
        "flat": ((64,), Encoding(0.0171)),
        "hidden": ((32,), Encoding(0.0121)),
    }
    tensors = {name: Tensor(*how) for name, how in encoded.items()}
    tensors |= {"x": Tensor(IMAGE), "y": Tensor((10,))}
    steps = (
        Convert(("x",), "q"),
        Conv(("q",), "stem", "stem", kernel(3, 3, 16, 16), padding=SAME, clip=RELU),
        Conv(("stem",), "conv", "conv", kernel(3, 3, 16, 16), padding=SAME),
        Add(("conv", "stem"), "sum", RELU),
        MaxPool(("sum",), "pooled", (2, 2), (2, 2)),
        Conv(("pooled",), "depthwise", "depthwise", kernel(3, 3, 1, 16), padding=SAME, groups=16),
        Conv(("depthwise",), "pointwise", "pointwise", kernel(1, 1, 16, 32), clip=RELU),
        AveragePool(("pointwise",), "average", (2, 2), (1, 1)),
        Mean(("average",), "means"),
        Dense(("means",), "squeezed", "squeezed", kernel(32, 8), RELU),
        Dense(("squeezed",), "excited", "excited", kernel(8, 32)),
        Lookup(("excited",), "gates", "logistic"),
        Reshape(("gates",), "gate"),
        Multiply(("average", "gate"), "gated"),
        Concatenate(("gated", "average"), "both", 2),
        Slice(("both",), "some", (0, 0, 16), (2, 2, 48), (1, 1, 1)),
        Pad(("some",), "padded", ((1, 1), (1, 1), (0, 0))),
        Conv(("padded",), "capped", "capped", kernel(3, 3, 32, 16), clip=(0.0, 2.0)),
        Reshape(("capped",), "flat"),
        Dense(("flat",), "hidden", "hidden", kernel(64, 32), RELU),
        Dense(("hidden",), "y", "y", kernel(32, 10)),
    )
    return Program("x", "y", tensors, steps)


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


def test_a_network_agrees(session, images):
    # Logits have a deviation of 0.55; measured differences are below 0.021.
    program = network()
    want = np.asarray(jax.jit(deploy.run(program))(images))
    got = session(contents(program))(images)
    assert np.abs(got - want).max() < 0.05
    assert (got.argmax(-1) == want.argmax(-1)).all()


def test_any_batch_and_threads(session, images):
    program = network()
    run = session(contents(program), 2)
    whole = run(images)
    for count in (1, 5):
        np.testing.assert_array_equal(run(images[:count]), whole[:count])


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
        ([64, 64, -64, -64], POSITIVE, False, np.int8),
        ([127, 2, 0, 0], POSITIVE, False, np.uint8),
        ([-127, -2, 0, 0], POSITIVE, False, np.uint8),
        ([127, 0, -127, 0], POSITIVE, False, np.int8),
        ([127, 127, 127, 127], FOUR_BITS, False, np.int8),
        ([127, 2, 0, 0], POSITIVE, True, np.int8),
    ],
)
def test_kernels_whose_pairs_of_products_saturate_are_unsigned(values, encoding, vnni, stored):
    ones = np.ones(1, np.float32)
    kernel = Weights(np.int8(values)[:, None], ones, 0 * ones, 8)
    steps = Convert(("x",), "q"), Dense(("q",), "y", "dense", kernel)
    tensors = {"x": Tensor((4,)), "q": Tensor((4,), encoding), "y": Tensor((1,))}
    model = deploy.to_onnx(Program("x", "y", tensors, steps), vnni=vnni)
    arrays = [onnx.numpy_helper.to_array(constant) for constant in model.graph.initializer]
    (found,) = (array for array in arrays if array.shape == (4, 1))
    np.testing.assert_array_equal(found, np.int32(values)[:, None] + 128 * (stored == np.uint8))
    assert found.dtype == stored


@pytest.mark.parametrize(("opset", "stored"), [(20, 8), (21, 4)])
def test_kernels_of_four_bits_take_four_and_compute_as_int8(session, opset, stored, tmp_path):
    rng = np.random.default_rng(4)
    kernel = weights(rng, 3, 3, 16, 9)
    few = Weights(kernel.values // 16 * 8, kernel.scale, kernel.bias, 4)
    program = single(conv(few, padding=SAME), [image(POSITIVE)], image(SIGNED, (6, 6, 9)))
    manifest = onnx_writer.export_onnx(tmp_path / "model.onnx", program, opset=opset)
    assert manifest["kernel_bits"] == [stored]
    model = onnx.load(tmp_path / "model.onnx")
    sizes = {len(constant.raw_data) for constant in model.graph.initializer}
    assert 3 * 3 * 16 * 9 * stored // 8 in sizes
    assert optimized(model, tmp_path)["QLinearConv"] == 1
    x = rng.integers(0, 256, (5, *IMAGE)).astype(np.float32) * np.float32(POSITIVE.scale)
    got, want = session(model.SerializeToString())(x), jax.jit(deploy.run(program))(x)
    assert np.abs(np.rint((got - want) / SIGNED.scale)).max() <= allowed(session)


def test_a_kernel_that_multiplies_floats_takes_32_bits_in_the_file(tmp_path):
    few = Weights(np.int8([[8, -56], [16, 0]]), np.ones(2, np.float32), np.zeros(2, np.float32), 4)
    tensors = {"x": Tensor((2,)), "y": Tensor((2,))}
    program = Program("x", "y", tensors, (Dense(("x",), "y", "dense", few),))
    manifest = onnx_writer.export_onnx(tmp_path / "model.onnx", program)
    (kernel,) = (c for c in onnx.load(tmp_path / "model.onnx").graph.initializer if len(c.dims) > 1)
    assert kernel.data_type == onnx.TensorProto.FLOAT
    assert manifest["kernel_bits"] == [32]


def test_an_encoding_after_another_is_not_merged_with_it(session, tmp_path):
    # ONNX Runtime makes of two pairs of QuantizeLinear and DequantizeLinear one with its own scale,
    # although the bias behind is in steps of the second.
    shape, rng = IMAGE, np.random.default_rng(3)
    for second in (Encoding(0.0117), Encoding(0.0311, 120), FOUR_BITS):
        tensors = {
            "x": Tensor(shape),
            "q": Tensor(shape, SIGNED),
            "a": Tensor(shape, POSITIVE),
            "b": Tensor(shape, second),
            "c": Tensor(shape, OUT_SIGNED),
            "y": Tensor(shape),
        }
        steps = (
            Convert(("x",), "q"),
            Conv(("q",), "a", "a", weights(rng, 3, 3, 16, 16), padding=SAME, clip=RELU),
            Convert(("a",), "b"),
            Conv(("b",), "c", "c", weights(rng, 3, 3, 16, 16), padding=SAME),
            Convert(("c",), "y"),
        )
        program = Program("x", "y", tensors, steps)
        assert units(session, program).max() <= allowed(session)
        counts = optimized(deploy.to_onnx(program), tmp_path)
        assert (counts["QLinearConv"], counts["Conv"]) == (2, 0)


def test_two_encodings_of_the_input(session):
    parts = {"a": POSITIVE, "b": FOUR_BITS}
    tensors = {"x": Tensor(IMAGE), "y": Tensor((6, 6, 8)), "sum": Tensor((6, 6, 8), OUT_SIGNED)}
    tensors |= {name: Tensor(IMAGE, encoding) for name, encoding in parts.items()}
    tensors |= {f"{name}_made": Tensor((6, 6, 8), OUT_SIGNED) for name in parts}
    steps = [Convert(("x",), name) for name in parts]
    steps += [Conv((name,), f"{name}_made", name, KERNEL, padding=SAME) for name in parts]
    steps += [Add(("a_made", "b_made"), "sum"), Convert(("sum",), "y")]
    assert units(session, Program("x", "y", tensors, tuple(steps))).max() <= 1


def gate(encoding):
    """Chooses by which of the first three channels has the largest mean."""
    tensors = {
        "x": Tensor(IMAGE),
        "q": Tensor(IMAGE, encoding),
        "m": Tensor((16,)),
        "y": Tensor((3,)),
    }
    floats = Weights(np.eye(16, 3, dtype=np.float32), None, np.zeros(3, np.float32))
    steps = (Convert(("x",), "q"), Mean(("q",), "m"), Dense(("m",), "y", "gate", floats))
    return Program("x", "y", tensors, steps)


def test_a_mixture_runs_the_chosen_expert(session, images):
    # The experts must see the image, not what the coarse gate makes of it.
    chooses, experts = gate(Encoding(0.5, 2, 0, 3)), [network(seed) for seed in range(3)]
    mixture = Mixture(chooses, tuple(experts))
    choices = session(contents(chooses))(images).argmax(-1)
    assert set(choices) == {0, 1, 2}
    alone = np.stack([session(contents(expert))(images) for expert in experts])
    run = session(contents(mixture))
    got = run(images)
    np.testing.assert_array_equal(got, alone[choices, np.arange(len(images))])
    for i in range(3):
        np.testing.assert_array_equal(run(images[i : i + 1]), got[i : i + 1])
    want = np.asarray(jax.jit(deploy.run(mixture))(images))
    assert (choices == np.asarray(deploy.run(chooses)(images)).argmax(-1)).all()
    assert np.abs(got - want).max() < 0.05


def test_an_expert_is_fused_as_it_is_alone(tmp_path):
    mixture = Mixture(gate(SIGNED), tuple(network(seed) for seed in range(3)))
    counts = optimized(deploy.to_onnx(mixture), tmp_path)
    assert counts["If"] == 2  # so that one of three runs
    assert {kind: counts[kind] for kind in ("QLinearConv", "QGemm", "Conv")} == {
        "QLinearConv": 3 * COMPUTING["QLinearConv"],
        "QGemm": 3 * COMPUTING["QGemm"],
        "Conv": 0,
    }


def test_equal_scores_choose_the_first_and_nan_nobody(session, images):
    tensors = {"x": Tensor(IMAGE), "m": Tensor((16,)), "y": Tensor((2,))}
    floats = Weights(np.ones((16, 2), np.float32), None, np.zeros(2, np.float32))
    steps = (Mean(("x",), "m"), Dense(("m",), "y", "gate", floats))
    experts = (network(0), network(1))
    mixture = Mixture(Program("x", "y", tensors, steps), experts)
    x = images[:3].copy()
    x[1, 2, 3, 4] = np.nan
    got = session(contents(mixture))(x)
    assert np.isnan(got[1]).all()
    first = session(contents(experts[0]))(images[:3])
    np.testing.assert_array_equal(got[::2], first[::2])


@pytest.fixture(scope="module")
def trained(digits):
    """A trained network in integers, and what the reference makes of real images."""
    graph, batch = core.trace(digits.fn, digits.params, digits.images), digits.images[:256]
    spec = quantization.spec(graph)
    ranges = quantization.calibrate(digits.fn, digits.params, [(batch,)], spec)
    program = deploy.lower(digits.fn, digits.params, spec, ranges, batch)
    return program, np.asarray(jax.jit(deploy.run(program))(digits.held_out_images))


def test_a_trained_network_keeps_its_answers(session, trained, digits):
    # Logits have a deviation of 5.7. Most differ by nothing in ONNX Runtime; in OpenVINO, which
    # leaves the residual block's convolution unrounded, by 0.05 on average.
    program, want = trained
    got = session(contents(program))(np.asarray(digits.held_out_images))
    assert np.abs(got - want).max() < (0.4 if allowed(session) else 0.1)
    assert (got.argmax(-1) == want.argmax(-1)).all()


def test_a_network_in_floats(session, digits):
    program = deploy.lower(digits.fn, digits.params, None, None, digits.images)
    got = session(contents(program))(np.asarray(digits.held_out_images))
    want = digits.fn(digits.params, digits.held_out_images)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("name", models.names())
def test_every_model_that_we_ship(small_model, name, tmp_path):
    model = small_model(name)
    spec = quantization.spec(core.trace(model.fn, model.params, model.images))
    ranges = quantization.calibrate(model.fn, model.params, [(model.images,)], spec)
    program = deploy.lower(model.fn, model.params, spec, ranges, model.images)
    want = np.asarray(jax.jit(deploy.run(program))(model.images))
    got = onnx_sessions.onnx_session(contents(program))(np.asarray(model.images))
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()
    counts = optimized(deploy.to_onnx(program), tmp_path)
    layers = collections.Counter(type(op) for op in program.operations)
    assert counts["QLinearConv"] == layers[Conv]
    assert counts["QGemm"] == layers[Dense]
    assert counts["QLinearAdd"] == layers[Add]
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


def test_operations_that_onnx_has_no_form_of():
    class Unknown(Operation):
        pass

    tensors = {"x": Tensor(IMAGE), "y": Tensor(IMAGE)}
    with pytest.raises(ValueError, match=r"written for .*MaxPool.*, got Unknown 'y'"):
        deploy.to_onnx(Program("x", "y", tensors, (Unknown(("x",), "y"),)))
    far = MaxPool(("x",), "y", (2, 2), (1, 1), ((2, 0), (0, 0)))
    with pytest.raises(ValueError, match="MaxPool 'y' must have padding below its window"):
        deploy.to_onnx(Program("x", "y", tensors, (far,)))


def test_an_accumulator_that_may_overflow():
    huge = Weights(np.ones((16, 1), np.int8), np.float32([1e-9]), np.float32([100.0]), 8)
    make = of(Dense, "dense", huge)
    with pytest.raises(ValueError, match="accumulator below 2"):
        deploy.to_onnx(single(make, [image(SIGNED, (16,))], Tensor((1,))))


def test_a_file_and_its_manifest(tmp_path, session, images):
    path = tmp_path / "net.onnx"
    manifest = onnx_writer.export_onnx(path, network())
    assert manifest == json.loads((tmp_path / "net.onnx.json").read_text())
    assert {key: manifest[key] for key in ("kind", "onnx", "opset", "inputs", "outputs")} == {
        "kind": "onnx",
        "onnx": onnx.__version__,
        "opset": 21,
        "inputs": [{"shape": ["N", *IMAGE], "dtype": "float32"}],
        "outputs": [{"shape": ["N", 10], "dtype": "float32"}],
    }
    assert onnx_writer.export_onnx(tmp_path / "again", network())["sha256"] == manifest["sha256"]
    want = session(contents(network()))(images)
    np.testing.assert_array_equal(session(path)(images), want)
    for wrong in (images[:0], images[:, :5], images[0]):
        with pytest.raises(ValueError, match=r"x must have shape \(n, 6, 6, 16\)"):
            session(path)(wrong)
    with pytest.raises(ValueError, match="threads must be an integer"):
        session(path, 0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="changed or damaged"):
        session(path)
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
