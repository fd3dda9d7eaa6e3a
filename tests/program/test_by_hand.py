"""Every operation by hand, in floats and in integers."""

import math
from typing import NamedTuple

import jax
import numpy as np
import pytest
from operation_cases import CLASSES, RELU, SORTED, compute, forms_of

from hybrid_jax import program as p
from hybrid_jax.program import Encoding

HALF = Encoding(0.5, 10)  # 12 is 1.0
QUARTER = Encoding(0.25)  # 6 is 1.5
UNIT, FIVE, BOTH = Encoding(1.0), Encoding(1.0, 5), [HALF, QUARTER]


def kernel(values, scale=None):
    """Integer weights of that scale for all channels with a bias of 1 for each, or float ones."""
    values = np.asarray(values)
    ones = np.ones(values.shape[-1], np.float32)
    if scale is None:
        return p.Weights(values.astype(np.float32), None, ones)
    return p.Weights(values.astype(np.int8), ones * np.float32(scale), ones, 8)


def one(name):
    """The facts of a function that is one step of its input."""
    return {"steps": (p.Step(name, (0,)),)}


# max(x, 0) + slope · min(x, 0), of the constants slope and 0.
PRELU = {
    "steps": (
        p.Step("max", (0, 2)),
        p.Step("min", (0, 2)),
        p.Step("mul", (1, 4)),
        p.Step("add", (3, 5)),
    ),
    "constants": (np.float32([0.5, 0.25]), np.array(0, np.float32)),
}
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
    "dense": Hand(p.Dense, {"weights": kernel([[3], [-4]])}, [[2, 3]], [None], None, [-5]),
    # Steps 2 and −1: 6 + 4 = 10, the bias 1 is 8 steps of 0.5 · 0.25. 18 · 0.125 = 2.25
    # = 4.5 · 0.5, to even 4, and 4.
    "dense q": Hand(p.Dense, {"weights": ROW}, [[12, 9]], [HALF], Encoding(0.5, 4), [8]),
    "dense q to floats": Hand(p.Dense, {"weights": ROW}, [[12, 9]], [HALF], None, [2.25]),
    # −6 − 4 = −10 and 8: −0.25, which a ReLU makes the zero point.
    "dense q relu": Hand(
        p.Dense,
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
        p.Conv,
        {"weights": kernel(np.ones((2, 2, 1, 1))), "padding": AROUND},
        [IMAGE],
        [None],
        None,
        [[[4], [3]], [[11], [7]]],
    ),
    # The same values at zero point 5; halves go to even: 4 / 2, 3 / 2 → 2, 11 / 2 → 6, 7 / 2 → 4.
    "conv q": Hand(
        p.Conv,
        {"weights": SQUARE, "padding": AROUND},
        [np.add(IMAGE, 5)],
        [FIVE],
        Encoding(2.0),
        [[[2], [2]], [[6], [4]]],
    ),
    # At stride 2 the first row of the above at its first column.
    "conv q strides": Hand(
        p.Conv,
        {"weights": SQUARE, "padding": AROUND, "strides": (2, 2)},
        [np.add(IMAGE, 5)],
        [FIVE],
        UNIT,
        [[[4]]],
    ),
    # Taps two apart: 3·1 − 4·3, 3·2 − 4·4, 3·3 − 4·5, and 1: −8, −9, −10.
    "conv q dilation": Hand(
        p.Conv,
        {"weights": TAPS, "dilation": (1, 2)},
        [[[[1], [2], [3], [4], [5]]]],
        [UNIT],
        Encoding(1.0, 20),
        [[[12], [11], [10]]],
    ),
    # Output 0 reads channels 0, 1 by 1, 3: 1 + 6; output 1 reads 2, 3 by 2, 4: 6 + 16.
    "conv q groups": Hand(
        p.Conv,
        {"weights": kernel([[[[1, 2], [3, 4]]]], 1.0), "groups": 2},
        [[[[1, 2, 3, 4]]]],
        [UNIT],
        UNIT,
        [[[8, 23]]],
    ),
    "conv q depthwise": Hand(
        p.Conv,
        {"weights": kernel([[[[2, -3]]]], 1.0), "groups": 2},
        [[[[5, 7]]]],
        [UNIT],
        Encoding(1.0, 100),
        [[[111, 80]]],
    ),
    "add": Hand(p.Add, {"clip": RELU}, [[1, -2], [2, 1]], [None] * 2, None, [3, 0]),
    # 1 + 1.5 = 2.5, to even 2, and 1; −5 + 0 is clipped at 0.
    "add q": Hand(p.Add, {"clip": RELU}, [[12, 0], [6, 0]], BOTH, Encoding(1.0, 1), [3, 1]),
    "multiply": Hand(p.Multiply, {}, [[[[2, 3]]], [[[4, 5]]]], [None] * 2, None, [[[8, 15]]]),
    # 1 · 1.5 = 3 steps of 0.5; −5 · 1.5 ends at 0 of the integers.
    "multiply q": Hand(p.Multiply, {}, [[12, 0], [6, 6]], BOTH, Encoding(0.5, 1), [4, 0]),
    "multiply q broadcast": Hand(
        p.Multiply, {}, [[[[12], [14]]], [[[6]]]], BOTH, Encoding(0.5), [[[3], [6]]]
    ),
    "clip": Hand(p.Clip, {"low": 0.0, "high": 3.0}, [[-1, 2, 9]], [None], None, [0, 2, 3]),
    # 0 is 10, 3 is 16.
    "clip q": Hand(p.Clip, {"low": 0.0, "high": 3.0}, [[3, 12, 40]], [HALF], HALF, [10, 12, 16]),
    # A window of the padding and the first row, one of the second and the padding.
    "max pool": Hand(p.MaxPool, POOL, [np.negative(IMAGE)], [None], None, [[[-1]], [[-3]]]),
    "max pool q": Hand(p.MaxPool, POOL, [IMAGE], [HALF], HALF, [[[2]], [[4]]]),
    # Steps 2, 4 after a 0: (0 + 2) / 2 and 3 halves, in quarters.
    "average pool q": Hand(
        p.AveragePool,
        {"window": (2, 1), "strides": (1, 1), "padding": ((1, 0), (0, 0))},
        [[[[12]], [[14]]]],
        [HALF],
        QUARTER,
        [[[2]], [[6]]],
    ),
    "average pool": Hand(
        p.AveragePool, {"window": (2, 2), "strides": (2, 2)}, [IMAGE], [None], None, [[[2.5]]]
    ),
    "mean": Hand(p.Mean, {}, [IMAGE], [None], None, [2.5]),
    # Steps 1, 2, 4, 4: 11 / 4 halves are 5.5 quarters, to even 6.
    "mean q": Hand(p.Mean, {}, [[[[11], [12]], [[14], [14]]]], [HALF], QUARTER, [6]),
    "mean q to floats": Hand(p.Mean, {}, [[[[11], [12]], [[14], [14]]]], [HALF], None, [1.375]),
    "concatenate": Hand(p.Concatenate, {"axis": 0}, [[1], [2, 3]], [None] * 2, None, [1, 2, 3]),
    # 1 and 1.5 are 2 and 3 halves.
    "concatenate q": Hand(p.Concatenate, {"axis": 0}, [[12], [6]], BOTH, Encoding(0.5, 1), [3, 4]),
    "reshape": Hand(
        p.Reshape, {"shape": (2, 3)}, [[0, 1, 2, 3, 4, 5]], [HALF], HALF, [[0, 1, 2], [3, 4, 5]]
    ),
    "transpose": Hand(
        p.Transpose,
        {"permutation": (1, 0)},
        [[[1, 2, 3], [4, 5, 6]]],
        [HALF],
        HALF,
        [[1, 4], [2, 5], [3, 6]],
    ),
    "pad": Hand(p.Pad, {"padding": ((1, 2),)}, [[7]], [None], None, [0, 7, 0, 0]),
    # Zero is 10.
    "pad q": Hand(p.Pad, {"padding": ((1, 2),)}, [[7]], [HALF], HALF, [10, 7, 10, 10]),
    "slice": Hand(
        p.Slice,
        {"starts": (1,), "stops": (5,), "strides": (2,)},
        [[0, 1, 2, 3, 4, 5]],
        [HALF],
        HALF,
        [1, 3],
    ),
    "logistic": Hand(p.Function, one("logistic"), [[0, math.log(3)]], [None], None, [0.5, 0.75]),
    # 0.5 of 1/256; the greatest, 1 / (1 + e^−12.7), is 256 and clipped.
    "logistic q": Hand(
        p.Function,
        one("logistic"),
        [[128, 255]],
        [Encoding(0.1, 128)],
        Encoding(1 / 256),
        [128, 255],
    ),
    # 1 in steps of 1/64; e^1 = 2.71828 is 173.97 of them.
    "exp q": Hand(
        p.Function, one("exp"), [[128, 138]], [Encoding(0.1, 128)], Encoding(1 / 64), [64, 174]
    ),
    # tanh(0.5) = 0.46212 is 59.15 of 1/128.
    "tanh q": Hand(
        p.Function,
        one("tanh"),
        [[128, 133]],
        [Encoding(0.1, 128)],
        Encoding(1 / 128, 100),
        [100, 159],
    ),
    # A channel of slope 0.5 and one of 0.25, below zero.
    "prelu": Hand(p.Function, PRELU, [[[-4, -4], [2, 2]]], [None], None, [[-2, -1], [2, 2]]),
    # 4 is −3 and 12 is 1 of halves: −1.5 and −0.75, 1 and 1, in quarters from 10.
    "prelu q": Hand(
        p.Function, PRELU, [[[4, 4], [12, 12]]], [HALF], Encoding(0.25, 10), [[4, 7], [14, 14]]
    ),
    # −1 / 2 and 3 / 4, of two tensors.
    "quotient": Hand(
        p.Function,
        {"steps": (p.Step("div", (0, 1)),)},
        [[-1, 3], [2, 4]],
        [None] * 2,
        None,
        [-0.5, 0.75],
    ),
    "softmax": Hand(p.Softmax, {}, [[0, math.log(3)]], [None], None, [0.25, 0.75]),
    "softmax of rows": Hand(
        p.Softmax,
        {"axis": 0},
        [[[0, 1], [math.log(3), 1]]],
        [None],
        None,
        [[0.25, 0.5], [0.75, 0.5]],
    ),
    # Mean 2, deviation 1; the squares' mean and 3 are 4.
    "normalize": Hand(
        p.Normalize, {"axes": (0,), "epsilon": 3.0}, [[1, 3]], [None], None, [-0.5, 0.5]
    ),
    "matmul": Hand(p.MatMul, {}, [[[1, 2]], [[3], [4]]], [None] * 2, None, [[11]]),
    # 1 and −1 of halves by 2 and 4 of quarters: 2 − 4 = −2 eighths are −0.25.
    "matmul q": Hand(p.MatMul, {}, [[[11, 9]], [[2], [4]]], BOTH, Encoding(0.125, 5), [[3]]),
    "matmul q to floats": Hand(p.MatMul, {}, [[[11, 9]], [[2], [4]]], BOTH, None, [[-0.25]]),
    "minus": Hand(p.Add, {"minus": True}, [[5, 1], [2, 3]], [None] * 2, None, [3, -2]),
    # 1 − 1.5 = −0.5 and −5 − 0 = −5, which ends at 0.
    "minus q": Hand(p.Add, {"minus": True}, [[12, 0], [6, 0]], BOTH, HALF, [9, 0]),
    # The row (1, 2) to each of two rows.
    "add a row": Hand(
        p.Add, {}, [[[1, 2]], [[10, 20], [30, 40]]], [None] * 2, None, [[11, 22], [31, 42]]
    ),
    "maximum": Hand(p.Maximum, {}, [[1, 5], [3, 2]], [None] * 2, None, [3, 5]),
    # 1 and −5 in halves, 1.5 and 0.5 in quarters: 1.5 and 0.5 in halves from 10.
    "maximum q": Hand(p.Maximum, {}, [[12, 0], [6, 2]], BOTH, HALF, [13, 11]),
    "minimum": Hand(p.Minimum, {}, [[1, 5], [3, 2]], [None] * 2, None, [1, 2]),
    "minimum q": Hand(p.Minimum, {}, [[12, 0], [6, 2]], BOTH, HALF, [12, 0]),
    "mean of rows": Hand(p.Mean, {"axes": (1,)}, [[[1, 3], [5, 9]]], [None], None, [2, 7]),
    "largest": Hand(p.Largest, {"axes": (0,)}, [[[1, 9], [5, 3]]], [HALF], HALF, [5, 9]),
    # The corner sees 4 values, the edge 6; all are 3 here, whatever the padding.
    "average pool of what is there": Hand(
        p.AveragePool, WITHIN, [IMAGE], [None], None, [[[1.5], [2]], [[2.5], [3]]]
    ),
    "average pool of what is there q": Hand(
        p.AveragePool, WITHIN, [np.add(IMAGE, 5)], [FIVE], Encoding(0.5), [[[3], [4]], [[5], [6]]]
    ),
    "broadcast": Hand(
        p.Broadcast, {"shape": (2, 3)}, [[[1], [2]]], [HALF], HALF, [[1] * 3, [2] * 3]
    ),
    "gather": Hand(
        p.Gather,
        {"axis": 1, "indices": (2, 0, 0)},
        [[[1, 2, 3], [4, 5, 6]]],
        [HALF],
        HALF,
        [[3, 1, 1], [6, 4, 4]],
    ),
    # 1.2 is 2.4 halves from 10.
    "pad with a value": Hand(
        p.Pad, {"padding": ((1, 1),), "value": 1.2}, [[7]], [HALF], HALF, [12, 7, 12]
    ),
    "constant": Hand(p.Constant, {"value": np.float32([1.5, -2])}, [], [], None, [1.5, -2]),
    "constant q": Hand(p.Constant, {"value": np.float32([1.5, -2])}, [], [], HALF, [13, 6]),
    # Pairs are sorted, three examples at a time.
    "call": Hand(p.Call, SORTED, [[3, 1]], [None], None, [1, 3]),
    # 1.5 to even 2, 2.5 to even 2; what is too large or small is the end, NaN is zero.
    "quantize": Hand(
        p.Convert, {}, [[0.75, 1.25, -99, math.inf, math.nan]], [None], HALF, [12, 12, 0, 255, 10]
    ),
    "quantize to 4 bits": Hand(
        p.Convert, {}, [[0.75, 9.0, -9.0]], [None], Encoding(0.5, 8, 1, 15), [10, 15, 1]
    ),
    # 1 is 4 quarters; −5 ends at 0.
    "requantize": Hand(p.Convert, {}, [[12, 0]], [HALF], QUARTER, [4, 0]),
    "dequantize": Hand(p.Convert, {}, [[12, 0]], [HALF], None, [1.0, -5.0]),
}


def operation(kind, facts, inputs):
    """An operation of inputs 'x', 'x1', …, output 'y'."""
    names = ("x", *(f"x{i}" for i in range(1, inputs)))[:inputs]
    return kind(names, "y", *(["site"] if kind in (p.Conv, p.Dense) else []), **facts)


@pytest.fixture(scope="module")
def results():
    """What all operations return, by name and form, for one example without the batch."""

    def every(values):
        outputs = {}
        for name, case in BY_HAND.items():
            op = operation(case.kind, case.facts, len(case.given))
            for form in forms_of(case.kind):
                y = compute(op, values[name], case.encodings, case.output, form)
                outputs[name, form] = y[0]
        return outputs

    values = {
        name: [
            np.asarray(value, np.float32 if encoding is None else np.uint8)[None]
            for value, encoding in zip(case.given, case.encodings, strict=True)
        ]
        for name, case in BY_HAND.items()
    }
    return jax.jit(every)(values)


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name, case in BY_HAND.items() for form in forms_of(case.kind)],
)
def test_by_hand(results, name, form):
    case, got = BY_HAND[name], results[name, form]
    np.testing.assert_allclose(got, np.asarray(case.result), rtol=1e-6)
    assert got.shape == np.shape(case.result)
    assert got.dtype == (np.float32 if case.output is None else np.uint8)


def test_every_operation_is_there():
    assert {case.kind for case in BY_HAND.values()} == CLASSES


def test_the_simulation_rounds_every_encoded_tensor():
    # 0.3 is 1 quarter; 0.25 · 3 + 1 = 1.75 is 4 halves to even, a ReLU6 of 4 · 0.5 is 2.
    weights = kernel([[3]], 1.0)
    tensors = {"x": p.Tensor((1,)), "q": p.Tensor((1,), QUARTER), "y": p.Tensor((1,), HALF)}
    tensors["z"] = p.Tensor((1,))
    steps = (
        p.Convert(("x",), "q"),
        p.Dense(("q",), "y", "site", weights, clip=(0.0, 6.0)),
        p.Convert(("y",), "z"),
    )
    program = p.Program("x", "z", tensors, steps)
    x = np.float32([[0.3], [9.0], [-9.0]])
    for fn in (p.run, p.simulate):
        np.testing.assert_array_equal(fn(program)(x), [[2.0], [6.0], [1.0]])
