"""The inference graph in JAX: every operation by hand, in exact integers, compiled as well."""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import operation_cases
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operation_cases import CLASSES, RELU, edges

from hybrid_jax import program as p
from hybrid_jax.program import (
    UNBOUNDED,
    Add,
    AveragePool,
    Broadcast,
    Call,
    Clip,
    Concatenate,
    Constant,
    Conv,
    Convert,
    Dense,
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
    Weights,
    arithmetic,
    operations,
)

HALF = Encoding(0.5, 10)  # 12 is 1.0
QUARTER = Encoding(0.25)  # 6 is 1.5
UNIT, FIVE, BOTH = Encoding(1.0), Encoding(1.0, 5), [HALF, QUARTER]


def kernel(values, scale=None):
    """Integer weights of that scale for all channels with a bias of 1 for each, or float ones."""
    values = np.asarray(values)
    ones = np.ones(values.shape[-1], np.float32)
    if scale is None:
        return Weights(values.astype(np.float32), None, ones)
    return Weights(values.astype(np.int8), ones * np.float32(scale), ones, 8)


def one(name):
    """The facts of a function that is one step of its input."""
    return {"steps": (Step(name, (0,)),)}


# max(x, 0) + slope · min(x, 0), of the constants slope and 0.
PRELU = {
    "steps": (Step("max", (0, 2)), Step("min", (0, 2)), Step("mul", (1, 4)), Step("add", (3, 5))),
    "constants": (np.float32([0.5, 0.25]), np.array(0, np.float32)),
}
SORTED = {"function": lambda x: jnp.sort(x, -1), "examples": 3, "equation": "", "reason": ""}
SQUARE, TAPS = kernel(np.ones((2, 2, 1, 1)), 1.0), kernel([[[[3]], [[-4]]]], 1.0)
ROW = kernel([[3], [-4]], 0.25)
POOL = {"window": (2, 2), "strides": (2, 2), "padding": ((1, 1), (0, 0))}
IMAGE = [[[1], [2]], [[3], [4]]]
AROUND = ((1, 0), (0, 1))
WITHIN = {"window": (2, 2), "strides": (1, 1), "padding": AROUND, "count_padding": False}


class Hand(NamedTuple):
    """An operation on one example, worked out by hand."""

    kind: type
    facts: dict  # its fields
    given: list  # values of its inputs, as they are stored
    encodings: list  # of its inputs
    output: Encoding | None  # encoding of the result
    result: list


BY_HAND = {
    # 2·3 − 3·4 + 1
    "dense": Hand(Dense, {"weights": kernel([[3], [-4]])}, [[2, 3]], [None], None, [-5]),
    # Steps 2 and −1: 6 + 4 = 10, the bias 1 is 8 steps of 0.5 · 0.25. 18 · 0.125 = 2.25
    # = 4.5 · 0.5, to even 4, and 4.
    "dense q": Hand(Dense, {"weights": ROW}, [[12, 9]], [HALF], Encoding(0.5, 4), [8]),
    "dense q to floats": Hand(Dense, {"weights": ROW}, [[12, 9]], [HALF], None, [2.25]),
    # −6 − 4 = −10 and 8: −0.25, which a ReLU makes the zero point.
    "dense q relu": Hand(
        Dense,
        {"weights": kernel([[-3], [4]], 0.25), "clip": RELU},
        [[12, 9]],
        [HALF],
        Encoding(0.125, 7),
        [7],
    ),
    # 0 0 0      1 + 2          2
    # 1 2 0  →   1 + 2 + 3 + 4  2 + 4   and the bias 1.
    # 3 4 0
    "conv": Hand(
        Conv,
        {"weights": kernel(np.ones((2, 2, 1, 1))), "padding": AROUND},
        [IMAGE],
        [None],
        None,
        [[[4], [3]], [[11], [7]]],
    ),
    # The same values at zero point 5; halves go to even: 4 / 2, 3 / 2 → 2, 11 / 2 → 6, 7 / 2 → 4.
    "conv q": Hand(
        Conv,
        {"weights": SQUARE, "padding": AROUND},
        [np.add(IMAGE, 5)],
        [FIVE],
        Encoding(2.0),
        [[[2], [2]], [[6], [4]]],
    ),
    # At stride 2 the first row of the above at its first column.
    "conv q strides": Hand(
        Conv,
        {"weights": SQUARE, "padding": AROUND, "strides": (2, 2)},
        [np.add(IMAGE, 5)],
        [FIVE],
        UNIT,
        [[[4]]],
    ),
    # Taps two apart: 3·1 − 4·3, 3·2 − 4·4, 3·3 − 4·5, and 1: −8, −9, −10.
    "conv q dilation": Hand(
        Conv,
        {"weights": TAPS, "dilation": (1, 2)},
        [[[[1], [2], [3], [4], [5]]]],
        [UNIT],
        Encoding(1.0, 20),
        [[[12], [11], [10]]],
    ),
    # Output 0 reads channels 0, 1 by 1, 3: 1 + 6; output 1 reads 2, 3 by 2, 4: 6 + 16.
    "conv q groups": Hand(
        Conv,
        {"weights": kernel([[[[1, 2], [3, 4]]]], 1.0), "groups": 2},
        [[[[1, 2, 3, 4]]]],
        [UNIT],
        UNIT,
        [[[8, 23]]],
    ),
    "conv q depthwise": Hand(
        Conv,
        {"weights": kernel([[[[2, -3]]]], 1.0), "groups": 2},
        [[[[5, 7]]]],
        [UNIT],
        Encoding(1.0, 100),
        [[[111, 80]]],
    ),
    "add": Hand(Add, {"clip": RELU}, [[1, -2], [2, 1]], [None] * 2, None, [3, 0]),
    # 1 + 1.5 = 2.5, to even 2, and 1; −5 + 0 is clipped at 0.
    "add q": Hand(Add, {"clip": RELU}, [[12, 0], [6, 0]], BOTH, Encoding(1.0, 1), [3, 1]),
    "multiply": Hand(Multiply, {}, [[[[2, 3]]], [[[4, 5]]]], [None] * 2, None, [[[8, 15]]]),
    # 1 · 1.5 = 3 steps of 0.5; −5 · 1.5 ends at 0 of the integers.
    "multiply q": Hand(Multiply, {}, [[12, 0], [6, 6]], BOTH, Encoding(0.5, 1), [4, 0]),
    "multiply q broadcast": Hand(
        Multiply, {}, [[[[12], [14]]], [[[6]]]], BOTH, Encoding(0.5), [[[3], [6]]]
    ),
    "clip": Hand(Clip, {"low": 0.0, "high": 3.0}, [[-1, 2, 9]], [None], None, [0, 2, 3]),
    # 0 is 10, 3 is 16.
    "clip q": Hand(Clip, {"low": 0.0, "high": 3.0}, [[3, 12, 40]], [HALF], HALF, [10, 12, 16]),
    # A window of the padding and the first row, one of the second and the padding.
    "max pool": Hand(MaxPool, POOL, [np.negative(IMAGE)], [None], None, [[[-1]], [[-3]]]),
    "max pool q": Hand(MaxPool, POOL, [IMAGE], [HALF], HALF, [[[2]], [[4]]]),
    # Steps 2, 4 after a 0: (0 + 2) / 2 and 3 halves, in quarters.
    "average pool q": Hand(
        AveragePool,
        {"window": (2, 1), "strides": (1, 1), "padding": ((1, 0), (0, 0))},
        [[[[12]], [[14]]]],
        [HALF],
        QUARTER,
        [[[2]], [[6]]],
    ),
    "average pool": Hand(
        AveragePool, {"window": (2, 2), "strides": (2, 2)}, [IMAGE], [None], None, [[[2.5]]]
    ),
    "mean": Hand(Mean, {}, [IMAGE], [None], None, [2.5]),
    # Steps 1, 2, 4, 4: 11 / 4 halves are 5.5 quarters, to even 6.
    "mean q": Hand(Mean, {}, [[[[11], [12]], [[14], [14]]]], [HALF], QUARTER, [6]),
    "mean q to floats": Hand(Mean, {}, [[[[11], [12]], [[14], [14]]]], [HALF], None, [1.375]),
    "concatenate": Hand(Concatenate, {"axis": 0}, [[1], [2, 3]], [None] * 2, None, [1, 2, 3]),
    # 1 and 1.5 are 2 and 3 halves.
    "concatenate q": Hand(Concatenate, {"axis": 0}, [[12], [6]], BOTH, Encoding(0.5, 1), [3, 4]),
    "reshape": Hand(
        Reshape, {"shape": (2, 3)}, [[0, 1, 2, 3, 4, 5]], [HALF], HALF, [[0, 1, 2], [3, 4, 5]]
    ),
    "transpose": Hand(
        Transpose,
        {"permutation": (1, 0)},
        [[[1, 2, 3], [4, 5, 6]]],
        [HALF],
        HALF,
        [[1, 4], [2, 5], [3, 6]],
    ),
    "pad": Hand(Pad, {"padding": ((1, 2),)}, [[7]], [None], None, [0, 7, 0, 0]),
    # Zero is 10.
    "pad q": Hand(Pad, {"padding": ((1, 2),)}, [[7]], [HALF], HALF, [10, 7, 10, 10]),
    "slice": Hand(
        Slice,
        {"starts": (1,), "stops": (5,), "strides": (2,)},
        [[0, 1, 2, 3, 4, 5]],
        [HALF],
        HALF,
        [1, 3],
    ),
    "logistic": Hand(Function, one("logistic"), [[0, math.log(3)]], [None], None, [0.5, 0.75]),
    # 0.5 of 1/256; the greatest, 1 / (1 + e^−12.7), is 256 and clipped.
    "logistic q": Hand(
        Function, one("logistic"), [[128, 255]], [Encoding(0.1, 128)], Encoding(1 / 256), [128, 255]
    ),
    # 1 in steps of 1/64; e^1 = 2.71828 is 173.97 of them.
    "exp q": Hand(
        Function, one("exp"), [[128, 138]], [Encoding(0.1, 128)], Encoding(1 / 64), [64, 174]
    ),
    # tanh(0.5) = 0.46212 is 59.15 of 1/128.
    "tanh q": Hand(
        Function,
        one("tanh"),
        [[128, 133]],
        [Encoding(0.1, 128)],
        Encoding(1 / 128, 100),
        [100, 159],
    ),
    # A channel of slope 0.5 and one of 0.25, below zero.
    "prelu": Hand(Function, PRELU, [[[-4, -4], [2, 2]]], [None], None, [[-2, -1], [2, 2]]),
    # 4 is −3 and 12 is 1 of halves: −1.5 and −0.75, 1 and 1, in quarters from 10.
    "prelu q": Hand(
        Function, PRELU, [[[4, 4], [12, 12]]], [HALF], Encoding(0.25, 10), [[4, 7], [14, 14]]
    ),
    # −1 / 2 and 3 / 4, of two tensors.
    "quotient": Hand(
        Function,
        {"steps": (Step("div", (0, 1)),)},
        [[-1, 3], [2, 4]],
        [None] * 2,
        None,
        [-0.5, 0.75],
    ),
    "softmax": Hand(Softmax, {}, [[0, math.log(3)]], [None], None, [0.25, 0.75]),
    "softmax of rows": Hand(
        Softmax, {"axis": 0}, [[[0, 1], [math.log(3), 1]]], [None], None, [[0.25, 0.5], [0.75, 0.5]]
    ),
    # Mean 2, deviation 1; the squares' mean and 3 are 4.
    "normalize": Hand(
        Normalize, {"axes": (0,), "epsilon": 3.0}, [[1, 3]], [None], None, [-0.5, 0.5]
    ),
    "matmul": Hand(MatMul, {}, [[[1, 2]], [[3], [4]]], [None] * 2, None, [[11]]),
    # 1 and −1 of halves by 2 and 4 of quarters: 2 − 4 = −2 eighths are −0.25.
    "matmul q": Hand(MatMul, {}, [[[11, 9]], [[2], [4]]], BOTH, Encoding(0.125, 5), [[3]]),
    "matmul q to floats": Hand(MatMul, {}, [[[11, 9]], [[2], [4]]], BOTH, None, [[-0.25]]),
    "minus": Hand(Add, {"minus": True}, [[5, 1], [2, 3]], [None] * 2, None, [3, -2]),
    # 1 − 1.5 = −0.5 and −5 − 0 = −5, which ends at 0.
    "minus q": Hand(Add, {"minus": True}, [[12, 0], [6, 0]], BOTH, HALF, [9, 0]),
    # The row (1, 2) to each of two rows.
    "add a row": Hand(
        Add, {}, [[[1, 2]], [[10, 20], [30, 40]]], [None] * 2, None, [[11, 22], [31, 42]]
    ),
    "maximum": Hand(Maximum, {}, [[1, 5], [3, 2]], [None] * 2, None, [3, 5]),
    # 1 and −5 in halves, 1.5 and 0.5 in quarters: 1.5 and 0.5 in halves from 10.
    "maximum q": Hand(Maximum, {}, [[12, 0], [6, 2]], BOTH, HALF, [13, 11]),
    "minimum": Hand(Minimum, {}, [[1, 5], [3, 2]], [None] * 2, None, [1, 2]),
    "minimum q": Hand(Minimum, {}, [[12, 0], [6, 2]], BOTH, HALF, [12, 0]),
    "mean of rows": Hand(Mean, {"axes": (1,)}, [[[1, 3], [5, 9]]], [None], None, [2, 7]),
    "largest": Hand(Largest, {"axes": (0,)}, [[[1, 9], [5, 3]]], [HALF], HALF, [5, 9]),
    # The corner sees 4 values, the edge 6; all are 3 here, whatever the padding.
    "average pool of what is there": Hand(
        AveragePool, WITHIN, [IMAGE], [None], None, [[[1.5], [2]], [[2.5], [3]]]
    ),
    "average pool of what is there q": Hand(
        AveragePool, WITHIN, [np.add(IMAGE, 5)], [FIVE], Encoding(0.5), [[[3], [4]], [[5], [6]]]
    ),
    "broadcast": Hand(Broadcast, {"shape": (2, 3)}, [[[1], [2]]], [HALF], HALF, [[1] * 3, [2] * 3]),
    "gather": Hand(
        Gather,
        {"axis": 1, "indices": (2, 0, 0)},
        [[[1, 2, 3], [4, 5, 6]]],
        [HALF],
        HALF,
        [[3, 1, 1], [6, 4, 4]],
    ),
    # 1.2 is 2.4 halves from 10.
    "pad with a value": Hand(
        Pad, {"padding": ((1, 1),), "value": 1.2}, [[7]], [HALF], HALF, [12, 7, 12]
    ),
    "constant": Hand(Constant, {"value": np.float32([1.5, -2])}, [], [], None, [1.5, -2]),
    "constant q": Hand(Constant, {"value": np.float32([1.5, -2])}, [], [], HALF, [13, 6]),
    # Pairs are sorted, three examples at a time.
    "call": Hand(Call, SORTED, [[3, 1]], [None], None, [1, 3]),
    # 1.5 to even 2, 2.5 to even 2; what is too large or small is the end, NaN is zero.
    "quantize": Hand(
        Convert, {}, [[0.75, 1.25, -99, math.inf, math.nan]], [None], HALF, [12, 12, 0, 255, 10]
    ),
    "quantize to 4 bits": Hand(
        Convert, {}, [[0.75, 9.0, -9.0]], [None], Encoding(0.5, 8, 1, 15), [10, 15, 1]
    ),
    # 1 is 4 quarters; −5 ends at 0.
    "requantize": Hand(Convert, {}, [[12, 0]], [HALF], QUARTER, [4, 0]),
    "dequantize": Hand(Convert, {}, [[12, 0]], [HALF], None, [1.0, -5.0]),
}


def operation(kind, facts, inputs):
    """An operation of inputs 'x', 'x1', …, output 'y'."""
    names = ("x", *(f"x{i}" for i in range(1, inputs)))[:inputs]
    return kind(names, "y", *(["site"] if kind in (Conv, Dense) else []), **facts)


def compute_op(op, values, encodings, output, form="conv"):
    options = {"form": form} if isinstance(op, Conv) else {}
    return operations.compute(op, values, encodings, output, **options)


def forms_of(kind):
    return ("conv", "matmul") if kind is Conv else ("conv",)


@pytest.fixture(scope="module")
def results():
    """What all operations return, by name and form, for one example without the batch."""

    def compute(values):
        outputs = {}
        for name, case in BY_HAND.items():
            op = operation(case.kind, case.facts, len(case.given))
            for form in forms_of(case.kind):
                y = compute_op(op, values[name], case.encodings, case.output, form)
                outputs[name, form] = y[0]
        return outputs

    values = {
        name: [
            np.asarray(value, np.float32 if encoding is None else np.uint8)[None]
            for value, encoding in zip(case.given, case.encodings, strict=True)
        ]
        for name, case in BY_HAND.items()
    }
    return jax.jit(compute)(values)


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name, case in BY_HAND.items() for form in forms_of(case.kind)],
)
def test_by_hand(results, name, form):
    case, got = BY_HAND[name], results[name, form]
    np.testing.assert_allclose(got, np.asarray(case.result), rtol=1e-6)
    assert got.shape == np.shape(case.result)
    assert got.dtype == (np.float32 if case.output is None else np.uint8)


CASES = {
    name: (
        case.op,
        [dict(zip(edges(case.op), case.shapes, strict=True))[e] for e in case.op.inputs],
    )
    for name, case in operation_cases.CASES.items()
} | {"call": (Call(("a",), "b", **SORTED), [(5,)])}
"""{name: an operation, the shapes of its inputs}."""
ENCODED = [name for name, (op, _) in CASES.items() if op.integral]


def test_every_operation_has_its_tests():
    assert {case.kind for case in BY_HAND.values()} == CLASSES
    assert {type(op) for op, _ in CASES.values()} == CLASSES


def windows(x, window, strides, dilation, padding, fill=0):
    """What each position sees through each entry of a window: a list of (B, H', W', C)."""
    x = padded(x, [*padding, (0, 0)], fill)
    sizes = [
        (n - (w - 1) * d - 1) // s + 1
        for n, w, s, d in zip(x.shape[1:3], window, strides, dilation, strict=True)
    ]
    (h, w), (s, t), (d, e) = sizes, strides, dilation
    return [
        x[:, i * d : i * d + (h - 1) * s + 1 : s, j * e : j * e + (w - 1) * t + 1 : t]
        for i in range(window[0])
        for j in range(window[1])
    ]


def padded(x, padding, fill=0):
    """A value around each example; what is negative cuts off."""
    wide = np.pad(x, [(0, 0), *np.maximum(padding, 0)], constant_values=fill)
    ends = [
        slice(max(-before, 0), n - max(-after, 0))
        for n, (before, after) in zip(wide.shape[1:], padding, strict=True)
    ]
    return wide[(slice(None), *ends)]


def accumulate(op, values, weights):
    """The sum that an operation makes, in the dtype of its inputs, without bias, mean or bounds."""
    x = values[0]
    if isinstance(op, Conv):
        *window, inputs, outputs = weights.shape
        seen = windows(x, window, op.strides, op.dilation, op.padding)
        parts = []
        for group in range(op.groups):
            rows = slice(group * inputs, (group + 1) * inputs)
            columns = slice(group * outputs // op.groups, (group + 1) * outputs // op.groups)
            taps = weights.reshape(-1, inputs, outputs)[..., columns]
            parts.append(sum(s[..., rows] @ tap for s, tap in zip(seen, taps, strict=True)))
        return np.concatenate(parts, -1)
    if isinstance(op, AveragePool):
        return sum(windows(x, op.window, op.strides, (1, 1), op.padding))
    return {
        Dense: lambda: x @ weights,
        Multiply: lambda: x * values[-1],
        MatMul: lambda: x @ values[-1],
        Mean: lambda: x.sum(tuple(axis + 1 for axis in op.axes)),
        Convert: lambda: x,
        Concatenate: lambda: np.concatenate(values, op.axis + 1),
    }[type(op)]()


def in_float64(op, values):
    """The operation on values, by NumPy."""
    x = values[0] if values else op.value[None]
    if isinstance(op, Conv | Dense):
        weights = op.weights.values * np.float64(op.weights.scale)
        return np.clip(accumulate(op, values, weights) + op.weights.bias, *op.clip)
    if isinstance(op, MaxPool):
        seen = windows(x, op.window, op.strides, (1, 1), op.padding, -np.inf)
        return np.max(seen, 0)
    other = {
        Add: lambda: np.clip(x + (-values[-1] if op.minus else values[-1]), *op.clip),
        Multiply: lambda: np.clip(x * values[-1], *op.clip),
        Maximum: lambda: np.maximum(x, values[-1]),
        Minimum: lambda: np.minimum(x, values[-1]),
        Largest: lambda: x.max(tuple(axis + 1 for axis in op.axes)),
        Broadcast: lambda: np.broadcast_to(x, (len(x), *op.shape)),
        Gather: lambda: x.take(op.indices, op.axis + 1),
        Constant: lambda: x,
        Call: lambda: np.sort(x, -1),
        Normalize: lambda: normalized(x, tuple(axis + 1 for axis in op.axes), op.epsilon),
        Function: lambda: FUNCTIONS[tuple(step.name for step in op.steps)](
            *values, *map(np.float64, op.constants)
        ),
        Clip: lambda: np.clip(x, op.low, op.high),
        Reshape: lambda: x.reshape(-1, *op.shape),
        Transpose: lambda: np.moveaxis(x, [axis + 1 for axis in op.permutation], range(1, x.ndim)),
        Pad: lambda: padded(x, op.padding, op.value),
        Slice: lambda: x[(slice(None), *map(slice, op.starts, op.stops, op.strides))],
        Softmax: lambda: softmax(x, op.axis if op.axis < 0 else op.axis + 1),
    }.get(type(op))
    return other() if other else accumulate(op, values, None) / count(op, values)


# By the names of their steps, of inputs and constants.
FUNCTIONS = {
    ("logistic",): lambda x: 1 / (1 + np.exp(-x)),
    ("tanh",): np.tanh,
    ("exp",): np.exp,
    ("exp", "log1p", "tanh", "mul"): lambda x: x * np.tanh(np.log1p(np.exp(x))),
    ("gt", "select_n"): np.maximum,
    ("mul", "ge", "select_n"): lambda x, slopes, zero: np.where(x >= zero, x, x * slopes),
    ("floor",): np.floor,
    ("mul", "floor"): lambda x, times: np.floor(x * times),
    ("abs", "add", "div"): lambda x, y, half: x / (np.abs(y) + half),
}


def softmax(x, axis):
    return np.exp(x) / np.exp(x).sum(axis, keepdims=True)


def normalized(x, axes, epsilon):
    centred = x - x.mean(axes, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axes, keepdims=True) + epsilon)


def count(op, values):
    if isinstance(op, AveragePool):
        inside = sum(windows(np.ones_like(values[0]), op.window, op.strides, (1, 1), op.padding))
        return math.prod(op.window) if op.count_padding else inside
    return math.prod(values[0].shape[a + 1] for a in op.axes) if isinstance(op, Mean) else 1


def test_floats():
    rng = np.random.default_rng(0)
    values = {
        name: [rng.standard_normal((2, *shape)).astype(np.float32) for shape in shapes]
        for name, (_, shapes) in CASES.items()
    }

    @jax.jit
    def compute(values):
        return {
            (name, form): compute_op(op, values[name], [None] * len(shapes), None, form)
            for name, (op, shapes) in CASES.items()
            for form in forms_of(type(op))
        }

    for (name, form), got in compute(values).items():
        op, _ = CASES[name]
        expected = in_float64(op, [v.astype(np.float64) for v in values[name]])
        assert expected.shape == got.shape
        np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=f"{name}, {form}")


def spread(values, bits, zero_point=None):
    """An encoding in which the values fit, of that many bits."""
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    scale = np.float32((high - low) / (2**bits - 1) or 1)
    return Encoding(float(scale), int(np.rint(-low / scale)), 0, 2**bits - 1)


@st.composite
def encodings(draw):
    bits = draw(st.sampled_from([8, 8, 4]))
    zero = draw(st.sampled_from([0, 2 ** (bits - 1), 2**bits - 1]) | st.integers(0, 2**bits - 1))
    scale = float(np.float32(draw(st.floats(0.005, 0.05)) * 2 ** (8 - bits)))
    return Encoding(scale, zero, 0, 2**bits - 1)


@pytest.mark.parametrize("name", ENCODED)
@settings(max_examples=3, deadline=None)
@given(st.data(), st.integers(0, 999))
def test_integers(name, data, seed):
    op, shapes = CASES[name]
    rng = np.random.default_rng(seed)
    given_ = [data.draw(encodings()) for _ in shapes]
    q = [
        rng.integers(e.low, e.high, (2, *s), endpoint=True)
        for e, s in zip(given_, shapes, strict=True)
    ]
    steps = [v - e.zero_point for v, e in zip(q, given_, strict=True)]
    real = [s * np.float64(e.scale) for s, e in zip(steps, given_, strict=True)]
    expected = in_float64(op, real)
    same = op.same_encoding
    output = given_[0] if same else spread(expected, data.draw(st.sampled_from([8, 4])))
    inputs = [jnp.asarray(v, jnp.uint8) for v in q]
    got = compute_op(op, inputs, given_, output)
    assert got.dtype == jnp.uint8
    got = np.asarray(got, np.int64)
    # Within a step of the floats, rounded; where nothing is computed, exactly they.
    rounded = np.rint(expected / output.scale) + output.zero_point
    rounded = np.clip(rounded, output.low, output.high)
    assert np.abs(got - rounded).max() <= (0 if same or isinstance(op, Function) else 1)
    # To the last bit what the sum in int64 gives by one float32 product.
    np.testing.assert_array_equal(got, exact(op, q, given_, output))
    if isinstance(op, Conv):
        other = compute_op(op, inputs, given_, output, "matmul")
        np.testing.assert_array_equal(other, got)


def exact(op, q, given_, output):
    """The integers of the result, by NumPy."""
    steps = [v - e.zero_point for v, e in zip(q, given_, strict=True)]
    if not op.same_encoding and not isinstance(op, Function):
        return requantized(op, steps, given_, output)
    real = [s * np.float64(e.scale) for s, e in zip(steps, given_, strict=True)]
    rounded = np.rint(in_float64(op, real) / output.scale) + output.zero_point
    return np.clip(rounded, output.low, output.high)


def requantized(op, steps, given_, output):
    """q = clip(round(float32(accumulator) · multiplier)) + zero point, in NumPy."""
    scales = [e.scale for e in given_]
    if isinstance(op, Add):
        first, second, multiplier = arithmetic.addition(*given_, output)
        sums = steps[0] * first + steps[1] * second * (-1 if op.minus else 1)
        return finished(op, sums, multiplier, output)
    if isinstance(op, Constant):
        return finished(op, op.value[None], 1 / np.float32(output.scale), output)
    if isinstance(op, Clip):
        multiplier = arithmetic.multiplier(given_[0].scale, output=output)
        return finished(op, steps[0], multiplier, output)
    if isinstance(op, Concatenate | Maximum):
        parts = [
            finished(op, s, arithmetic.multiplier(e.scale, output=output), output)
            if e != output
            else s + e.zero_point
            for s, e in zip(steps, given_, strict=True)
        ]
        if isinstance(op, Concatenate):
            return np.concatenate(parts, op.axis + 1)
        return (np.minimum if isinstance(op, Minimum) else np.maximum)(*parts)
    if isinstance(op, Conv | Dense):
        sums = accumulate(op, steps, op.weights.values.astype(np.int64))
        sums = sums + arithmetic.integer_bias(op.weights, given_[0])
        return finished(
            op, sums, arithmetic.multiplier(*scales, op.weights.scale, output=output), output
        )
    sums = accumulate(op, steps, None)
    multiplier = arithmetic.multiplier(*scales, output=output, count=count(op, steps))
    return finished(op, sums, multiplier, output)


def finished(op, sums, multiplier, output):
    assert np.abs(sums).max() < 2**31
    clip = (op.low, op.high) if isinstance(op, Clip) else getattr(op, "clip", UNBOUNDED)
    low, high = arithmetic.bounds(output, clip)
    rounded = np.rint(sums.astype(np.float32) * multiplier)
    return np.clip(rounded.astype(np.int64) + output.zero_point, low, high)


def encodings_of(name):
    op, shapes = CASES[name]
    given_ = [Encoding(0.013, 100), Encoding(0.021, 30, 0, 200), Encoding(0.013, 100)][
        : len(shapes)
    ]
    return given_, given_[0] if op.same_encoding else Encoding(0.017, 90)


EVERY = [(name, form) for name in ENCODED for form in forms_of(type(CASES[name][0]))]


def every(values):
    """The results of `EVERY`, in integers, of {name: inputs}."""
    return [
        compute_op(op, values[name], *encodings_of(name), form)
        for name, form in EVERY
        for op, _ in [CASES[name]]
    ]


@pytest.fixture
def optimized():
    """XLA works as hard as for a user."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.usefixtures("optimized")
def test_compiled_vmapped_and_exported_to_the_bit():
    rng = np.random.default_rng(0)
    values = {
        name: [rng.integers(0, 200, (3, *shape)).astype(np.uint8) for shape in CASES[name][1]]
        for name in ENCODED
    }

    @jax.jit
    def both(values):
        mapped = jax.vmap(lambda one: every(jax.tree.map(lambda a: a[None], one)))(values)
        return every(values), mapped

    (b,) = jax.export.symbolic_shape("b")
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct((b, *a.shape[1:]), a.dtype), values)
    compiled, mapped = jax.export.export(both)(like).call(values)
    for (name, form), got, one_by_one in zip(EVERY, compiled, mapped, strict=True):
        op, _ = CASES[name]
        integers = [v.astype(np.int64) for v in values[name]]
        want = exact(op, integers, *encodings_of(name))
        np.testing.assert_array_equal(got, want, err_msg=f"{name}, {form}")
        want = np.broadcast_to(want, (len(one_by_one), *want.shape[1:]))  # a constant has one row
        np.testing.assert_array_equal(one_by_one[:, 0], want, err_msg=f"{name}, {form}")


@pytest.mark.usefixtures("optimized")
def test_constants_of_two_operations_stay_two():
    # XLA makes (q · a) · b one product with a · b. At twice the scale every odd integer is next to
    # a half, and the two products fall on either side of it.
    steps = [Convert((a,), b) for a, b in itertools.pairwise(("x", "q", "floats", "other", "y"))]
    rng = np.random.default_rng(0)
    for scale in rng.uniform(0.1, 1, 4).astype(np.float32):
        q, other = Encoding(float(scale)), Encoding(2 * float(scale), 5)
        encoded = {"x": None, "q": q, "floats": None, "other": other, "y": None}
        tensors = {name: Tensor((256,), e) for name, e in encoded.items()}
        program = Program("x", "y", tensors, tuple(steps))
        floats = np.arange(256, dtype=np.float32) * scale
        want = np.rint(floats * (np.float32(1) / np.float32(other.scale))) + 5
        want = (np.clip(want, 0, 255) - 5).astype(np.float32) * np.float32(other.scale)
        np.testing.assert_array_equal(jax.jit(p.run(program))(floats[None])[0], want)


def test_a_shape_that_is_not_the_programs():
    program = Program("x", "x", {"x": Tensor((2, 3))}, ())
    with pytest.raises(ValueError, match=r"x must have shape \(B, 2, 3\), got \(4, 2\)"):
        p.run(program)(jnp.ones((4, 2)))


def test_the_simulation_rounds_every_encoded_tensor():
    # 0.3 is 1 quarter; 0.25 · 3 + 1 = 1.75 is 4 halves to even, a ReLU6 of 4 · 0.5 is 2.
    weights = kernel([[3]], 1.0)
    tensors = {"x": Tensor((1,)), "q": Tensor((1,), QUARTER), "y": Tensor((1,), HALF)}
    tensors["z"] = Tensor((1,))
    steps = (
        Convert(("x",), "q"),
        Dense(("q",), "y", "site", weights, clip=(0.0, 6.0)),
        Convert(("y",), "z"),
    )
    program = Program("x", "z", tensors, steps)
    x = jnp.float32([[0.3], [9.0], [-9.0]])
    for fn in (p.run, p.simulate):
        np.testing.assert_array_equal(fn(program)(x), [[2.0], [6.0], [1.0]])


def test_a_maximum_of_windows_has_a_derivative_when_compiled():
    op = p.MaxPool(("x",), "y", (2, 2), (2, 2))
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    slope = jax.jit(jax.grad(lambda x: op.floats(x).sum()))(x)
    np.testing.assert_array_equal(np.nonzero(np.asarray(slope).ravel())[0], [5, 7, 13, 15])
