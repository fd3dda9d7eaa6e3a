import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered import deployed
from operation_cases import (
    B4,
    CASES,
    IMAGE,
    ONES,
    PAIR,
    RELU,
    STEPS,
    A,
    B,
    alone,
    expression,
    inputs,
    together,
    weights,
)

from hybrid_jax import program as p
from hybrid_jax.deploy import artifact, litert, litert_operations
from hybrid_jax.program import Encoding, Program, Tensor, arithmetic

POOLED = (4, 4, 4)

KERNELS = {
    p.Conv: "CONV_2D",
    p.Dense: "FULLY_CONNECTED",
    p.MatMul: "DEQUANTIZE DEQUANTIZE BATCH_MATMUL QUANTIZE",
    p.Add: "ADD",
    p.Constant: "ADD",
    p.Multiply: "MUL",
    p.Maximum: "MUL MUL MAXIMUM",
    p.Minimum: "MUL MUL MINIMUM",
    p.Clip: "MAXIMUM MINIMUM",
    p.Convert: "MUL",
    p.Function: "DEQUANTIZE EXP ADD LOG TANH MUL QUANTIZE",
    p.Mean: "MEAN",
    p.Largest: "REDUCE_MAX",
    p.MaxPool: "PADV2 MAX_POOL_2D",
    p.AveragePool: "PAD DEPTHWISE_CONV_2D",
    p.Concatenate: "MUL MUL CONCATENATION",
    p.Reshape: "",
    p.Transpose: "TRANSPOSE",
    p.Broadcast: "TILE",
    p.Pad: "PAD",
    p.Slice: "STRIDED_SLICE",
    p.Gather: "TRANSPOSE GATHER_ND TRANSPOSE",
    p.Softmax: "DEQUANTIZE TRANSPOSE SOFTMAX TRANSPOSE QUANTIZE",
    p.Normalize: "DEQUANTIZE MEAN SUB MUL MEAN ADD RSQRT MUL QUANTIZE",
}
"""{operation: those of LiteRT for it in integers, but for RESHAPE and what it stands between}."""
OTHERS = {
    "conv 4 bits": "MAXIMUM PAD CONV_2D",
    "conv signed 4 bits": "MAXIMUM PAD CONV_2D MAXIMUM",
    "conv clipped": "CONV_2D MAXIMUM MINIMUM",
    "conv strided": "PAD CONV_2D",
    "conv in wide padding": "PAD CONV_2D",
    "conv cropped": "STRIDED_SLICE PAD CONV_2D",
    "conv of one channel": "DEPTHWISE_CONV_2D",
    "depthwise": "DEPTHWISE_CONV_2D",
    "depthwise relu6": "DEPTHWISE_CONV_2D",
    "depthwise dilated": "PAD DEPTHWISE_CONV_2D",
    "depthwise twice as wide": "DEPTHWISE_CONV_2D",
    "add of numbers": "ADD MAXIMUM MINIMUM",
    "less": "SUB",
    "less, clipped": "SUB MAXIMUM MINIMUM",
    "less of both sides": "SUB",
    "minimum of six": "MUL MINIMUM",
    "clip to its own": "MUL",
    "clip of a number": "MAXIMUM",
    "relu": "RELU",
    "relu to its own": "MUL",
    "sigmoid": "LOGISTIC",
    "sigmoid in another range": "DEQUANTIZE LOGISTIC QUANTIZE",
    "tanh": "TANH",
    "exp": "DEQUANTIZE EXP QUANTIZE",
    "choice": "DEQUANTIZE GREATER SELECT_V2 QUANTIZE",
    "leaky": "DEQUANTIZE MUL GREATER_EQUAL SELECT_V2 QUANTIZE",
    "leaky rows": "DEQUANTIZE MUL GREATER_EQUAL SELECT_V2 QUANTIZE",
    "floor": "DEQUANTIZE MUL ADD CAST GATHER_ND",
    "floor of each channel": "DEQUANTIZE MUL ADD CAST GATHER_ND",
    "ratio": "DEQUANTIZE DEQUANTIZE ABS ADD DIV QUANTIZE",
    "larger of two": "DEQUANTIZE DEQUANTIZE GREATER SELECT_V2 QUANTIZE",
    "max pool": "MAX_POOL_2D",
    "max pool same": "MAX_POOL_2D",
    "max pool of 18": "MAX_POOL_2D",
    "max pool of a relu": "PAD MAX_POOL_2D",
    "average pool": "DEPTHWISE_CONV_2D",
    "average pool of what there is": "DEQUANTIZE PAD DEPTHWISE_CONV_2D MUL QUANTIZE",
    "average pool of what there is of 18": "DEQUANTIZE PAD DEPTHWISE_CONV_2D MUL QUANTIZE",
    "concatenate": "MUL CONCATENATION",
    "pad with a value": "PADV2",
    "pad with a value out of range": "PADV2",
    "cropped": "STRIDED_SLICE PAD",
    "gather a channel": "TRANSPOSE STRIDED_SLICE",
    "convert to the same": "",
    "slice with strides": "STRIDED_SLICE STRIDED_SLICE",
    "slice with strides of a part": "STRIDED_SLICE STRIDED_SLICE",
    "softmax": "DEQUANTIZE SOFTMAX QUANTIZE",
    "softmax of channels": "DEQUANTIZE SOFTMAX QUANTIZE",
    "concatenate six": "MUL CONCATENATION",
    "leaky four": "DEQUANTIZE MUL GREATER_EQUAL SELECT_V2 QUANTIZE",
}
"""{case: the same where it differs from that of its class}."""


def images(n=6, shape=IMAGE, seed=1, scale=2.0):
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=(n, *shape))).astype(np.float32)


def operations(data):
    """Names of the file's operations, in running order."""
    return [d["op_name"] for d in litert.interpret(data)._get_ops_details()]


@pytest.mark.parametrize("name", CASES)
def test_integers_are_those_of_the_program_at_any_batch(name):
    case, program, xs = CASES[name], alone(name, "integers"), inputs(name)
    data, step = litert.to_litert(program), program.encoding("last").scale
    want = np.asarray(jax.jit(p.run(program))(*xs))
    for batch in (1, 3, 4):
        got = litert.litert_session(data, batch)(*(x[:batch] for x in xs))
        assert got.shape == want[:batch].shape
        assert np.abs(np.rint((got - want[:batch]) / step)).max() <= case.most
    made = [name for name in operations(data) if name != "RESHAPE"]
    kernels = OTHERS.get(name, KERNELS[type(case.op)]).split()
    assert sorted(made) == sorted(["QUANTIZE"] * len(xs) + kernels + ["DEQUANTIZE"])


@pytest.mark.parametrize("form", ["floats", "integers to floats"])
def test_floats_are_those_of_the_program_at_any_batch(form):
    # A window of padding alone has no largest value: LiteRT gives the least float for −inf.
    names, program = together(form, ["max pool in wide padding"])
    xs, data = [x for name in names for x in inputs(name)], litert.to_litert(program)
    assert ("QUANTIZE" in operations(data)) == (form != "floats")
    for batch in (1, 3, 4):
        got = litert.litert_session(data, batch)(*(x[:batch] for x in xs))
        for name, ours, theirs in zip(names, got, jax.jit(p.run(program))(*xs), strict=True):
            want = np.asarray(theirs)
            room = 1e-5 * np.abs(want).max()
            np.testing.assert_allclose(ours, want[:batch], atol=room, err_msg=name)


@pytest.mark.parametrize("name", STEPS)
def test_steps_in_floats_are_those_of_jax(name):
    program = expression(*STEPS[name])
    session = litert.litert_session(litert.to_litert(program), len(PAIR[0]))
    (got, _), (want, _) = session(*PAIR), p.run(program)(*PAIR)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


def test_a_constant_stands_before_every_example():
    # As the class token and the positions of a transformer do.
    def fn(params, x):
        token = jnp.broadcast_to(params["token"], (len(x), 1, 4))
        rows = jnp.concatenate([x, token, x[:, :1]], 1) + params["place"]
        return jax.nn.relu(rows * params["scale"]) @ params["out"]

    rng = np.random.default_rng(0)
    sizes = {"token": (1, 1, 4), "place": (1, 7, 4), "scale": (1, 7, 1), "out": (4, 3)}
    params = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    for program in deployed(fn, params, images(16, (5, 4)))[:2]:
        agrees(program, images(4, (5, 4)))


def agrees(program, *xs):
    """The file gives what the program does, at batch 1, 3 and 4."""
    data = litert.to_litert(program)
    want = jax.tree.leaves(jax.jit(p.run(program))(*xs))
    for batch in (1, 3, 4):
        got = jax.tree.leaves(litert.litert_session(data, batch)(*(x[:batch] for x in xs)))
        assert len(got) == len(want)
        for ours, theirs in zip(got, want, strict=True):
            assert ours.dtype == theirs.dtype
            most = 1e-5 * np.abs(np.float32(theirs)).max()
            np.testing.assert_allclose(np.float32(ours), np.float32(theirs[:batch]), atol=most)
    return data


def test_several_inputs_and_outputs():
    def fn(params, image, x):
        y = (
            jax.nn.relu(x @ params["a"])
            + (image.astype(jnp.float32) / 255).mean((1, 2)) @ params["b"]
        )
        z = jax.nn.relu(y) @ params["a"]
        found = {"mask": z > 0, "level": jnp.round(z).astype(jnp.int32), "z": z, "again": z}
        return found | {"image": jnp.clip(z * 40, 0, 255).astype(jnp.uint8), "x": x}

    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 3)), "b": rng.normal(size=(4, 3))}
    params = jax.tree.map(np.float32, params)
    image = rng.integers(0, 256, (16, 5, 5, 4)).astype(np.uint8)
    for program in deployed(fn, params, image, images(16, (3,)))[:2]:
        data = agrees(program, image[:4], images(4, (3,)))
        signature = litert.interpret(data).get_signature_list()["serving_default"]
        assert signature["inputs"] == ["x0", "x1"]
        assert len(signature["outputs"]) == 6
    session = litert.litert_session(data)
    with pytest.raises(ValueError, match="x0 must be of dtype uint8, got float32"):
        session(np.float32(image), images(16, (3,)))
    with pytest.raises(ValueError, match="inputs must be 2 arrays, got 1"):
        session(image[:1])
    with pytest.raises(ValueError, match=r"x1 must have shape \(B, 3\)"):
        session(image[:1], images(4, (4,)))


def test_bytes_go_into_integers_as_they_are():
    def fn(params, image):
        x = jax.lax.conv_general_dilated(
            image.astype(jnp.float32) / 255,
            params["k"],
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jax.nn.relu(x).mean((1, 2)) @ params["w"]

    rng = np.random.default_rng(0)
    sizes = {"k": (3, 3, 2, 4), "w": (4, 3)}
    params = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    image = rng.integers(0, 256, (8, 5, 5, 2)).astype(np.uint8)
    floats, integers, _ = deployed(fn, params, image)
    assert operations(agrees(floats, image[:4]))[:2] == ["CAST", "CONV_2D"]
    data = agrees(integers, image[:4])
    assert operations(data)[:2] == ["QUANTIZE", "CONV_2D"]
    (x,) = litert.interpret(data).get_input_details()
    assert (x["dtype"], x["quantization"]) == (np.uint8, (1.0, 0))


def test_the_file_says_that_its_batch_is_open():
    interpreter = litert.interpret(litert.to_litert(alone("conv", "integers")))
    (x,) = interpreter.get_input_details()
    assert x["shape_signature"].tolist() == [-1, 8, 8, 4]
    interpreter.resize_tensor_input(x["index"], [3, 8, 8, 4], strict=True)
    interpreter.allocate_tensors()
    assert interpreter.get_output_details()[0]["shape"].tolist() == [3, 8, 8, 8]


def test_refuses_what_LiteRT_has_not():
    x, params = images(4, (3,)), {"a": np.ones((1, 3), np.float32)}

    def low_bits(params, x):
        return ((x * params["a"]).astype(jnp.int32) & 3).astype(jnp.float32)

    with pytest.raises(ValueError, match="of steps that LiteRT has, got 'and' of integers"):
        litert.to_litert(p.lower(low_bits, params, x))
    steps = (p.Constant((), "y", np.ones(3, np.float32)),)
    constant = Program("x", "y", dict.fromkeys("xy", Tensor((3,))), steps)
    with pytest.raises(ValueError, match="output 'y' must depend on an input"):
        litert.to_litert(constant)


def test_refuses_what_cannot_be_resized(monkeypatch):
    def rule(at, a):
        return a * np.arange(len(a), dtype=np.float32).reshape(-1, 1, 1, 1)

    monkeypatch.setitem(litert_operations.RULES, p.Clip, rule)
    with pytest.raises(
        ValueError, match=r"got Clip of a to last: tfl\.mul holds the number of examples"
    ):
        litert.to_litert(alone("clip", "floats"))


@pytest.mark.parametrize("name", ["slice", "slice with strides", "slice with strides of a part"])
def test_xnnpack_runs_slices(name):
    interpreter = litert.interpret(litert.to_litert(alone(name, "integers")))
    run = interpreter.get_signature_runner("serving_default")
    for batch in (1, 3):
        run(x=images(batch))
        names = [d["op_name"] for d in interpreter._get_ops_details()]
        assert names.count("DELEGATE") == 1  # it is in the place of all the others


def chain(*steps):
    """x -> 'a' -> … -> the output of the last step; steps are (operation, made)."""
    tensors = {"x": Tensor(IMAGE)} | {op.output: made for op, made in steps}
    return Program("x", steps[-1][0].output, tensors, tuple(op for op, _ in steps))


def quantized(encoding, name="a"):
    return p.Convert(("x",), name), Tensor(IMAGE, encoding)


def test_the_last_layer_returns_its_accumulator():
    program = chain(
        quantized(A),
        (p.Mean(("a",), "m"), Tensor((4,), Encoding(0.011, 128))),
        (p.Dense(("m",), "b", "dense", weights(4, 10)), Tensor((10,))),
    )
    want = ["QUANTIZE", "MEAN", "DEQUANTIZE", "DEQUANTIZE", "FULLY_CONNECTED"]
    assert operations(agrees(program, images(4))) == want


def test_what_another_operation_requantizes_stays_in_integers():
    # 'a' is read in its own encoding by a slice, and in 4 bits by a convolution.
    program = chain(
        quantized(B),
        (p.Convert(("a",), "f"), Tensor(IMAGE, B4)),
        (
            p.Conv(("f",), "c", "c", weights(3, 3, 4, 4), (2, 2), ((0, 1), (0, 1))),
            Tensor(POOLED, A),
        ),
        (p.Slice(("a",), "s", (0,) * 3, IMAGE, (2, 2, 1)), Tensor(POOLED, B)),
        (p.Add(("c", "s"), "b", RELU), Tensor(POOLED, B)),
        (p.Convert(("b",), "y"), Tensor(POOLED)),
    )
    inner = ["MUL", "CONV_2D", *["RESHAPE", "STRIDED_SLICE"] * 2, "ADD"]
    assert operations(litert.to_litert(program)) == ["QUANTIZE", *inner, "DEQUANTIZE"]


def test_the_file_holds_the_integers_of_the_program():
    first, second, head = weights(3, 3, 4, 8), weights(3, 3, 1, 8, bits=4, seed=1), weights(8, 5)
    y = Encoding(0.0217, 131)
    program = chain(
        quantized(A),
        (p.Conv(("a",), "b", "b", first, padding=ONES, clip=RELU), Tensor((8, 8, 8), B)),
        (p.Conv(("b",), "c", "c", second, groups=8), Tensor((6, 6, 8), B4)),
        (p.Mean(("c",), "m"), Tensor((8,), B)),
        (p.Dense(("m",), "d", "d", head), Tensor((5,), y)),
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


@settings(max_examples=15)
@given(
    scale=st.floats(2**-8, 2**-2),
    ends=st.lists(st.integers(0, 255), min_size=3, max_size=3, unique=True).map(sorted),
)
def test_any_encoding(scale, ends):
    low, zero, high = ends
    encoding = Encoding(float(np.float32(scale)), zero, low, high)
    program = chain(quantized(encoding, "b"), (p.Convert(("b",), "y"), Tensor(IMAGE)))
    x = images(1, scale=100 * scale)
    want = np.asarray(p.run(program)(x))
    got = litert.litert_session(litert.to_litert(program))(x)
    steps = np.rint((got - want) / np.float32(scale))
    # A range of 255 integers is not cut at its lower end.
    assert np.abs(steps).max() <= (low == high - 254)


def expert(seed):
    op = p.Conv(("a",), "b", "conv", weights(3, 3, 4, 4, seed=seed), padding=ONES, clip=RELU)
    return chain(
        quantized(A),
        (op, Tensor(IMAGE, B)),
        (p.Mean(("b",), "m"), Tensor((4,), B)),
        (p.Dense(("m",), "y", "dense", weights(4, 5, seed=seed)), Tensor((5,))),
    )


@pytest.fixture(scope="module")
def trained(digits):
    """The digits' network in floats, in 8 and in 4 bits."""
    x = digits.images[:256]
    eight, four = (
        deployed(digits.fn, digits.params, x, method="mse", weight_bits=bits, activation_bits=bits)
        for bits in (8, 4)
    )
    return eight.floats, eight.integers, four.integers


def test_a_trained_network_on_real_images(digits, trained):
    x = np.asarray(digits.held_out_images)
    for program, atol in zip(trained, (1e-4, 0.05, 0.05)):
        want = np.asarray(jax.jit(p.run(program))(x))
        got = litert.litert_session(litert.to_litert(program), len(x))(x)
        np.testing.assert_allclose(got, want, atol=atol)
        assert (got.argmax(-1) == want.argmax(-1)).mean() >= 0.999
        assert np.abs(got - want).mean() <= atol / 100


def test_refuses_what_is_no_such_file(tmp_path):
    artifact.write(tmp_path / "other", b"abc", {"kind": "stablehlo"})
    with pytest.raises(ValueError, match="other must be of kind 'litert', got 'stablehlo'"):
        litert.litert_session(tmp_path / "other")


def test_refuses_other_shapes():
    data = litert.to_litert(expert(0))
    session = litert.litert_session(data, batch=2)
    for shape in [(3, *IMAGE), (0, *IMAGE), (2, 8, 8, 3), IMAGE]:
        with pytest.raises(ValueError, match=r"x must have shape \(B, 8, 8, 4\) with B = 2, 4"):
            session(np.zeros(shape, np.float32))
    for name in ("batch", "threads"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            litert.litert_session(data, **{name: 0})


def test_names_the_operation_that_the_converter_refuses(monkeypatch):
    def refused(at, a, c):
        return jnp.fft.fft(a).real + c

    monkeypatch.setitem(litert_operations.RULES, p.Add, refused)
    program = alone("add", "floats")
    with pytest.raises(ValueError, match=r"got Add of a, c to last: Failed to export"):
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
        p.Convert(("x",), "a"),
        p.Convert(("a",), "b"),
        p.Convert(("a",), "c"),
        p.Add(("b", "c"), "y"),
        p.Convert(("y",), "out"),
    )
    program = Program("x", "out", tensors, steps)
    x = np.random.default_rng(0).uniform(-1.5, 1.5, (16, 6)).astype(np.float32)
    got = litert.litert_session(litert.to_litert(program))(x)
    assert np.abs(got - np.asarray(p.run(program)(x))).max() <= 1 / 30 + 1e-6
