"""Every operation, in every form that it takes: the programs that all targets are held to.

A case is one operation of inputs 'a' and 'c' that makes 'b'. `alone` puts it between conversions:
of integers, of floats, or of integers to floats. A new class without a case fails a test.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from hybrid_jax import program as p
from hybrid_jax.core.functions import FUNCTIONS
from hybrid_jax.program import Encoding, Step, Tensor, Weights, operations

RELU, RELU6 = (0.0, math.inf), (0.0, 6.0)
IMAGE, SEQUENCE, SIX = (8, 8, 4), (4, 6), (2, 3, 1, 2, 3, 2)
ONES = ((1, 1), (1, 1))
# Signed values, values of a ReLU, and both in 4 bits.
A, B = Encoding(0.03107, 120), Encoding(0.02371)
A4, B4 = Encoding(0.31337, 8, 0, 15), Encoding(0.15153, 0, 0, 15)
SUM = Encoding(0.04, 100)


class Case(NamedTuple):
    """An operation.

    Attributes:
      op: It reads 'a' and 'c', or nothing and is added to 'a', and makes 'b'.
      shapes: Of its inputs.
      given: Encodings of its inputs.
      made: Of its result; None for the input's where it has that, else for what fits.
      most: By how many steps of its result a runtime may differ that computes in floats.
    """

    op: p.Operation
    shapes: tuple = (IMAGE,)
    given: tuple = (A, B)
    made: Encoding | None = None
    most: int = 0


def weights(*shape, bits=8, seed=0):
    """Integers that fill the range of `bits`, a scale for each channel, a bias."""
    rng, most = np.random.default_rng(seed), max(2 ** (bits - 1) - 1, 1)
    values = rng.integers(-most, most + 1, shape).astype(np.int8)
    scale = rng.uniform(0.5, 1.5, shape[-1]) / (most * np.sqrt(np.prod(shape[:-1])))
    step, bias = p.integer_step(bits), rng.normal(size=shape[-1]).astype(np.float32)
    return Weights(values * np.int8(step), (scale / step).astype(np.float32), bias, bits)


def conv(*shape, bits=8, **options):
    return p.Conv(("a",), "b", "conv", weights(*shape, bits=bits), **options)


def one(kind, *fields, **options):
    return kind(("a",), "b", *fields, **options)


def two(kind, *fields, **options):
    return kind(("a", "c"), "b", *fields, **options)


def function(*steps, constants=()):
    return p.Function(("a",), "b", steps, tuple(np.asarray(c, np.float32) for c in constants))


def of(*names):
    """Steps of one operand each: of the input, and then of the step before."""
    return [Step(name, (i,)) for i, name in enumerate(names)]


TIMES = [0.5, 2.0, -1.0, 0.0]
# x · tanh(log1p(exp(x))); and x where it is at least 0, else x times a slope of its channel.
MISH = *of("exp", "log1p", "tanh"), Step("mul", (0, 3))
LEAKY = Step("mul", (0, 1)), Step("ge", (0, 2)), Step("select_n", (4, 3, 0))
SLOPES = [0.1, -0.5, 2.0, 0.25], 0.0
FLOOR = Step("mul", (0, 1)), Step("floor", (2,))
RATIO = p.Function(("a", "c"), "b", (Step("abs", (1,)), Step("add", (3, 2)), Step("div", (0, 4))),
                   (np.asarray(0.5, np.float32),))  # fmt: skip
LARGER = p.Function(("a", "c"), "b", (Step("gt", (0, 1)), Step("select_n", (2, 1, 0))))
PLACES = np.random.default_rng(0).normal(size=IMAGE).astype(np.float32)
SIGMOID, TANH = Encoding(1 / 256), Encoding(1 / 128, 128)

CASES = {
    "conv": Case(conv(3, 3, 4, 8, padding=ONES)),
    "conv relu": Case(conv(3, 3, 4, 8, padding=ONES, clip=RELU), made=B),
    "conv relu6": Case(conv(3, 3, 4, 8, clip=RELU6), made=Encoding(0.0311)),
    "conv relu signed": Case(conv(3, 3, 4, 8, clip=RELU), made=A),
    "conv 4 bits": Case(
        conv(3, 3, 4, 8, bits=4, strides=(2, 2), padding=ONES), given=(B4,), made=B4
    ),
    "conv signed 4 bits": Case(
        conv(3, 3, 4, 8, bits=4, strides=(2, 2), padding=ONES), given=(A4,), made=A4
    ),
    "conv clipped": Case(conv(3, 3, 4, 8, clip=(-0.5, 0.7)), made=A),
    "conv strided": Case(conv(3, 2, 4, 5, strides=(2, 3), padding=((0, 1), (1, 0)), clip=RELU6)),
    "conv in wide padding": Case(conv(2, 3, 4, 3, strides=(1, 2), padding=((5, 4), (3, 6)))),
    "conv cropped": Case(conv(2, 2, 4, 3, padding=((-1, 2), (0, -2)))),
    "conv dilated": Case(conv(3, 3, 4, 8, padding=((2, 2),) * 2, dilation=(2, 2))),
    "conv dilated apart": Case(conv(2, 3, 4, 6, dilation=(3, 2)), ((7, 6, 4),)),
    "conv grouped": Case(conv(3, 3, 2, 8, padding=ONES, groups=2)),
    "conv of one channel": Case(conv(3, 3, 1, 1, padding=ONES), ((6, 7, 1),)),
    "pointwise": Case(conv(1, 1, 4, 9)),
    "depthwise": Case(conv(3, 3, 1, 4, padding=((0, 1),) * 2, strides=(2, 2), groups=4)),
    "depthwise relu6": Case(conv(3, 3, 1, 20, padding=ONES, groups=20, clip=RELU6), ((5, 4, 20),)),
    "depthwise dilated": Case(conv(3, 3, 1, 4, padding=ONES, groups=4, dilation=(2, 1))),
    "depthwise twice as wide": Case(conv(3, 3, 1, 8, padding=ONES, groups=4)),
    "dense": Case(one(p.Dense, "d", weights(6, 10)), ((6,),)),
    "dense relu": Case(one(p.Dense, "d", weights(6, 10), RELU), ((6,),), made=B),
    "matmul": Case(two(p.MatMul), ((4, 6), (6, 5)), most=1),
    "matmul of heads": Case(two(p.MatMul), ((2, 4, 6), (2, 6, 5)), most=1),
    "matmul of groups": Case(two(p.MatMul), ((2, 3, 5, 7), (2, 3, 7, 4)), most=1),
    # 31 and 23 of 40: many sums lie halfway between two integers.
    "add": Case(two(p.Add), (IMAGE,) * 2, (Encoding(0.031, 120), Encoding(0.023)), SUM, 1),
    "add relu": Case(two(p.Add, RELU), (IMAGE,) * 2, made=SUM, most=1),
    "add of a row": Case(two(p.Add), (IMAGE, (1, 8, 1)), made=SUM, most=1),
    "add of channels": Case(two(p.Add), (IMAGE, (1, 1, 4)), made=SUM, most=1),
    "add of numbers": Case(two(p.Add, (-1.0, 2.0)), ((), ()), made=SUM, most=1),
    "twice": Case(p.Add(("a", "a"), "b"), made=Encoding(0.1, 128), most=1),
    "less": Case(two(p.Add, minus=True), ((1, 8, 1), IMAGE), made=SUM, most=1),
    "less, clipped": Case(
        two(p.Add, (-1.0, 6.0), True), (IMAGE,) * 2, made=Encoding(0.08, 100), most=1
    ),
    "less of both sides": Case(two(p.Add, minus=True), ((4, 1, 3), (1, 5, 3)), made=SUM, most=1),
    "multiply": Case(two(p.Multiply), (IMAGE,) * 2),
    "multiply relu6": Case(two(p.Multiply, RELU6), ((4, 1, 3), (1, 5, 3))),
    "squeeze-excite": Case(two(p.Multiply), (IMAGE, (1, 1, 4))),
    "multiply places": Case(two(p.Multiply), ((8, 8, 1), IMAGE)),
    "outer": Case(two(p.Multiply), ((5, 1), (1, 7))),
    "square": Case(p.Multiply(("a", "a"), "b"), ((2, 3),)),
    "maximum": Case(two(p.Maximum), (IMAGE, (8, 1, 4)), made=SUM),
    "maximum of both sides": Case(two(p.Maximum), ((4, 1, 3), (1, 5, 3)), made=SUM),
    "minimum": Case(two(p.Minimum), (IMAGE,) * 2, made=SUM),
    "minimum of six": Case(two(p.Minimum), (SIX, SIX), made=A),
    "clip": Case(one(p.Clip, -0.5, 0.5), made=A),
    "clip to its own": Case(one(p.Clip, -1.0, 1.0), made=Encoding(2 / 255, 128)),
    "clip of a number": Case(one(p.Clip, -1.0, math.inf), ((),), made=A),
    "relu": Case(one(p.Clip, *RELU), made=A),
    "relu to its own": Case(one(p.Clip, *RELU), made=B),
    "sigmoid": Case(function(*of("logistic")), made=SIGMOID),
    "sigmoid in another range": Case(function(*of("logistic")), made=Encoding(0.003)),
    "tanh": Case(function(*of("tanh")), made=TANH),
    "exp": Case(function(*of("exp")), most=1),
    "mish": Case(function(*MISH), most=1),
    "function of a number": Case(function(*MISH), ((),), most=1),
    "choice": Case(
        function(Step("gt", (0, 1)), Step("select_n", (2, 1, 0)), constants=[0.5]), most=1
    ),
    "leaky": Case(function(*LEAKY, constants=SLOPES), most=1),
    "leaky rows": Case(function(*LEAKY, constants=SLOPES), ((3, 4),), most=1),
    "leaky four": Case(function(*LEAKY, constants=SLOPES), ((2, 3, 2, 4),), most=1),
    "floor": Case(function(*of("floor"))),
    "floor of each channel": Case(function(*FLOOR, constants=[TIMES])),
    "ratio": Case(RATIO, (IMAGE, (1, 8, 1)), most=1),
    "larger of two": Case(LARGER, ((2, 5), (2, 5)), most=1),
    "mean": Case(one(p.Mean)),
    "mean of rows": Case(one(p.Mean, (1,))),
    "mean of channels": Case(one(p.Mean, (2,))),
    "mean apart": Case(one(p.Mean, (0, 2))),
    "mean of all": Case(one(p.Mean, (0, 1, 2))),
    "mean of a sequence": Case(one(p.Mean, (0,)), (SEQUENCE,)),
    "mean of each row": Case(one(p.Mean, (1,)), (SEQUENCE,)),
    "mean of a sequence's all": Case(one(p.Mean), (SEQUENCE,)),
    "mean of four": Case(one(p.Mean, (2,)), ((3, 4, 5, 6),)),
    "mean 4 bits": Case(one(p.Mean), given=(B,), made=B4),
    "largest": Case(one(p.Largest, (0, 1))),
    "largest of channels": Case(one(p.Largest, (2,))),
    "largest apart": Case(one(p.Largest, (0, 2))),
    "largest of four": Case(one(p.Largest, (0,)), ((3, 4, 5, 6),)),
    "max pool": Case(one(p.MaxPool, (2, 2), (2, 2))),
    "max pool same": Case(one(p.MaxPool, (3, 3), (1, 1), ONES)),
    "max pool padded": Case(one(p.MaxPool, (3, 3), (2, 2), ONES)),
    "max pool in wide padding": Case(one(p.MaxPool, (3, 3), (2, 2), ((1, 1), (3, 3)))),
    "max pool of columns": Case(one(p.MaxPool, (2, 1), (1, 2), ((1, 0), (0, 0)))),
    # More channels than a block of C's.
    "max pool of 18": Case(one(p.MaxPool, (2, 3), (2, 2)), ((6, 7, 18),)),
    "max pool of a relu": Case(one(p.MaxPool, (3, 3), (2, 2), ONES), given=(B,), made=B),
    "average pool": Case(one(p.AveragePool, (2, 2), (2, 2))),
    "average pool padded": Case(one(p.AveragePool, (3, 3), (2, 2), ONES)),
    "average pool of 18": Case(one(p.AveragePool, (3, 2), (2, 1), ((1, 2), (0, 1))), ((6, 7, 18),)),
    "average pool of what there is": Case(one(p.AveragePool, (3, 3), (2, 2), ONES, False), most=1),
    "average pool of what there is of 18": Case(
        one(p.AveragePool, (3, 2), (2, 1), ((2, 1), (1, 1)), False), ((6, 7, 18),), most=1
    ),
    "concatenate": Case(two(p.Concatenate, 2), (IMAGE,) * 2, made=A),
    "concatenate columns": Case(two(p.Concatenate, 1), ((8, 3, 4), IMAGE), made=SUM),
    "concatenate three": Case(p.Concatenate(("a", "c", "a"), "b", 1), (IMAGE,) * 2, made=SUM),
    "concatenate rows": Case(two(p.Concatenate, 0), (SEQUENCE, (2, 6))),
    "concatenate vectors": Case(two(p.Concatenate, 0), ((3,), (4,))),
    "reshape": Case(one(p.Reshape, (256,))),
    "reshape to an image": Case(one(p.Reshape, (3, 3, 4)), ((36,),)),
    "reshape of an image": Case(one(p.Reshape, (4, 16, 4))),
    "reshape to six": Case(one(p.Reshape, (2, 4, 8, 2, 2, 1))),
    "reshape to a number": Case(one(p.Reshape, ()), ((1, 1, 1),)),
    "transpose": Case(one(p.Transpose, (2, 0, 1))),
    "transpose of two": Case(one(p.Transpose, (1, 0)), (SEQUENCE,)),
    "transpose of four": Case(one(p.Transpose, (3, 1, 0, 2)), ((2, 3, 4, 5),)),
    "transpose of six": Case(one(p.Transpose, (4, 2, 0, 5, 1, 3)), (SIX,)),
    "broadcast": Case(one(p.Broadcast, (5, 4, 6)), ((1, 4, 1),)),
    "broadcast of a row": Case(one(p.Broadcast, (4, 5)), ((1, 5),)),
    "pad": Case(one(p.Pad, ((1, 0), (0, 2), (1, 1)))),
    "pad with a value": Case(one(p.Pad, ((1, 0), (0, 2), (1, 1)), 1.5)),
    "pad with a value out of range": Case(one(p.Pad, ((2, 1),), -99.0), ((5,),)),
    "cropped": Case(one(p.Pad, ((-1, 2), (1, -2), (0, 0)))),
    "slice": Case(one(p.Slice, (0, 1, 0), (8, 8, 3), (1,) * 3)),
    "slice of a vector": Case(one(p.Slice, (2,), (9,), (3,)), ((9,),)),
    "slice with strides": Case(one(p.Slice, (0, 1, 0), (8, 8, 4), (2, 2, 1))),
    # Rows 1 and 5, columns 3, 5 and 7, channels 1 and 2.
    "slice with strides of a part": Case(one(p.Slice, (1, 3, 1), (6, 8, 3), (4, 2, 1))),
    "slice with strides of channels": Case(one(p.Slice, (0, 0, 1), (8, 7, 4), (1, 3, 2))),
    "slice of six": Case(one(p.Slice, (0, 1, 0, 0, 1, 0), (2, 3, 1, 2, 3, 1), (1,) * 6), (SIX,)),
    "gather": Case(one(p.Gather, 1, (0, 0, 7, 3, 3))),
    "gather reversed": Case(one(p.Gather, 0, tuple(range(8))[::-1])),
    "gather channels": Case(one(p.Gather, 2, (2, 0, 1))),
    "gather a channel": Case(one(p.Gather, 2, (1,))),
    "gather rows": Case(one(p.Gather, 0, (3, 0)), (SEQUENCE,)),
    "convert": Case(one(p.Convert), made=B),
    "convert to 4 bits": Case(one(p.Convert), given=(B,), made=B4),
    "convert to the same": Case(one(p.Convert), made=A),
    "convert a number": Case(one(p.Convert), ((),), made=B),
    "softmax": Case(one(p.Softmax), ((6,),), most=1),
    "softmax of channels": Case(one(p.Softmax), most=1),
    "softmax of rows": Case(one(p.Softmax, 0), most=1),
    "softmax of columns": Case(one(p.Softmax, 1), most=1),
    "normalize": Case(one(p.Normalize, (0, 1), 1e-5), most=1),
    "normalize all": Case(one(p.Normalize, (0, 1, 2), 1e-5), ((2, 3, 4),), most=1),
    "normalize channels": Case(one(p.Normalize, (2,), 1e-3), most=1),
    "normalize a sequence": Case(one(p.Normalize, (1,), 1e-5), (SEQUENCE,), most=1),
    "normalize columns": Case(one(p.Normalize, (0,), 1e-6), (SEQUENCE,), most=1),
    "constant": Case(p.Constant((), "b", PLACES), made=SUM, most=1),
    "constant of channels": Case(p.Constant((), "b", PLACES[:1, :1]), made=SUM, most=1),
    # More axes than some kernels have.
    "add of six": Case(two(p.Add), (SIX, (2, 1, 1, 2, 3, 2)), made=SUM, most=1),
    "clip of six": Case(one(p.Clip, -0.5, 0.5), (SIX,), made=A),
    "mean of six": Case(one(p.Mean, (1, 4)), (SIX,)),
    "largest of six": Case(one(p.Largest, (1, 2)), (SIX,)),
    "pad of six": Case(one(p.Pad, ((0, 0), (1, 2), *[(0, 0)] * 4)), (SIX,)),
    "concatenate six": Case(two(p.Concatenate, 3), (SIX, SIX), made=A),
    "matmul of six": Case(two(p.MatMul), (SIX, (2, 3, 1, 2, 2, 4)), most=1),
    "softmax of six": Case(one(p.Softmax, 1), (SIX,), most=1),
    "normalize six": Case(one(p.Normalize, (1, 4), 1e-5), (SIX,), most=1),
}


def cast(dtype, place=0):
    return Step("convert_element_type", (place,), (("new_dtype", dtype),))


_OF_TWO = "add sub mul div rem max min pow atan2 eq ne lt le gt ge".split()
_WITH_OPTIONS = {
    "integer_pow": [("y", 3), ("y", -2)],
    "round": [("rounding_method", way) for way in ("AWAY_FROM_ZERO", "TO_NEAREST_EVEN")],
    "convert_element_type": [
        ("new_dtype", dtype) for dtype in ("int32", "int8", "uint8", "bool", "float32")
    ],
}
HALF = np.float32(0.5)
_BOOLS = Step("gt", (0, 1)), Step("gt", (0, 2))
STEPS = {name: (Step(name, (0, 1) if name in _OF_TWO else (0,)),) for name in FUNCTIONS} | {
    **{name: (*_BOOLS, Step(name, (3, 4))) for name in ("and", "or", "xor")},
    "not": (*_BOOLS, Step("not", (3,))),
    "select_n": (*_BOOLS, Step("select_n", (4, 0, 1))),
    "clamp": (Step("clamp", (2, 0, 1)),),
}
for _name, _all in _WITH_OPTIONS.items():
    del STEPS[_name]
    STEPS |= {f"{_name} {own[1]}": (Step(_name, (0,), (own,)),) for own in _all}
"""{name: an expression of inputs 0 and 1, and of a half, that ends in that step}: of each one."""
NUMBERS = np.float32(
    [[-3, -2.5, -1.5, -1, -0.75, -1e-6, 0, 1e-6, 0.5, 0.75, 1, 1.5, 2.5, 3, 200, -200]]
)
PAIR = np.concatenate([NUMBERS, -NUMBERS]), np.concatenate([NUMBERS[:, ::-1], NUMBERS])


def expression(*steps, constants=(HALF,)):
    """A program of an expression of two inputs, 'z', that reads both, and of their maximum."""
    tensors = {name: Tensor((16,)) for name in ("x", "y", "z", "most")}
    made = p.Function(("x", "y"), "z", steps, tuple(constants))
    both = p.Maximum(("x", "y"), "most")
    return p.Program(("x", "y"), ("z", "most"), tensors, (both, made))


FORMS = ("integers", "floats", "integers to floats")
EVERY = [
    (name, form) for name, case in CASES.items() for form in FORMS[: 2 + case.op.returns_floats]
]
"""(name, form) of all that a target is to write."""
CLASSES = {
    kind
    for kind in vars(p).values()
    if isinstance(kind, type) and issubclass(kind, p.Operation) and kind is not p.Operation
}
"""All operations; `Call` alone has no case, as no target but StableHLO has it."""


@functools.cache
def alone(name, form):
    """The program of a case between conversions of its inputs and of its result."""
    case, whole = CASES[name], form != "floats"
    op, shape, names = case.op, _results(name).shape[1:], edges(case.op)
    result = fitting(name) if form == "integers" else None
    if not whole and hasattr(op, "weights"):
        w = op.weights
        op = dataclasses.replace(op, weights=Weights(w.values * w.scale, None, w.bias))
    tensors, steps = {}, []

    def add(op, shape, encoding):
        tensors[op.output] = Tensor(shape, encoding)
        steps.append(op)

    tensors |= {f"in {edge}": Tensor(own) for edge, own in zip(names, case.shapes, strict=True)}
    for edge, own, encoding in zip(names, case.shapes, case.given, strict=False):
        add(p.Convert((f"in {edge}",), edge), own, encoding if whole else None)
    if isinstance(op, p.Constant):
        add(op, shape, case.given[1] if whole else None)
        add(p.Add(("a", "b"), "last"), *case.shapes, result)
    elif whole and not op.integral:
        for edge, own in zip(names, case.shapes, strict=True):
            add(p.Convert((edge,), f"{edge} in floats"), own, None)
        floats = tuple(f"{edge} in floats" for edge in op.inputs)
        add(dataclasses.replace(op, inputs=floats), shape, None)
        add(p.Convert(("b",), "last"), shape, result)
    else:
        add(dataclasses.replace(op, output="last"), shape, result)
    add(p.Convert(("last",), "y"), tensors["last"].shape, None)
    return p.Program(tuple(f"in {edge}" for edge in names), "y", tensors, tuple(steps))


def together(form, but=()):
    """The cases of a form, but for some, as one program: (their names, the program)."""
    names = [name for name, own in EVERY if own == form and name not in but]
    tensors, steps, ends = {}, [], ([], [])
    for name in names:
        program = alone(name, form)
        new = {edge: f"{name}: {edge}" for edge in program.tensors}
        tensors |= {new[edge]: tensor for edge, tensor in program.tensors.items()}
        for op in program.operations:
            changes = {"inputs": tuple(map(new.get, op.inputs)), "output": new[op.output]}
            changes |= {"name": name} if hasattr(op, "name") else {}
            steps.append(dataclasses.replace(op, **changes))
        for own, end in zip(ends, (program.inputs, program.outputs), strict=True):
            own += map(new.get, end)
    return names, p.Program(*map(tuple, ends), tensors, tuple(steps))


# A call of sorting, of three examples at a time.
SORTED = {"function": lambda x: jnp.sort(x, -1), "examples": 3, "equation": "", "reason": ""}


def compute(op, values, encodings, output, form="conv"):
    """The operation alone, a convolution in that form."""
    options = {"form": form} if isinstance(op, p.Conv) else {}
    return operations.compute(op, values, encodings, output, **options)


def forms_of(kind):
    return ("conv", "matmul") if kind is p.Conv else ("conv",)


def edges(op):
    """What a case reads, each once; what a constant is added to."""
    return tuple(dict.fromkeys(op.inputs or "a"))


def inputs(name, batch=4):
    """Normal values of a deviation of 2."""
    return [
        (2 * np.random.default_rng(seed).normal(size=(batch, *shape))).astype(np.float32)
        for seed, shape in enumerate(CASES[name].shapes)
    ]


def _results(name):
    """What the operation makes of floats."""
    op = CASES[name].op
    values = dict(zip(edges(op), map(jnp.asarray, inputs(name, 16)), strict=True))
    return np.asarray(op.floats(*(values[edge] for edge in op.inputs)))


def fitting(name):
    """The encoding of the result: that stated, the input's, or one for the values that it takes."""
    case = CASES[name]
    if case.made or case.op.same_encoding:
        return case.made or case.given[0]
    y = _results(name)
    low, high = min(y.min(), 0.0), max(y.max(), 0.0)
    scale = np.float32((high - low) / 255 * 1.0137)  # no ratio of small integers, so no ties
    return Encoding(float(scale), round(float(-low / scale)))
