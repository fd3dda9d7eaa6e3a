"""Every operation in JAX against NumPy, in exact integers, compiled as well."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import operation_cases
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operation_cases import CLASSES, SORTED, edges, forms_of
from operation_cases import compute as compute_op

from hybrid_jax import program as p
from hybrid_jax.program import Encoding, arithmetic

CASES = {
    name: (
        case.op,
        [dict(zip(edges(case.op), case.shapes, strict=True))[e] for e in case.op.inputs],
    )
    for name, case in operation_cases.CASES.items()
} | {"call": (p.Call(("a",), "b", **SORTED), [(5,)])}
"""{name: an operation, the shapes of its inputs}."""
ENCODED = [name for name, (op, _) in CASES.items() if op.integral]


def test_every_operation_has_its_tests():
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
    if isinstance(op, p.Conv):
        *window, inputs, outputs = weights.shape
        seen = windows(x, window, op.strides, op.dilation, op.padding)
        parts = []
        for group in range(op.groups):
            rows = slice(group * inputs, (group + 1) * inputs)
            columns = slice(group * outputs // op.groups, (group + 1) * outputs // op.groups)
            taps = weights.reshape(-1, inputs, outputs)[..., columns]
            parts.append(sum(s[..., rows] @ tap for s, tap in zip(seen, taps, strict=True)))
        return np.concatenate(parts, -1)
    if isinstance(op, p.AveragePool):
        return sum(windows(x, op.window, op.strides, (1, 1), op.padding))
    return {
        p.Dense: lambda: x @ weights,
        p.Multiply: lambda: x * values[-1],
        p.MatMul: lambda: x @ values[-1],
        p.Mean: lambda: x.sum(tuple(axis + 1 for axis in op.axes)),
        p.Convert: lambda: x,
        p.Concatenate: lambda: np.concatenate(values, op.axis + 1),
    }[type(op)]()


def in_float64(op, values):
    """The operation on values, by NumPy."""
    x = values[0] if values else op.value[None]
    if isinstance(op, p.Conv | p.Dense):
        weights = op.weights.values * np.float64(op.weights.scale)
        return np.clip(accumulate(op, values, weights) + op.weights.bias, *op.clip)
    if isinstance(op, p.MaxPool):
        seen = windows(x, op.window, op.strides, (1, 1), op.padding, -np.inf)
        return np.max(seen, 0)
    other = {
        p.Add: lambda: np.clip(x + (-values[-1] if op.minus else values[-1]), *op.clip),
        p.Multiply: lambda: np.clip(x * values[-1], *op.clip),
        p.Maximum: lambda: np.maximum(x, values[-1]),
        p.Minimum: lambda: np.minimum(x, values[-1]),
        p.Largest: lambda: x.max(tuple(axis + 1 for axis in op.axes)),
        p.Broadcast: lambda: np.broadcast_to(x, (len(x), *op.shape)),
        p.Gather: lambda: x.take(op.indices, op.axis + 1),
        p.Constant: lambda: x,
        p.Call: lambda: np.sort(x, -1),
        p.Normalize: lambda: normalized(x, tuple(axis + 1 for axis in op.axes), op.epsilon),
        p.Function: lambda: FUNCTIONS[tuple(step.name for step in op.steps)](
            *values, *map(np.float64, op.constants)
        ),
        p.Clip: lambda: np.clip(x, op.low, op.high),
        p.Reshape: lambda: x.reshape(-1, *op.shape),
        p.Transpose: lambda: np.moveaxis(
            x, [axis + 1 for axis in op.permutation], range(1, x.ndim)
        ),
        p.Pad: lambda: padded(x, op.padding, op.value),
        p.Slice: lambda: x[(slice(None), *map(slice, op.starts, op.stops, op.strides))],
        p.Softmax: lambda: softmax(x, op.axis if op.axis < 0 else op.axis + 1),
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
    if isinstance(op, p.AveragePool):
        inside = sum(windows(np.ones_like(values[0]), op.window, op.strides, (1, 1), op.padding))
        return math.prod(op.window) if op.count_padding else inside
    return math.prod(values[0].shape[a + 1] for a in op.axes) if isinstance(op, p.Mean) else 1


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
@settings(max_examples=3)
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
    assert np.abs(got - rounded).max() <= (0 if same or isinstance(op, p.Function) else 1)
    # To the last bit what the sum in int64 gives by one float32 product.
    np.testing.assert_array_equal(got, exact(op, q, given_, output))
    if isinstance(op, p.Conv):
        other = compute_op(op, inputs, given_, output, "matmul")
        np.testing.assert_array_equal(other, got)


def exact(op, q, given_, output):
    """The integers of the result, by NumPy."""
    steps = [v - e.zero_point for v, e in zip(q, given_, strict=True)]
    if not op.same_encoding and not isinstance(op, p.Function):
        return requantized(op, steps, given_, output)
    real = [s * np.float64(e.scale) for s, e in zip(steps, given_, strict=True)]
    rounded = np.rint(in_float64(op, real) / output.scale) + output.zero_point
    return np.clip(rounded, output.low, output.high)


def requantized(op, steps, given_, output):
    """q = clip(round(float32(accumulator) · multiplier)) + zero point, in NumPy."""
    scales = [e.scale for e in given_]
    if isinstance(op, p.Add):
        first, second, multiplier = arithmetic.addition(*given_, output)
        sums = steps[0] * first + steps[1] * second * (-1 if op.minus else 1)
        return finished(op, sums, multiplier, output)
    if isinstance(op, p.Constant):
        return finished(op, op.value[None], 1 / np.float32(output.scale), output)
    if isinstance(op, p.Clip):
        multiplier = arithmetic.multiplier(given_[0].scale, output=output)
        return finished(op, steps[0], multiplier, output)
    if isinstance(op, p.Concatenate | p.Maximum):
        parts = [
            finished(op, s, arithmetic.multiplier(e.scale, output=output), output)
            if e != output
            else s + e.zero_point
            for s, e in zip(steps, given_, strict=True)
        ]
        if isinstance(op, p.Concatenate):
            return np.concatenate(parts, op.axis + 1)
        return (np.minimum if isinstance(op, p.Minimum) else np.maximum)(*parts)
    if isinstance(op, p.Conv | p.Dense):
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
    clip = (op.low, op.high) if isinstance(op, p.Clip) else getattr(op, "clip", p.UNBOUNDED)
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
    steps = [p.Convert((a,), b) for a, b in itertools.pairwise(("x", "q", "floats", "other", "y"))]
    rng = np.random.default_rng(0)
    for scale in rng.uniform(0.1, 1, 4).astype(np.float32):
        q, other = Encoding(float(scale)), Encoding(2 * float(scale), 5)
        encoded = {"x": None, "q": q, "floats": None, "other": other, "y": None}
        tensors = {name: p.Tensor((256,), e) for name, e in encoded.items()}
        program = p.Program("x", "y", tensors, tuple(steps))
        floats = np.arange(256, dtype=np.float32) * scale
        want = np.rint(floats * (np.float32(1) / np.float32(other.scale))) + 5
        want = (np.clip(want, 0, 255) - 5).astype(np.float32) * np.float32(other.scale)
        np.testing.assert_array_equal(jax.jit(p.run(program))(floats[None])[0], want)


def test_a_shape_that_is_not_the_programs():
    program = p.Program("x", "x", {"x": p.Tensor((2, 3))}, ())
    with pytest.raises(ValueError, match=r"x must have shape \(B, 2, 3\), got \(4, 2\)"):
        p.run(program)(jnp.ones((4, 2)))


def test_a_maximum_of_windows_has_a_derivative_when_compiled():
    op = p.MaxPool(("x",), "y", (2, 2), (2, 2))
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    slope = jax.jit(jax.grad(lambda x: op.floats(x).sum()))(x)
    np.testing.assert_array_equal(np.nonzero(np.asarray(slope).ravel())[0], [5, 7, 13, 15])
