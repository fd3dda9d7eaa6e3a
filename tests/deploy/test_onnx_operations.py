"""Operations in an ONNX file, each by itself, beside `program.run`."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_files import (
    FOUR_BITS,
    IMAGE,
    OUT,
    allowed,
    between,
    contents,
    on_grid,
    onnx,
    optimized,
    steps_apart,
)
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

from hybrid_jax import deploy
from hybrid_jax import program as p
from hybrid_jax.deploy import onnx_sessions, onnx_writer
from hybrid_jax.program import UNBOUNDED

# Whose largest value of no value at all ONNX has not.
REFUSED = ["max pool in wide padding"]


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


@settings(max_examples=8)
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


def test_operations_of_an_old_opset():
    names, program = together("integers", REFUSED)
    xs = [x for name in names for x in inputs(name)]
    old, new = (
        onnx_sessions.onnx_session(contents(program, opset=opset))(*xs) for opset in (13, 21)
    )
    for name, ours, theirs in zip(names, old, new, strict=True):
        np.testing.assert_array_equal(ours, theirs, name)


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
