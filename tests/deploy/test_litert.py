import dataclasses
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered import in_integers

from hybrid_jax import core, quantization
from hybrid_jax import program as p
from hybrid_jax.deploy import artifact, litert, litert_functions, litert_operations
from hybrid_jax.program import Encoding, Program, Tensor, Weights, arithmetic
from hybrid_jax.program.functions import FUNCTIONS, Step

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
    step, bias = p.integer_step(bits), rng.normal(size=shape[-1]).astype(np.float32)
    return Weights(values * np.int8(step), (scale / step).astype(np.float32), bias, bits)


def in_floats(w):
    return Weights(w.values * w.scale, None, w.bias)


class Case(NamedTuple):
    """An operation with LiteRT's operations for it in integers.

    Attributes:
      op: Its inputs are made 'a' and 'c', its output 'b'.
      kernels: Between the first QUANTIZE and the last DEQUANTIZE, but for RESHAPE.
      shapes: Of its inputs.
      given: Encodings of its inputs.
      made: Of its result; None for A where it has the input's, else for what fits.
      most: Steps of difference.
    """

    op: p.Operation
    kernels: str
    shapes: tuple = (IMAGE,)
    given: tuple = (A, B)
    made: Encoding | None = None
    most: int = 0


def conv(*shape, bits=8, **options):
    return p.Conv(("a",), "b", "conv", weights(*shape, bits=bits), **options)


def one(kind, *fields, **options):
    return kind(("a",), "b", *fields, **options)


def two(kind, *fields, **options):
    return kind(("a", "c"), "b", *fields, **options)


def function(*steps, constants=()):
    return p.Function(("a",), "b", steps, constants)


def images(n=6, shape=IMAGE, seed=1, scale=2.0):
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=(n, *shape))).astype(np.float32)


TIMES = np.float32([0.5, 2.0, -1.0, 0.0])
SIGMOID, TANH = Encoding(1 / 256), Encoding(1 / 128, 128)
SEQUENCE, SIX = (4, 6), (2, 3, 1, 2, 3, 2)
SUM = Encoding(0.04, 100)
SHIFTED = "DEQUANTIZE MUL ADD CAST GATHER_ND"
IN_FLOATS = "DEQUANTIZE DEQUANTIZE BATCH_MATMUL QUANTIZE"
CASES = {
    "conv": Case(conv(3, 3, 4, 8, padding=ONES), "CONV_2D"),
    "conv relu": Case(conv(3, 3, 4, 8, padding=ONES, clip=RELU), "CONV_2D", made=B),
    "conv relu6": Case(conv(3, 3, 4, 8, clip=RELU6), "CONV_2D", made=Encoding(0.0311)),
    "conv relu signed": Case(conv(3, 3, 4, 8, clip=RELU), "CONV_2D", made=A),
    "conv 4 bits": Case(
        conv(3, 3, 4, 8, bits=4, strides=(2, 2), padding=ONES), "MAXIMUM PAD CONV_2D", given=(B4,),
        made=B4,
    ),
    "conv signed 4 bits": Case(
        conv(3, 3, 4, 8, bits=4, strides=(2, 2), padding=ONES), "MAXIMUM PAD CONV_2D MAXIMUM",
        given=(A4,), made=A4,
    ),
    "conv clipped": Case(conv(3, 3, 4, 8, clip=(-0.5, 0.7)), "CONV_2D MAXIMUM MINIMUM", made=A),
    "conv dilated": Case(conv(3, 3, 4, 8, padding=((2, 2),) * 2, dilation=(2, 2)), "CONV_2D"),
    "conv grouped": Case(conv(3, 3, 2, 8, padding=ONES, groups=2), "CONV_2D"),
    "depthwise": Case(
        conv(3, 3, 1, 4, padding=((0, 1),) * 2, strides=(2, 2), groups=4), "DEPTHWISE_CONV_2D"
    ),
    "depthwise twice as wide": Case(conv(3, 3, 1, 8, padding=ONES, groups=4), "DEPTHWISE_CONV_2D"),
    "dense": Case(one(p.Dense, "d", weights(6, 10)), "FULLY_CONNECTED", ((6,),)),
    "dense relu": Case(one(p.Dense, "d", weights(6, 10), RELU), "FULLY_CONNECTED", ((6,),), made=B),
    "matmul": Case(two(p.MatMul), IN_FLOATS, ((4, 6), (6, 5)), most=1),
    "matmul of heads": Case(two(p.MatMul), IN_FLOATS, ((2, 4, 6), (2, 6, 5)), most=1),
    # 31 and 23 of 40: many sums lie halfway between two integers.
    "add": Case(two(p.Add), "ADD", (IMAGE,) * 2, (Encoding(0.031, 120), Encoding(0.023)), SUM, 1),
    "add relu": Case(two(p.Add, RELU), "ADD", (IMAGE,) * 2, made=Encoding(0.04), most=1),
    "add of a row": Case(two(p.Add), "ADD", (IMAGE, (1, 8, 1)), made=SUM, most=1),
    "less": Case(two(p.Add, minus=True), "SUB", ((1, 8, 1), IMAGE), made=SUM, most=1),
    "less, clipped": Case(
        two(p.Add, (-1.0, 6.0), True), "SUB MAXIMUM MINIMUM", (IMAGE,) * 2,
        made=Encoding(0.08, 100), most=1,
    ),
    "multiply": Case(two(p.Multiply), "MUL", (IMAGE,) * 2),
    "squeeze-excite": Case(two(p.Multiply), "MUL", (IMAGE, (1, 1, 4))),
    "outer": Case(two(p.Multiply), "MUL", ((5, 1), (1, 7))),
    "maximum": Case(two(p.Maximum), "MUL MUL MAXIMUM", (IMAGE, (8, 1, 4)), made=SUM),
    "minimum": Case(two(p.Minimum), "MUL MUL MINIMUM", (IMAGE,) * 2, made=SUM),
    "clip": Case(one(p.Clip, -0.5, 0.5), "MAXIMUM MINIMUM", made=A),
    "clip to its own": Case(one(p.Clip, -1.0, 1.0), "MUL", made=Encoding(2 / 255, 128)),
    "relu": Case(one(p.Clip, *RELU), "RELU", made=A),
    "relu to its own": Case(one(p.Clip, *RELU), "MUL", made=B),
    "sigmoid": Case(function(Step("logistic", (0,))), "LOGISTIC", made=SIGMOID),
    "sigmoid in another range": Case(
        function(Step("logistic", (0,))), "DEQUANTIZE LOGISTIC QUANTIZE", made=Encoding(0.003),
    ),
    "tanh": Case(function(Step("tanh", (0,))), "TANH", made=TANH),
    "a function": Case(function(Step("exp", (0,))), "DEQUANTIZE EXP QUANTIZE", most=1),
    "a choice": Case(
        function(Step("gt", (0, 1)), Step("select_n", (2, 1, 0)), constants=(np.float32(0.5),)),
        "DEQUANTIZE GREATER SELECT_V2 QUANTIZE", most=1,
    ),
    "a function of each channel": Case(
        function(Step("mul", (0, 1)), Step("max", (0, 2)), constants=(TIMES,)),
        "DEQUANTIZE MUL MAXIMUM QUANTIZE", most=1,
    ),
    "a jump": Case(function(Step("floor", (0,))), SHIFTED),
    "a jump of each channel": Case(
        function(Step("mul", (0, 1)), Step("floor", (2,)), constants=(TIMES,)),
        "DEQUANTIZE MUL ADD CAST GATHER_ND",
    ),
    "mean": Case(one(p.Mean), "MEAN"),
    "mean of rows": Case(one(p.Mean, (1,)), "MEAN"),
    "mean of channels": Case(one(p.Mean, (2,)), "MEAN"),
    "mean of all": Case(one(p.Mean, (0, 1, 2)), "MEAN"),
    "mean of a sequence": Case(one(p.Mean, (0,)), "MEAN", (SEQUENCE,)),
    "mean 4 bits": Case(one(p.Mean), "MEAN", given=(B,), made=B4),
    "largest": Case(one(p.Largest, (0, 1)), "REDUCE_MAX"),
    "largest of channels": Case(one(p.Largest, (2,)), "REDUCE_MAX"),
    "max pool": Case(one(p.MaxPool, (2, 2), (2, 2)), "MAX_POOL_2D"),
    "max pool same": Case(one(p.MaxPool, (3, 3), (1, 1), ONES), "MAX_POOL_2D"),
    "max pool padded": Case(one(p.MaxPool, (3, 3), (2, 2), ONES), "PADV2 MAX_POOL_2D"),
    "max pool of a relu": Case(
        one(p.MaxPool, (3, 3), (2, 2), ONES), "PAD MAX_POOL_2D", given=(B,), made=B
    ),
    "average pool": Case(one(p.AveragePool, (2, 2), (2, 2)), "DEPTHWISE_CONV_2D"),
    "average pool padded": Case(one(p.AveragePool, (3, 3), (2, 2), ONES), "PAD DEPTHWISE_CONV_2D"),
    "average pool of what there is": Case(
        one(p.AveragePool, (3, 3), (2, 2), ONES, False),
        "DEQUANTIZE PAD DEPTHWISE_CONV_2D MUL QUANTIZE", most=1,
    ),
    "concatenate": Case(two(p.Concatenate, 2), "MUL CONCATENATION", (IMAGE,) * 2, made=A),
    "concatenate rows": Case(two(p.Concatenate, 0), "MUL MUL CONCATENATION", (SEQUENCE, (2, 6))),
    "reshape": Case(one(p.Reshape, (256,)), ""),
    "reshape to one more": Case(one(p.Reshape, (2, 4, 8, 2, 2, 1)), ""),
    "transpose": Case(one(p.Transpose, (2, 0, 1)), "TRANSPOSE"),
    "transpose of six": Case(
        one(p.Transpose, (4, 2, 0, 5, 1, 3)), "TRANSPOSE", (SIX,)
    ),
    "broadcast": Case(one(p.Broadcast, (5, 4, 6)), "TILE", ((1, 4, 1),)),
    "pad": Case(one(p.Pad, ((1, 0), (0, 2), (1, 1))), "PAD"),
    "pad with a value": Case(one(p.Pad, ((1, 0), (0, 2), (1, 1)), 1.5), "PADV2"),
    "pad with a value out of range": Case(one(p.Pad, ((2, 1),), -99.0), "PADV2", ((5,),)),
    "slice": Case(one(p.Slice, (0, 1, 0), (8, 8, 3), (1,) * 3), "STRIDED_SLICE"),
    "slice with strides": Case(
        one(p.Slice, (0, 1, 0), (8, 8, 4), (2, 2, 1)), "STRIDED_SLICE"
    ),
    # Rows 1 and 5, columns 3, 5 and 7, channels 1 and 2.
    "slice with strides of a part": Case(
        one(p.Slice, (1, 3, 1), (6, 8, 3), (4, 2, 1)), "STRIDED_SLICE"
    ),
    "slice with strides of channels": Case(
        one(p.Slice, (0, 0, 1), (8, 7, 4), (1, 3, 2)), "STRIDED_SLICE"
    ),
    "slice of six": Case(
        one(p.Slice, (0, 1, 0, 0, 1, 0), (2, 3, 1, 2, 3, 1), (1,) * 6),
        "STRIDED_SLICE",
        (SIX,),
    ),
    "gather": Case(one(p.Gather, 1, (0, 0, 7, 3, 3)), "TRANSPOSE GATHER_ND TRANSPOSE"),
    "gather rows": Case(one(p.Gather, 0, (3, 0)), "TRANSPOSE GATHER_ND TRANSPOSE", (SEQUENCE,)),
    "convert": Case(one(p.Convert), "MUL", made=B),
    "convert to 4 bits": Case(one(p.Convert), "MUL", given=(B,), made=B4),
    "convert to the same": Case(one(p.Convert), "", made=A),
    "softmax": Case(one(p.Softmax), "", ((6,),)),
    "softmax of rows": Case(one(p.Softmax, 0), ""),
    "normalize": Case(one(p.Normalize, (0, 1), 1e-5), ""),
    "normalize a sequence": Case(one(p.Normalize, (1,), 1e-5), "", (SEQUENCE,)),
    # More axes than LiteRT's kernels have.
    "add of six": Case(two(p.Add), "ADD", (SIX, (2, 1, 1, 2, 3, 2)), made=SUM, most=1),
    "clip of six": Case(one(p.Clip, -0.5, 0.5), "MAXIMUM MINIMUM", (SIX,), made=A),
    "mean of six": Case(one(p.Mean, (1, 4)), "MEAN", (SIX,)),
    "largest of six": Case(one(p.Largest, (1, 2)), "REDUCE_MAX", (SIX,)),
    "pad of six": Case(
        one(p.Pad, ((0, 0), (1, 2), *[(0, 0)] * 4)), "PAD", (SIX,)
    ),
    "concatenate six": Case(two(p.Concatenate, 3), "MUL CONCATENATION",
                            (SIX, SIX), made=A),
    "matmul of six": Case(
        two(p.MatMul),
        IN_FLOATS,
        (SIX, (2, 3, 1, 2, 2, 4)), most=1,
    ),
    "softmax of six": Case(one(p.Softmax, 2), "", (SIX,)),
    "normalize six": Case(one(p.Normalize, (1, 4), 1e-5), "", (SIX,)),
}  # fmt: skip
INTEGERS = [name for name, case in CASES.items() if case.op.integral]


def alone(case, integers):
    """The operation between conversions of its inputs and of its result: all names, and no more."""
    op, names = case.op, ("a", "c")[: len(case.shapes)]
    if not integers and hasattr(op, "weights"):
        op = dataclasses.replace(op, weights=in_floats(op.weights))
    shape = jax.eval_shape(op.floats, *(jnp.zeros((1, *s)) for s in case.shapes)).shape[1:]
    ends = tuple(f"in {name}" for name in names)
    encodings = case.given if integers else (None, None)
    tensors = {end: Tensor(s) for end, s in zip(ends, case.shapes, strict=True)}
    tensors |= {n: Tensor(s, e) for n, s, e in zip(names, case.shapes, encodings)}
    tensors |= {"b": Tensor(shape, fitting(case) if integers else None), "y": Tensor(shape)}
    into = [p.Convert((end,), name) for end, name in zip(ends, names, strict=True)]
    return Program(ends, "y", tensors, (*into, op, p.Convert(("b",), "y")))


def fitting(case):
    """The encoding of the result: that stated, the input's, or one for the values that it takes."""
    if case.made or case.op.same_encoding:
        return case.made or case.given[0]
    y = np.asarray(case.op.floats(*inputs(case, 64)))
    low, high = min(y.min(), 0.0), max(y.max(), 0.0)
    scale = np.float32((high - low) / 255)
    return Encoding(float(scale), round(float(-low / scale)))


def inputs(case, batch=4):
    return [images(batch, shape, seed) for seed, shape in enumerate(case.shapes)]


def operations(data):
    """Names of the file's operations, in running order."""
    return [d["op_name"] for d in litert.interpret(data)._get_ops_details()]


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_those_of_the_program_at_any_batch(name):
    case = CASES[name]
    program = alone(case, integers=True)
    data = litert.to_litert(program)
    heads = ["QUANTIZE"] * len(case.shapes)
    xs, step = inputs(case), program.encoding("b").scale
    want = np.asarray(jax.jit(p.run(program))(*xs))
    assert len(np.unique(want)) > 2  # it is no constant
    for batch in (1, 3, 4):
        got = litert.litert_session(data, batch)(*(x[:batch] for x in xs))
        assert got.shape == want[:batch].shape
        assert np.abs(np.rint((got - want[:batch]) / step)).max() <= case.most
    made = [name for name in operations(data) if name != "RESHAPE"]
    assert sorted(made) == sorted([*heads, *case.kernels.split(), "DEQUANTIZE"])


@pytest.mark.parametrize("name", CASES)
def test_floats_are_those_of_the_program_at_any_batch(name):
    program, xs = alone(CASES[name], integers=False), inputs(CASES[name])
    data = litert.to_litert(program)
    assert "QUANTIZE" not in operations(data)
    want = np.asarray(jax.jit(p.run(program))(*xs))
    for batch in (1, 3, 4):
        got = litert.litert_session(data, batch)(*(x[:batch] for x in xs))
        np.testing.assert_allclose(got, want[:batch], atol=1e-5 * np.abs(want).max())


def test_every_operation_has_a_rule_and_a_case():
    ours = {type(case.op) for case in CASES.values()} | {p.Constant, p.Call}
    operations = {kind for kind in map(p.__dict__.get, dir(p)) if isinstance(kind, type)}
    operations = {kind for kind in operations if issubclass(kind, p.Operation)} - {p.Operation}
    assert operations == set(litert_operations.RULES) == ours


def test_functions_write_every_step():
    assert set(litert_functions.STEPS) == set(FUNCTIONS)


OPTIONS = {
    "integer_pow": [{"y": 3}],
    "round": [{"rounding_method": way} for way in ("AWAY_FROM_ZERO", "TO_NEAREST_EVEN")],
    "convert_element_type": [
        {"new_dtype": to} for to in ("int32", "int8", "uint8", "bool", "float32")
    ],
}
ABOVE_0, WITHIN_1 = ("log", "log1p", "sqrt", "rsqrt", "pow"), ("asin", "acos", "atanh", "tan")
OF_TWO = ("atan2", "pow", "add", "sub", "mul", "div", "rem", "max", "min")
COMPARED, LOGICAL = ("eq", "ne", "lt", "le", "gt", "ge"), ("and", "or", "xor", "not")


def steps_of(name, options):
    """Steps of a function of two inputs that ends in the named one, on bools if it needs them."""
    options = tuple(options.items())
    if name in LOGICAL:
        first = [Step("gt", (0, 1)), Step("lt", (0, 2))]
        return [*first, Step(name, (3,) if name == "not" else (3, 4))]
    if name == "select_n":
        return [Step("gt", (0, 2)), Step(name, (3, 0, 1))]
    if name == "clamp":
        return [Step(name, (2, 0, 1))]
    return [Step(name, (0, 1) if name in OF_TWO + COMPARED else (0,), options)]


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_steps_in_floats_are_those_of_jax(name):
    x, y = images(5, (7,)), images(5, (7,), seed=2)
    x = np.abs(x) + 0.01 if name in ABOVE_0 else x / 10 if name in WITHIN_1 else x
    x = 1 + np.abs(x) if name == "acosh" else np.rint(x) if name in COMPARED else x
    y = np.rint(y) if name in COMPARED else y
    for options in OPTIONS.get(name, [{}]):
        op = p.Function(("x", "y"), "z", tuple(steps_of(name, options)), (np.float32(0.5),))
        tensors = dict.fromkeys("xyz", Tensor((7,)))
        program = Program(("x", "y"), "z", tensors, (op,))
        want = np.asarray(p.run(program)(x, y))
        got = litert.litert_session(litert.to_litert(program))(x, y)
        assert np.abs(got - want).max() <= 2e-6 * max(np.abs(want).max(), 1)


def test_a_constant_stands_before_every_example():
    # As the class token and the positions of a transformer do.
    def fn(params, x):
        token = jnp.broadcast_to(params["token"], (len(x), 1, 4))
        rows = jnp.concatenate([x, token, x[:, :1]], 1) + params["place"]
        return jax.nn.relu(rows * params["scale"]) @ params["out"]

    rng = np.random.default_rng(0)
    sizes = {"token": (1, 1, 4), "place": (1, 7, 4), "scale": (1, 7, 1), "out": (4, 3)}
    params = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    for program in both(fn, params, images(16, (5, 4))):
        agrees(program, images(4, (5, 4)))


def both(fn, params, *xs):
    """The programs of a function in floats and in integers."""
    spec = quantization.spec(core.trace(fn, params, *xs))
    ranges = quantization.calibrate(fn, params, [xs], spec)
    program = p.lower(fn, params, *xs)
    return program, quantization.encode(program, spec, ranges, *xs)


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
    for program in both(fn, params, image, images(16, (3,))):
        data = agrees(program, image[:4], images(4, (3,)))
        signature = litert.interpret(data).get_signature_list()["serving_default"]
        assert signature["inputs"] == ["x0", "x1"]
        assert len(signature["outputs"]) == 6
    session = litert.litert_session(data)
    with pytest.raises(ValueError, match="x0 must be of dtype uint8, got float32"):
        session(np.float32(image), images(16, (3,)))
    with pytest.raises(ValueError, match="inputs must be 2 arrays, got 1"):
        session(image[:1])
    with pytest.raises(ValueError, match=r"x1 must have shape \(1, 3\)"):
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
    floats, integers = both(fn, params, image)
    assert operations(agrees(floats, image[:4]))[:2] == ["CAST", "CONV_2D"]
    data = agrees(integers, image[:4])
    assert operations(data)[:2] == ["QUANTIZE", "CONV_2D"]
    (x,) = litert.interpret(data).get_input_details()
    assert (x["dtype"], x["quantization"]) == (np.uint8, (1.0, 0))


def test_the_file_says_that_its_batch_is_open():
    interpreter = litert.interpret(litert.to_litert(alone(CASES["conv"], True)))
    (x,) = interpreter.get_input_details()
    assert x["shape_signature"].tolist() == [-1, 8, 8, 4]
    interpreter.resize_tensor_input(x["index"], [3, 8, 8, 4], strict=True)
    interpreter.allocate_tensors()
    assert interpreter.get_output_details()[0]["shape"].tolist() == [3, 8, 8, 8]


def test_refuses_what_LiteRT_has_not():
    x, params = images(4, (3,)), {"a": np.ones((1, 3), np.float32)}
    program = p.lower(lambda params, x: jnp.cumsum(x * params["a"], 1), params, x)
    with pytest.raises(ValueError, match=r"of operations that LiteRT has, got .*cumsum.*write it"):
        litert.to_litert(program)

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
        ValueError, match=r"got Clip of a to b: tfl\.mul holds the number of examples"
    ):
        litert.to_litert(alone(CASES["clip"], False))


@pytest.mark.parametrize("name", ["slice", "slice with strides", "slice with strides of a part"])
def test_xnnpack_runs_slices(name):
    interpreter = litert.interpret(litert.to_litert(alone(CASES[name], True)))
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
    inner = ["MUL", "CONV_2D", "RESHAPE", "STRIDED_SLICE", "RESHAPE", "ADD"]
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


@settings(max_examples=15, deadline=None)
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


def mixture(gate_encoding=A):
    gate = chain(
        quantized(gate_encoding),
        (p.Mean(("a",), "m"), Tensor((4,), gate_encoding and Encoding(0.011, 128))),
        (
            p.Dense(("m",), "y", "gate", weights(4, 3) if gate_encoding else GATE),
            Tensor((3,)),
        ),
    )
    return p.Mixture(gate, tuple(map(expert, range(3))))


GATE = Weights(np.float32(np.eye(4, 3)), None, np.zeros(3, np.float32))


def test_a_mixture_runs_one_expert():
    program = mixture(None)
    data = litert.to_litert(program)
    x = images(12)
    x += 2 * np.eye(4, dtype=np.float32)[np.arange(12) % 3, None, None]
    chosen = np.argmax(np.asarray(p.run(program.gate)(x)), -1)
    assert set(chosen) == {0, 1, 2}
    want = np.asarray(p.run(program)(x))
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
    want = np.asarray(p.run(program)(images()))
    got = litert.litert_session(litert.to_litert(program))(images())
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.fixture(scope="module")
def trained(digits):
    """The digits' network in floats, in 8 and in 4 bits."""
    x = digits.images[:256]
    graph = core.trace(digits.fn, digits.params, x[:1])
    programs = [p.lower(digits.fn, digits.params, x[:1])]
    for bits in (8, 4):
        spec = quantization.spec(graph, weight_bits=bits, activation_bits=bits)
        ranges = quantization.calibrate(digits.fn, digits.params, [(x,)], spec, method="mse")
        programs.append(in_integers(digits.fn, digits.params, spec, ranges, x))
    return programs


def test_a_trained_network_on_real_images(digits, trained):
    x = np.asarray(digits.held_out_images)
    for program, atol in zip(trained, (1e-4, 0.05, 0.05)):
        want = np.asarray(jax.jit(p.run(program))(x))
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
    def refused(at, a, c):
        return jnp.fft.fft(a).real + c

    monkeypatch.setitem(litert_operations.RULES, p.Add, refused)
    program = alone(CASES["add"], False)
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
