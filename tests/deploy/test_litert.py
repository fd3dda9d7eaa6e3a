import errno
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax import core, quantization
from hybrid_jax.deploy import arithmetic, artifact, litert, litert_marks, lowering, reference
from hybrid_jax.deploy.program import (
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
from hybrid_jax.quantization import integer_step

RELU, RELU6 = (0.0, np.inf), (0.0, 6.0)
IMAGE, POOLED = (8, 8, 4), (4, 4, 4)
ONES = ((1, 1), (1, 1))
# Signed values, values of a ReLU, and both in 4 bits.
A, B = Encoding(0.03107, 120), Encoding(0.02371)
A4, B4 = Encoding(0.31337, 8, 0, 15), Encoding(0.15153, 0, 0, 15)


def weights(*shape, bits=8, seed=0):
    """Integers that fill the range of `bits`, a scale for each channel, a bias."""
    rng, most = np.random.default_rng(seed), 2 ** (bits - 1) - 1
    values = rng.integers(-most, most + 1, shape).astype(np.int8)
    scale = rng.uniform(0.5, 1.5, shape[-1]) / (most * np.sqrt(np.prod(shape[:-1])))
    step, bias = integer_step(bits), rng.normal(size=shape[-1]).astype(np.float32)
    return Weights(values * np.int8(step), (scale / step).astype(np.float32), bias, bits)


def in_floats(w):
    return Weights(w.values * w.scale, None, w.bias)


def chain(*steps):
    """x -> 'a' -> … -> the output of the last step -> floats; steps are (operation, made)."""
    tensors = {"x": Tensor(IMAGE)} | {op.output: made for op, made in steps}
    last, made = steps[-1]
    out = last.output
    operations = [op for op, _ in steps]
    if made.encoding is not None:
        out = "y"
        tensors[out] = Tensor(made.shape)
        operations.append(Convert((last.output,), out))
    return Program("x", out, tensors, tuple(operations))


def quantized(name, encoding):
    return Convert(("x",), name), Tensor(IMAGE, encoding)


def images(n=6, scale=2.0):
    return (scale * np.random.default_rng(1).normal(size=(n, *IMAGE))).astype(np.float32)


def operations(data):
    """Names of the file's operations, in running order."""
    return [d["op_name"] for d in litert.interpret(data)._get_ops_details()]


def conv(made, w, encoding, x=A, **options):
    op = Conv(("a",), "b", "conv", w, **options)
    return chain(quantized("a", x), (op, Tensor(made, encoding)))


def unary(op, made, encoding, x=A):
    return chain(quantized("a", x), (op, Tensor(made, encoding)))


def binary(op, encoding, a=A, c=B, made=IMAGE):
    return chain(quantized("a", a), quantized("c", c), (op, Tensor(made, encoding)))


def dense(clip, encoding):
    mean = Mean(("a",), "m"), Tensor((4,), Encoding(0.011, 128))
    op = Dense(("m",), "b", "dense", weights(4, 10), clip)
    return chain(quantized("a", A), mean, (op, Tensor((10,), encoding)))


def squeeze_excite():
    gate = Encoding(1 / 256)
    return chain(
        quantized("a", A),
        (Mean(("a",), "m"), Tensor((4,), A)),
        (Reshape(("m",), "r"), Tensor((1, 1, 4), A)),
        (Lookup(("r",), "s", "logistic"), Tensor((1, 1, 4), gate)),
        (Multiply(("a", "s"), "b"), Tensor(IMAGE, Encoding(0.0193, 110))),
    )


# name: (program, LiteRT's operations between QUANTIZE and DEQUANTIZE, most steps of difference).
CASES = {
    "conv": (conv((8, 8, 8), weights(3, 3, 4, 8), A, padding=ONES), "CONV_2D", 0),
    "conv relu": (conv((8, 8, 8), weights(3, 3, 4, 8), B, padding=ONES, clip=RELU), "CONV_2D", 0),
    "conv relu6": (
        conv((8, 8, 8), weights(3, 3, 4, 8), Encoding(0.0311), padding=ONES, clip=RELU6),
        "CONV_2D",
        0,
    ),
    "conv relu in a signed range": (
        conv((8, 8, 8), weights(3, 3, 4, 8), A, padding=ONES, clip=RELU),
        "CONV_2D",
        0,
    ),
    "conv 4 bits": (
        conv((4, 4, 8), weights(3, 3, 4, 8, bits=4), B4, B4, strides=(2, 2), padding=ONES),
        "MAXIMUM PAD CONV_2D",
        0,
    ),
    "conv signed 4 bits": (
        conv((4, 4, 8), weights(3, 3, 4, 8, bits=4), A4, A4, strides=(2, 2), padding=ONES),
        "MAXIMUM PAD CONV_2D MAXIMUM",
        0,
    ),
    "conv clipped": (
        conv((8, 8, 8), weights(3, 3, 4, 8), A, padding=ONES, clip=(-0.5, 0.7)),
        "CONV_2D MAXIMUM MINIMUM",
        0,
    ),
    "conv dilated": (
        conv((8, 8, 8), weights(3, 3, 4, 8), A, padding=((2, 2), (2, 2)), dilation=(2, 2)),
        "CONV_2D",
        0,
    ),
    "conv grouped": (
        conv((8, 8, 8), weights(3, 3, 2, 8), A, padding=ONES, groups=2),
        "CONV_2D",
        0,
    ),
    "depthwise": (
        conv(POOLED, weights(3, 3, 1, 4), A, padding=((0, 1),) * 2, strides=(2, 2), groups=4),
        "DEPTHWISE_CONV_2D",
        0,
    ),
    "depthwise twice as wide": (
        conv((8, 8, 8), weights(3, 3, 1, 8), A, padding=ONES, groups=4),
        "DEPTHWISE_CONV_2D",
        0,
    ),
    "dense": (dense((-np.inf, np.inf), A), "MEAN FULLY_CONNECTED", 0),
    "dense relu": (dense(RELU, B), "MEAN FULLY_CONNECTED", 0),
    # 31 and 23 of 40: many sums lie halfway between two integers.
    "add": (
        binary(Add(("a", "c"), "b"), Encoding(0.04, 100), Encoding(0.031, 120), Encoding(0.023)),
        "QUANTIZE ADD",
        1,
    ),
    "add relu": (binary(Add(("a", "c"), "b", RELU), Encoding(0.04)), "QUANTIZE ADD", 1),
    "multiply": (binary(Multiply(("a", "c"), "b"), Encoding(0.0413, 100)), "QUANTIZE MUL", 0),
    "squeeze-excite": (squeeze_excite(), "MEAN LOGISTIC MUL", 0),
    "clip": (unary(Clip(("a",), "b", -0.5, 0.5), IMAGE, A), "MAXIMUM MINIMUM", 0),
    "relu": (unary(Clip(("a",), "b", *RELU), IMAGE, A), "RELU", 0),
    "max pool": (unary(MaxPool(("a",), "b", (2, 2), (2, 2)), POOLED, A), "MAX_POOL_2D", 0),
    "max pool same": (
        unary(MaxPool(("a",), "b", (3, 3), (1, 1), ONES), IMAGE, A),
        "MAX_POOL_2D",
        0,
    ),
    "max pool padded": (
        unary(MaxPool(("a",), "b", (3, 3), (2, 2), ONES), POOLED, A),
        "PADV2 MAX_POOL_2D",
        0,
    ),
    "max pool of a relu, padded": (
        unary(MaxPool(("a",), "b", (3, 3), (2, 2), ONES), POOLED, B, B),
        "PAD MAX_POOL_2D",
        0,
    ),
    "average pool": (
        unary(AveragePool(("a",), "b", (2, 2), (2, 2)), POOLED, Encoding(0.0203, 110)),
        "DEPTHWISE_CONV_2D",
        0,
    ),
    "average pool padded": (
        unary(AveragePool(("a",), "b", (3, 3), (2, 2), ONES), POOLED, Encoding(0.0203, 110)),
        "PAD DEPTHWISE_CONV_2D",
        0,
    ),
    "mean": (unary(Mean(("a",), "b"), (4,), Encoding(0.0041, 110)), "MEAN", 0),
    "mean 4 bits": (unary(Mean(("a",), "b"), (4,), B4, B), "MEAN", 0),
    "concatenate": (
        binary(Concatenate(("a", "c"), "b", 2), A, made=(8, 8, 8)),
        "QUANTIZE MUL CONCATENATION",
        0,
    ),
    "reshape": (unary(Reshape(("a",), "b"), (256,), A), "RESHAPE", 0),
    "transpose": (unary(Transpose(("a",), "b", (2, 0, 1)), (4, 8, 8), A), "TRANSPOSE", 0),
    "pad": (unary(Pad(("a",), "b", ((1, 0), (0, 2), (1, 1))), (9, 10, 6), A), "PAD", 0),
    "slice": (
        unary(Slice(("a",), "b", (0, 1, 0), (8, 8, 3), (1,) * 3), (8, 7, 3), A),
        "STRIDED_SLICE",
        0,
    ),
    "slice with strides": (
        unary(Slice(("a",), "b", (0, 1, 0), (8, 8, 4), (2, 2, 1)), POOLED, A),
        "RESHAPE STRIDED_SLICE RESHAPE",
        0,
    ),
    # Rows 1 and 5, columns 3, 5 and 7, channels 1 and 2.
    "slice with strides of a part": (
        unary(Slice(("a",), "b", (1, 3, 1), (6, 8, 3), (4, 2, 1)), (2, 3, 2), A),
        "RESHAPE STRIDED_SLICE RESHAPE",
        0,
    ),
    "slice with strides that leave a rest": (
        unary(Slice(("a",), "b", (0, 1, 0), (8, 8, 4), (3, 2, 1)), (3, 4, 4), A),
        "STRIDED_SLICE",
        0,
    ),
    "logistic": (
        unary(Lookup(("a",), "b", "logistic"), IMAGE, Encoding(1 / 256)),
        "LOGISTIC",
        0,
    ),
    "logistic in another range": (
        unary(Lookup(("a",), "b", "logistic"), IMAGE, Encoding(0.003)),
        "LOGISTIC MUL",
        1,
    ),
    "tanh": (unary(Lookup(("a",), "b", "tanh"), IMAGE, Encoding(1 / 128, 128)), "TANH", 0),
    "exp": (unary(Lookup(("a",), "b", "exp"), IMAGE, Encoding(0.08)), "EXP", 1),
    "convert": (unary(Convert(("a",), "b"), IMAGE, B), "MUL", 0),
    "convert to 4 bits": (unary(Convert(("a",), "b"), IMAGE, B4, B), "MUL", 0),
    "convert to the same": (unary(Convert(("a",), "b"), IMAGE, A), "", 0),
}


@pytest.mark.parametrize("name", CASES)
def test_integers_agree_with_the_reference(name):
    program, inner, most = CASES[name]
    data = litert.to_litert(program)
    assert operations(data) == ["QUANTIZE", *inner.split(), "DEQUANTIZE"]
    step, x = program.encoding("b").scale, images()
    want = np.asarray(jax.jit(reference.run(program))(x))
    assert len(np.unique(want)) > 3  # it is no constant
    for batch in (1, 3):
        got = litert.litert_session(data, batch)(x)
        assert got.shape == want.shape
        assert np.abs(np.rint((got - want) / step)).max() <= most


@pytest.mark.parametrize("name", ["slice", "slice with strides", "slice with strides of a part"])
def test_xnnpack_runs_slices(name):
    interpreter = litert.interpret(litert.to_litert(CASES[name][0]))
    run = interpreter.get_signature_runner("serving_default")
    for batch in (1, 3):
        run(x=images(batch))
        names = [d["op_name"] for d in interpreter._get_ops_details()]
        assert names.count("DELEGATE") == 1  # it is in the place of all the others


def test_every_operation_has_a_case():
    ours = {type(op) for program, _, _ in CASES.values() for op in program.operations}
    assert ours | {Softmax} == set(Operation.__subclasses__())


@pytest.mark.parametrize(
    "program",
    [
        chain(
            (Conv(("x",), "b", "c", in_floats(weights(3, 3, 4, 8)), (2, 2), ONES, clip=RELU),
             Tensor((4, 4, 8))),
            (AveragePool(("b",), "p", (2, 2), (2, 2)), Tensor((2, 2, 8))),
            (Mean(("p",), "m"), Tensor((8,))),
            (Dense(("m",), "d", "d", in_floats(weights(8, 5))), Tensor((5,))),
            (Softmax(("d",), "y"), Tensor((5,))),
        ),
        chain(
            (MaxPool(("x",), "b", (3, 3), (2, 2), ONES), Tensor(POOLED)),
            (Lookup(("b",), "s", "tanh"), Tensor(POOLED)),
            (Multiply(("b", "s"), "m", (-0.5, 2.0)), Tensor(POOLED)),
            (Concatenate(("m", "s"), "y", 2), Tensor((4, 4, 8))),
        ),
        # Integers between floats: each in its own arithmetic.
        chain(
            (Clip(("x",), "c", -1.0, 1.0), Tensor(IMAGE)),
            (Convert(("c",), "q"), Tensor(IMAGE, A)),
            (Mean(("q",), "m"), Tensor((4,))),
            (Dense(("m",), "y", "d", in_floats(weights(4, 5))), Tensor((5,))),
        ),
    ],
    ids=["net", "branches", "mixed"],
)  # fmt: skip
def test_floats_agree_with_the_reference(program):
    x, data = images(), litert.to_litert(program)
    want = np.asarray(jax.jit(reference.run(program))(x))
    for batch in (1, 3):
        np.testing.assert_allclose(litert.litert_session(data, batch)(x), want, atol=2e-6)


def test_the_last_layer_returns_its_accumulator():
    program = dense((-np.inf, np.inf), None)
    data = litert.to_litert(program)
    want = ["QUANTIZE", "MEAN", "DEQUANTIZE", "DEQUANTIZE", "FULLY_CONNECTED"]
    assert operations(data) == want
    expected = reference.run(program)(images())
    np.testing.assert_allclose(litert.litert_session(data)(images()), expected, atol=1e-6)


def test_what_another_operation_requantizes_stays_in_integers():
    # 'a' is read in its own encoding by a slice, and in 4 bits by a convolution.
    program = chain(
        quantized("a", B),
        (Convert(("a",), "f"), Tensor(IMAGE, B4)),
        (
            Conv(("f",), "c", "c", weights(3, 3, 4, 4), (2, 2), ((0, 1), (0, 1))),
            Tensor(POOLED, A),
        ),
        (Slice(("a",), "s", (0,) * 3, IMAGE, (2, 2, 1)), Tensor(POOLED, B)),
        (Add(("c", "s"), "b", RELU), Tensor(POOLED, B)),
    )
    inner = ["MUL", "CONV_2D", "RESHAPE", "STRIDED_SLICE", "RESHAPE", "ADD"]
    assert operations(litert.to_litert(program)) == ["QUANTIZE", *inner, "DEQUANTIZE"]


def test_the_file_holds_the_integers_of_the_program():
    first, second, head = weights(3, 3, 4, 8), weights(3, 3, 1, 8, bits=4, seed=1), weights(8, 5)
    y = Encoding(0.0217, 131)
    program = chain(
        quantized("a", A),
        (Conv(("a",), "b", "b", first, padding=ONES, clip=RELU), Tensor((8, 8, 8), B)),
        (Conv(("b",), "c", "c", second, groups=8), Tensor((6, 6, 8), B4)),
        (Mean(("c",), "m"), Tensor((8,), B)),
        (Dense(("m",), "d", "d", head), Tensor((5,), y)),
    )
    interpreter = litert.interpret(litert.to_litert(program))
    interpreter.allocate_tensors()
    details = {d["index"]: d for d in interpreter.get_tensor_details()}
    weighted = [
        op
        for op in interpreter._get_ops_details()
        if op["op_name"] in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
    ]
    # Kernels (O, kh, kw, C) and, depthwise, (1, kh, kw, C).
    kernels = [first.values.transpose(3, 0, 1, 2), second.values.transpose(2, 0, 1, 3)]
    kernels.append(head.values.T)
    for op, ours, kernel, encoding in zip(weighted, program.weighted, kernels, (A, B, B)):
        _, w, bias = (int(index) for index in op["inputs"])
        np.testing.assert_array_equal(interpreter.get_tensor(w), kernel)
        scales = details[w]["quantization_parameters"]["scales"]
        np.testing.assert_array_equal(scales, ours.weights.scale)
        steps = arithmetic.integer_bias(ours.weights, encoding)
        np.testing.assert_array_equal(interpreter.get_tensor(bias), steps)
    # int8 is uint8 less 128; 4 bits end at 127, at 15: less −112.
    named = {d["name"]: d["quantization"] for d in details.values()}
    assert named["a"] == (np.float32(A.scale), 120 - 128)
    assert named["b"] == (np.float32(B.scale), -128)
    assert named["c"] == (np.float32(B4.scale), 112)
    assert named["d"] == (np.float32(y.scale), 131 - 128)
    # Nothing is a float but what enters and leaves.
    floats = [d["name"] for d in details.values() if d["dtype"] is np.float32]
    assert floats == ["serving_default_x", "serving_default_y_output"]


@settings(max_examples=15, deadline=None)
@given(
    scale=st.floats(2**-8, 2**-2),
    ends=st.lists(st.integers(0, 255), min_size=3, max_size=3, unique=True).map(sorted),
)
def test_any_encoding(scale, ends):
    low, zero, high = ends
    encoding = Encoding(float(np.float32(scale)), zero, low, high)
    program = chain(quantized("b", encoding))
    x = images(1, scale=100 * scale)
    want = np.asarray(reference.run(program)(x))
    got = litert.litert_session(litert.to_litert(program))(x)
    steps = np.rint((got - want) / np.float32(scale))
    # A range of 255 integers is not cut at its lower end.
    assert np.abs(steps).max() <= (low == high - 254)


def expert(seed):
    op = Conv(("a",), "b", "conv", weights(3, 3, 4, 4, seed=seed), padding=ONES, clip=RELU)
    return chain(
        quantized("a", A),
        (op, Tensor(IMAGE, B)),
        (Mean(("b",), "m"), Tensor((4,), B)),
        (Dense(("m",), "y", "dense", weights(4, 5, seed=seed)), Tensor((5,))),
    )


def mixture(gate_encoding=A):
    gate = chain(
        quantized("a", gate_encoding),
        (Mean(("a",), "m"), Tensor((4,), gate_encoding and Encoding(0.011, 128))),
        (
            Dense(("m",), "y", "gate", weights(4, 3) if gate_encoding else GATE),
            Tensor((3,)),
        ),
    )
    return Mixture(gate, tuple(map(expert, range(3))))


GATE = Weights(np.float32(np.eye(4, 3)), None, np.zeros(3, np.float32))


def test_a_mixture_runs_one_expert():
    program = mixture(None)
    data = litert.to_litert(program)
    x = images(12)
    x += 2 * np.eye(4, dtype=np.float32)[np.arange(12) % 3, None, None]
    chosen = np.argmax(np.asarray(reference.run(program.gate)(x)), -1)
    assert set(chosen) == {0, 1, 2}
    want = np.asarray(reference.run(program)(x))
    got = litert.litert_session(data)(x)
    np.testing.assert_allclose(got, want, atol=1e-6)
    signatures = litert.interpret(data).get_signature_list()
    assert list(signatures) == ["gate", "expert_0", "expert_1", "expert_2"]
    assert all(ends == {"inputs": ["x"], "outputs": ["y"]} for ends in signatures.values())
    with pytest.raises(ValueError, match="batch must be 1 for a mixture, got 2"):
        litert.litert_session(data, batch=2)
    x[3, 0, 0, 0] = np.nan
    bad = np.isnan(litert.litert_session(data)(x))
    np.testing.assert_array_equal(bad.any(-1), np.arange(12) == 3)


def test_a_mixture_with_a_gate_in_integers():
    program = mixture()
    want = np.asarray(reference.run(program)(images()))
    got = litert.litert_session(litert.to_litert(program))(images())
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.fixture(scope="module")
def trained(digits):
    """The digits' network in floats, in 8 and in 4 bits."""
    x = digits.images[:256]
    graph = core.trace(digits.fn, digits.params, x[:1])
    programs = [lowering.lower(digits.fn, digits.params, None, None, x[:1])]
    for bits in (8, 4):
        spec = quantization.spec(graph, weight_bits=bits, activation_bits=bits)
        ranges = quantization.calibrate(digits.fn, digits.params, [(x,)], spec, method="mse")
        programs.append(lowering.lower(digits.fn, digits.params, spec, ranges, x))
    return programs


def test_a_trained_network_on_real_images(digits, trained):
    x = np.asarray(digits.held_out_images)
    for program, atol in zip(trained, (1e-4, 0.05, 0.05)):
        want = np.asarray(jax.jit(reference.run(program))(x))
        got = litert.litert_session(litert.to_litert(program), len(x))(x)
        np.testing.assert_allclose(got, want, atol=atol)
        assert (got.argmax(-1) == want.argmax(-1)).mean() >= 0.999
        assert np.abs(got - want).mean() <= atol / 100


def test_export(tmp_path):
    program = expert(0)
    path = tmp_path / "model.tflite"
    manifest = litert.export_litert(path, program)
    data, read = artifact.read(path)
    assert data == litert.to_litert(program)
    assert read == manifest
    assert manifest["kind"] == "litert"
    assert manifest["litert_converter"].startswith("0.5.")
    assert manifest["inputs"] == [{"shape": ["b", 8, 8, 4], "dtype": "float32"}]
    assert manifest["outputs"] == [{"shape": ["b", 5], "dtype": "float32"}]
    got, want = (litert.litert_session(file)(images()) for file in (path, data))
    np.testing.assert_array_equal(got, want)
    manifest = litert.export_litert(path, mixture())
    assert manifest["inputs"] == [{"shape": [1, 8, 8, 4], "dtype": "float32"}]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.tflite"
    litert.export_litert(path, expert(0))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        litert.export_litert(path, expert(1))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_refuses_what_is_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        litert.litert_session(tmp_path / "missing")
    artifact.write(tmp_path / "other", b"abc", {"kind": "stablehlo"})
    with pytest.raises(ValueError, match="other must be of kind 'litert', got 'stablehlo'"):
        litert.litert_session(tmp_path / "other")


def test_refuses_other_shapes():
    data = litert.to_litert(expert(0))
    session = litert.litert_session(data, batch=2)
    for shape in [(3, *IMAGE), (0, *IMAGE), (2, 8, 8, 3), IMAGE]:
        with pytest.raises(ValueError, match=r"x must have shape \(2, 8, 8, 4\) or a multiple"):
            session(np.zeros(shape, np.float32))
    for name in ("batch", "threads"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            litert.litert_session(data, **{name: 0})


def test_names_the_operation_that_the_converter_refuses(monkeypatch):
    def refused(op, values, encodings, output):
        return jnp.fft.fft(values[0]).real + values[1]

    monkeypatch.setitem(litert_marks._RULES, Add, refused)
    program, _, _ = CASES["add"]
    with pytest.raises(ValueError, match=r"got Add of a, c to b: Failed to export"):
        litert.to_litert(program)


@pytest.mark.parametrize("module", ["litert_converter.mlir.ir", "ai_edge_litert.interpreter"])
def test_names_the_extra_that_is_missing(monkeypatch, module):
    data = b"" if module.startswith("ai") else None
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module} is not installed.*hybrid_jax\[litert\]"):
        litert.to_litert(expert(0)) if data is None else litert.litert_session(data)


def test_one_tensor_in_two_encodings():
    # As where two sites read a tensor with ranges of their own.
    tensors = {
        "x": Tensor((6,)),
        "a": Tensor((6,), Encoding(1 / 64, 128)),
        "b": Tensor((6,), Encoding(1 / 80, 128)),
        "c": Tensor((6,), Encoding(1 / 40, 128)),
        "y": Tensor((6,), Encoding(1 / 30, 128)),
        "out": Tensor((6,)),
    }
    steps = (
        Convert(("x",), "a"),
        Convert(("a",), "b"),
        Convert(("a",), "c"),
        Add(("b", "c"), "y"),
        Convert(("y",), "out"),
    )
    program = Program("x", "out", tensors, steps)
    x = np.random.default_rng(0).uniform(-1.5, 1.5, (16, 6)).astype(np.float32)
    got = litert.litert_session(litert.to_litert(program))(x)
    assert np.abs(got - np.asarray(reference.run(program)(x))).max() <= 1 / 30 + 1e-6
