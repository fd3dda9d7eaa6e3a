"""Every operation as C, compiled and run, against what it is: in integers to the bit."""

import dataclasses
import math

import numpy as np
import pytest
from built import EXP, PRELU, RELU, RELU6, SLOPES, TANH, Build, Q, floats
from compiled import COMPILERS, SANITIZED, assert_same, expected, inputs, run_c

from hybrid_jax import program as p
from hybrid_jax.deploy import c, c_statements
from hybrid_jax.program import (
    UNBOUNDED,
    Add,
    AveragePool,
    Broadcast,
    Call,
    Clip,
    Concatenate,
    Constant,
    Convert,
    Encoding,
    Function,
    Gather,
    Largest,
    MatMul,
    Maximum,
    MaxPool,
    Mean,
    Minimum,
    Multiply,
    Normalize,
    Pad,
    Program,
    Reshape,
    Slice,
    Softmax,
    Step,
    Tensor,
    Transpose,
    functions,
)

pytestmark = pytest.mark.skipif(not COMPILERS, reason="no C compiler")

FINE = Encoding(0.03, 90)


def residual():
    b = Build((6, 5, 4)).conv(6, clip=RELU, to=Encoding(0.03))
    a = b.last
    b.conv(6, to=Encoding(0.07, 100)).add(Add, b.shape, Q, RELU, inputs=(b.last, a))
    return b.add(Mean, (6,), Encoding(0.02, 9)).dense(10)


def squeeze_and_excite():
    b = Build((4, 3, 5))
    x = b.last
    b.add(Mean, (5,), Q).dense(5, to=Q)
    b.add(Function, (5,), Encoding(1 / 255), (Step("logistic", (0,)),))
    b.add(Reshape, (1, 1, 5), b.encoding, (1, 1, 5))
    return b.add(Multiply, (4, 3, 5), Encoding(0.04, 120), inputs=(x, b.last))


def concatenation(axis):
    b = Build((3, 4, 2))
    x = b.last
    b.add(Convert, b.shape, Encoding(0.08, 60))
    shape = list(b.shape)
    shape[axis] *= 3
    return b.add(Concatenate, shape, Q, axis, inputs=(x, b.last, x))


def pair(kind, *fields, shapes=((4, 5, 3), (4, 5, 3)), to=Q):
    """Two tensors of these shapes, of one that is at least as large, in encodings of their own."""

    def build():
        whole = tuple(map(max, *shapes))
        b, made = Build(whole), []
        first = b.last
        for shape, encoding in zip(shapes, (Q, FINE), strict=True):
            b.last = first
            b.add(Slice, shape, Q, (0,) * len(shape), shape, (1,) * len(shape))
            made.append(b.add(Convert, shape, encoding).last)
            b.last = first
            # The second is another one.
            first = b.add(Gather, whole, Q, 2, tuple(reversed(range(whole[2])))).last
        return b.add(kind, whole, to, *fields, inputs=tuple(made))

    return build


def shuffle():
    b = Build((2, 3, 6)).add(Reshape, (2, 3, 2, 3), Q, (2, 3, 2, 3))
    b.add(Transpose, (2, 3, 3, 2), Q, (0, 1, 3, 2))
    return b.add(Reshape, (2, 3, 6), Q, (2, 3, 6))


def same(kind, *fields, shape=None, to=Q, start=(4, 5, 3)):
    def build():
        b = Build(start)
        return b.add(kind, b.shape if shape is None else shape, to, *fields)

    return build


def after(kind, *fields, start=(4, 5, 3)):
    """An operation of floats, between conversions."""
    return lambda: Build(start).add(Convert, start, None).add(kind, start, None, *fields)


def conv(*args, shape=(6, 7, 4), **options):
    return lambda: Build(shape).conv(*args, **options)


def pool(kind, *args, uncounted=False, **options):
    def build():
        # 18 channels: more than one block of them.
        b = Build((6, 7, 18)).pool(kind, *args, **options)
        if uncounted:
            b.operations[-1] = dataclasses.replace(b.operations[-1], count_padding=False)
        return b

    return build


def constant(value):
    def build():
        b = Build((4, 5, 3))
        x = b.last
        b.add(Constant, value.shape, FINE, value, inputs=())
        return b.add(Add, (4, 5, 3), Q, inputs=(x, b.last))

    return build


def product(a, b_axes, out):
    """Of two tensors made of one: as it is, and with its last axes exchanged."""

    def build():
        b = Build(a)
        b.add(Convert, a, Encoding(0.02, 100))
        left = b.last
        b.add(Transpose, [a[axis] for axis in b_axes], b.encoding, b_axes)
        return b.add(MatMul, out, Encoding(0.1, 90), inputs=(left, b.last))

    return build


def flattened_input():
    tensors = {"x": Tensor((2, 3)), "f": Tensor((6,)), "q": Tensor((6,), Q), "y": Tensor((6,))}
    steps = (Reshape(("x",), "f", (6,)), Convert(("f",), "q"), Convert(("q",), "y"))
    return Program("x", "y", tensors, steps)


def two_floats():
    """x where it is above y = tanh(x), else y."""
    b = Build((2, 5))
    x = b.last
    y = b.add(Function, b.shape, Q, TANH).last
    names = []
    for name in (x, y):
        b.last = name
        names.append(b.add(Convert, b.shape, None).last)
    steps = (Step("gt", (0, 1)), Step("select_n", (2, 1, 0)))
    return b.add(Function, b.shape, None, steps, inputs=tuple(names))


POSITIONS = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
BOTH_SIDES = ((4, 1, 3), (1, 5, 3))
CASES = {
    "conv": conv(5),
    "conv_relu": conv(5, clip=RELU, to=Encoding(0.02)),
    "conv_relu6": conv(5, clip=RELU6, to=Encoding(0.05, 20)),
    "conv_4_bit_outputs": conv(5, to=Encoding(0.3, 8, 0, 15)),
    "conv_strides": conv(5, (3, 2), (2, 3)),
    "conv_same_even": conv(3, (3, 3), (2, 2), ((0, 1), (1, 0))),
    "conv_wide_padding": conv(3, (2, 3), (1, 2), ((5, 4), (3, 6))),
    "conv_crop": conv(3, (2, 2), (1, 1), ((-1, 2), (0, -2))),
    "conv_dilation": conv(5, (3, 3), dilation=(2, 3), padding=((2, 2), (3, 3))),
    "conv_groups": conv(6, groups=2),
    "conv_float": conv(3, to=None, clip=RELU6),
    "pointwise": conv(9, (1, 1), padding=((0, 0), (0, 0))),
    "depthwise": conv(4, groups=4, clip=RELU6),
    "depthwise_strides": conv(20, groups=20, strides=(2, 2), shape=(5, 4, 20)),
    "depthwise_dilation": conv(4, groups=4, dilation=(2, 1)),
    "depthwise_twice": conv(8, groups=4),
    "depthwise_float": conv(4, groups=4, to=None),
    "one_channel": conv(1, shape=(6, 7, 1)),
    "residual": residual,
    "sum_of_one": lambda: (b := Build((3, 4, 2))).add(
        Add, b.shape, Encoding(0.1, 128), inputs=(b.last, b.last)
    ),
    "difference": pair(Add, RELU, True),
    "add_each_channel": pair(Add, shapes=((4, 5, 3), (1, 1, 3))),
    "add_both_sides": pair(Add, UNBOUNDED, True, shapes=BOTH_SIDES),
    "squeeze_and_excite": squeeze_and_excite,
    "multiply_float": lambda: Build((2, 3)).add(Multiply, (2, 3), None, inputs=("t1", "t1")),
    "multiply_both_sides": pair(Multiply, RELU6, shapes=BOTH_SIDES[::-1]),
    "multiply_each_place": pair(Multiply, shapes=((4, 5, 1), (4, 5, 3))),
    "maximum": pair(Maximum, to=Encoding(0.02, 90)),
    "maximum_both_sides": pair(Maximum, shapes=BOTH_SIDES),
    "minimum": pair(Minimum, shapes=((1, 5, 3), (4, 5, 3))),
    "clip": same(Clip, -1.0, 2.02),
    "clip_to_another": same(Clip, -1.0, 2.02, to=Encoding(0.012, 80)),
    "max_pool": pool(MaxPool, (2, 3), (2, 2)),
    "max_pool_padding": pool(MaxPool, (3, 3), (2, 2), ((1, 1), (3, 3))),
    "average_pool": pool(AveragePool, (2, 2), (2, 2), to=Encoding(0.04, 9)),
    "average_pool_padding": pool(AveragePool, (3, 3), (2, 1), ((1, 2), (0, 1))),
    "average_pool_uncounted": pool(AveragePool, (3, 2), (2, 1), ((2, 1), (1, 1)), uncounted=True),
    "mean": same(Mean, shape=(3,), to=Encoding(0.01, 128)),
    "mean_float": same(Mean, shape=(3,), to=None),
    "mean_columns": same(Mean, (1,), shape=(4, 3), to=Encoding(0.03, 128)),
    "mean_apart": same(Mean, (0, 2), shape=(5,), to=Encoding(0.03, 128)),
    "mean_all": same(Mean, (0, 1, 2), shape=(), to=Encoding(0.02, 128)),
    "largest": same(Largest, (0, 2), shape=(5,)),
    "largest_channel": same(Largest, (2,), shape=(4, 5)),
    "concatenate_0": lambda: concatenation(0),
    "concatenate_1": lambda: concatenation(1),
    "concatenate_2": lambda: concatenation(2),
    "shuffle": shuffle,
    "transpose": same(Transpose, (2, 0, 1), shape=(3, 4, 5)),
    "transpose_4": same(Transpose, (3, 1, 0, 2), shape=(5, 3, 2, 4), start=(2, 3, 4, 5)),
    "transpose_2": same(Transpose, (1, 0), shape=(3, 4), start=(4, 3)),
    "broadcast": same(Broadcast, (4, 5, 3), shape=(4, 5, 3), start=(4, 1, 3)),
    "pad": same(Pad, ((1, 2), (0, 3), (2, 0)), shape=(7, 8, 5)),
    "pad_negative": same(Pad, ((-1, 2), (1, -2), (0, 0)), shape=(5, 4, 3)),
    "pad_value": same(Pad, ((1, 0), (0, 0), (0, 2)), -1.27, shape=(5, 5, 5)),
    "slice": same(Slice, (1, 0, 1), (4, 5, 3), (2, 3, 1), shape=(2, 2, 2)),
    "gather": same(Gather, 1, (4, 0, 0, 3, 1, 2, 2), shape=(4, 7, 3)),
    "gather_reversed": same(Gather, 0, (3, 2, 1, 0)),
    "gather_first": same(Gather, 2, (2, 0, 1)),
    "gather_one": same(Gather, 2, (1,), shape=(4, 5, 1)),
    "logistic": same(Function, (Step("logistic", (0,)),), to=Encoding(1 / 256)),
    "tanh": same(Function, TANH, to=Encoding(1 / 128, 128)),
    "exp": same(Function, EXP, to=Encoding(0.1)),
    "prelu": same(Function, PRELU, SLOPES, to=Encoding(0.04, 128)),
    "function_of_two": two_floats,
    "constant": constant(POSITIONS),
    "constant_each_channel": constant(POSITIONS[:1, :1]),
    "matmul": product((4, 6), (1, 0), (4, 4)),
    "matmul_heads": product((2, 5, 3), (0, 2, 1), (2, 5, 5)),
    "softmax": after(Softmax),
    "softmax_rows": after(Softmax, 0),
    "softmax_columns": after(Softmax, 1),
    "normalize": after(Normalize, (2,), 1e-3),
    "normalize_places": after(Normalize, (0, 1), 1e-5),
    "normalize_all": after(Normalize, (0, 1, 2), 1e-5, start=(2, 3, 4)),
    "convert": same(Convert, to=Encoding(0.1, 3, 1, 60)),
    "convert_same": same(Convert),
    "flatten_dense": lambda: Build((3, 2, 4)).add(Reshape, (24,), Q, (24,)).dense(7, clip=RELU),
    "flatten_input": flattened_input,
}  # fmt: skip


def programs():
    built = {name: case() for name, case in CASES.items()}
    return {name: b.program() if isinstance(b, Build) else b for name, b in built.items()}


def test_every_operation_has_a_rule_and_a_case():
    public = (getattr(p, name) for name in dir(p))
    kinds = {kind for kind in public if isinstance(kind, type) and issubclass(kind, p.Operation)}
    assert set(c_statements.RULES) == kinds - {p.Operation}
    shown = {type(op) for program in programs().values() for op in program.operations}
    assert shown == set(c_statements.RULES) - {Call}


@pytest.fixture(scope="module")
def cases():
    """{name: (program, inputs, outputs of the reference)}, in integers and in floats."""
    found = {}
    for name, program in programs().items():
        xs = inputs(program)
        found[name] = program, xs, expected(program, xs)
        program = floats(program)
        xs = inputs(program, finite=True)
        found[f"{name}_in_floats"] = program, xs, expected(program, xs)
    return found


FAST = ["-O3", "-march=native", "-ffp-contract=fast"]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("flags", [FAST, SANITIZED], ids=["fast", "sanitized"])
def test_every_operation_gives_what_the_reference_gives(cases, tmp_path, flags, compiler):
    got = run_c(tmp_path, {name: case[:2] for name, case in cases.items()}, flags, compiler)
    for name, (program, _, want) in cases.items():
        assert len(np.unique(want[0])) > 2, f"{name} is constant: it shows nothing"
        assert_same(got[name], want, program, name)


BINARY = ("add", "sub", "mul", "div", "rem", "max", "min", "eq", "ne", "lt", "le", "gt", "ge")
BOOLEAN = ("and", "or", "xor")
VALUES = np.append(np.linspace(-3, 3, 41), [math.inf, -math.inf]).astype(np.float32)
NUMBER, WHOLE = VALUES[28], np.int32(2)


def function_steps():
    """{name: (steps, constants)} of every row of FUNCTIONS in floats, and in integers."""
    to_int = Step("convert_element_type", (0,), (("new_dtype", "int32"),))
    found = {}
    for name in functions.FUNCTIONS:
        if name in BINARY:
            found[name] = (Step(name, (0, 1)),), (NUMBER,)
            found[f"int_{name}"] = (Step("mul", (0, 2)), to_int._replace(operands=(3,)),
                                    Step(name, (4, 1))), (WHOLE, NUMBER)  # fmt: skip
        elif name in BOOLEAN:
            steps = Step("gt", (0, 1)), Step("gt", (0, 2)), Step(name, (3, 4))
            found[name] = steps, (np.float32(-1), NUMBER)
        elif name not in SPECIAL:
            found[name] = (Step(name, (0,)),), ()
    return found | SPECIAL


ROUND, TYPE = "rounding_method", "new_dtype"
SPECIAL = {
    "clamp": ((Step("clamp", (1, 0, 2)),), (np.float32(-0.5), NUMBER)),
    "atan2": ((Step("atan2", (0, 1)),), (NUMBER,)),
    "pow": ((Step("pow", (1, 0)),), (NUMBER,)),
    "integer_pow": ((Step("integer_pow", (0,), (("y", 3),)),), ()),
    "integer_pow_below": ((Step("integer_pow", (0,), (("y", -2),)),), ()),
    "round": ((Step("round", (0,), ((ROUND, "TO_NEAREST_EVEN"),)),), ()),
    "round_away": ((Step("round", (0,), ((ROUND, "AWAY_FROM_ZERO"),)),), ()),
    "not": ((Step("gt", (0, 1)), Step("not", (2,))), (NUMBER,)),
    "int_not": ((Step("convert_element_type", (0,), ((TYPE, "int32"),)), Step("not", (1,))), ()),
    "select_n": ((Step("gt", (0, 1)), Step("select_n", (2, 0, 1))), (NUMBER,)),
    "choose": (
        (Step("convert_element_type", (0,), ((TYPE, "int32"),)), Step("select_n", (3, 0, 1, 2))),
        (NUMBER, np.float32(7)),
    ),
    "convert_element_type": ((Step("convert_element_type", (0,), ((TYPE, "uint8"),)),), ()),
    "to_bool": (
        (Step("floor", (0,)), Step("convert_element_type", (1,), ((TYPE, "bool"),))), (),
    ),
    "int_square": ((Step("convert_element_type", (0,), ((TYPE, "int32"),)),
                    Step("integer_pow", (1,), (("y", 2),)), Step("neg", (2,)),
                    Step("abs", (3,)), Step("sub", (4, 1))), ()),
}  # fmt: skip


def test_every_function_is_written_step_by_step(tmp_path):
    steps = function_steps()
    assert set(functions.FUNCTIONS) <= set(steps)
    tensors = {name: Tensor(VALUES.shape) for name in "xy"}
    given = {}
    for name, (own, constants) in steps.items():
        program = Program("x", "y", tensors, (Function(("x",), "y", own, constants),))
        given[f"f_{name}"] = program, (VALUES[None],)
    got = run_c(tmp_path, given, SANITIZED)
    for name, (program, xs) in given.items():
        want = expected(program, xs)
        assert len(np.unique(want[0])) > 1, f"{name} shows nothing"
        np.testing.assert_array_equal(np.isnan(got[name][0]), np.isnan(want[0]), name)
        assert_same(got[name], want, program, name)


def test_a_step_that_c_has_not_is_named():
    half = Step("convert_element_type", (0,), (("new_dtype", "bfloat16"),))
    tensors = {"x": Tensor((2,)), "y": Tensor((2,))}
    with pytest.raises(ValueError, match="function 'y' must be in float32 or integers in C, got b"):
        c.to_c(Program("x", "y", tensors, (Function(("x",), "y", (half,)),)))
    steps = Step("convert_element_type", (0,), (("new_dtype", "int32"),)), Step("pow", (1, 1))
    with pytest.raises(ValueError, match="function 'y' must be of steps that C has, got 'pow'"):
        c.to_c(Program("x", "y", tensors, (Function(("x",), "y", steps),)))


def stored(*steps, **shapes):
    """A program of float32 tensors but for those whose name begins with q."""
    tensors = {n: Tensor(shape, Q if n[0] == "q" else None) for n, shape in shapes.items()}
    names = list(shapes)
    return Program(names[0], names[-1], tensors, steps)


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        (Add(("q", "q"), "y"), "all floats or all encoded"),
        (Add(("q", "x"), "qy"), "all floats or all encoded"),
        (Clip(("x",), "qy", 0.0, 1.0), "all floats or all encoded"),
        (Softmax(("q",), "y"), "floats, as what it reads must be"),
        (Largest(("q",), "qother", ()), "encoded as 'q'"),
    ],
)
def test_edges_that_are_stored_in_part_are_refused(step, wanted):
    program = stored(Convert(("x",), "q"), step, x=(2,), q=(2,), **{step.output: (2,)})
    other = {"qother": Tensor((2,), Encoding(1.0))} if step.output == "qother" else {}
    program = dataclasses.replace(program, tensors=program.tensors | other)
    with pytest.raises(ValueError, match=f"tensor '{step.output}' .* must be {wanted}"):
        c.to_c(program)


def test_what_is_no_operation_is_named_with_its_reason():
    call = Call(("x",), "y", lambda x: x, 1, "y = sort x", "'sort' is no operation")
    with pytest.raises(ValueError, match="C has, got y = sort x: 'sort' is no operation; write it"):
        c.to_c(stored(call, x=(2,), y=(2,)))
