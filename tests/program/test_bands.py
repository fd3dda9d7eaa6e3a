"""Bands of rows: the bits of the whole, each row computed once, in less memory."""

import dataclasses
import tempfile

import jax
import numpy as np
import pytest
from built import RELU, RELU6, Build, Q
from compiled import COMPILERS, SANITIZED, assert_same, expected, inputs, run_c
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax.deploy import c_statements, c_text
from hybrid_jax.program import (
    Add,
    AveragePool,
    Clip,
    Concatenate,
    Conv,
    Encoding,
    MaxPool,
    Mean,
    bands,
    memory,
    run,
)


def none(program):
    return {}


def rows_computed(program, kinds=(Conv, MaxPool, AveragePool)):
    """Of every kernel, or kind of pool, the rows of its results."""
    found = {}
    for op in program.operations:
        if isinstance(op, kinds):
            key = getattr(op, "name", type(op))
            found[key] = found.get(key, 0) + program.tensors[op.output].shape[0]
    return found


@st.composite
def programs(draw):
    """Convolutions, pools, sums and clips of an image, some of an earlier tensor."""
    b = Build(tuple(draw(st.integers(3, n)) for n in (14, 5, 4)), seed=draw(st.integers(0, 99)))
    earlier = []
    for _ in range(draw(st.integers(2, 6))):
        earlier.append((b.last, b.shape))
        same = [name for name, shape in earlier if shape == b.shape]
        kind = draw(st.sampled_from(["conv", "conv", "pool", "add", "clip"]))
        window = tuple(draw(st.integers(1, min(n, 3))) for n in b.shape[:2])
        padding = tuple(draw(st.tuples(*[st.integers(0, k - 1)] * 2)) for k in window)
        strides = draw(st.tuples(*[st.integers(1, 3)] * 2))
        if kind == "conv":
            room = [n + sum(pair) for n, pair in zip(b.shape, padding, strict=False)]
            dilation = tuple(2 if 2 * (k - 1) < n else 1 for k, n in zip(window, room, strict=True))
            groups = draw(st.sampled_from([1, b.shape[2]]))
            b.conv(2 * groups, window, strides, padding, dilation=dilation, groups=groups)
        elif kind == "pool":
            b.pool(draw(st.sampled_from([MaxPool, AveragePool])), window, strides, padding)
        elif kind == "add":
            b.add(Add, b.shape, Encoding(0.1, 99), inputs=(b.last, draw(st.sampled_from(same))))
        else:
            b.add(Clip, b.shape, b.encoding, -0.5, 1.1)
    return b.program()


@st.composite
def parts(draw):
    """(program, a part of it, how many rows at a time)."""
    program = draw(programs())
    count = len(program.operations)
    every = [range(i, j) for i in range(count) for j in range(i + 1, count + 1)]
    part = draw(st.sampled_from([part for part in every if bands._alone(program, part)]))
    height = program.tensors[program.operations[part[-1]].output].shape[0]
    return program, part, draw(st.integers(1, height))


@pytest.mark.skipif(not COMPILERS, reason="no C compiler")
@pytest.mark.parametrize("examples", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_any_part_in_bands_of_any_height_has_the_bits_of_the_whole(examples):
    @settings(max_examples=examples)
    @given(st.lists(parts(), min_size=4, max_size=4))
    def check(drawn):
        given = {}
        for i, (program, part, rows) in enumerate(drawn):
            made = bands.banded_part(program, part, rows)
            xs = inputs(program)
            want = jax.jit(run(program))(*xs)
            np.testing.assert_array_equal(jax.jit(run(made))(*xs), want)
            once, whole = rows_computed(made), rows_computed(program)
            assert all(once[name] <= whole[name] for name in whole)
            given[f"net_{i}"] = made, xs
        with tempfile.TemporaryDirectory() as folder:
            got = run_c(folder, given, SANITIZED)
        for name, pair in given.items():
            assert_same(got[name], expected(*pair), pair[0], name)

    check()


def test_memory_by_hand():
    b = Build((16, 8, 2)).conv(6).conv(1)
    program = b.add(Concatenate, (16, 16, 1), Q, 1, inputs=(b.last, b.last)).program()
    # Of the input, 8 · 16 · 2 bytes, and of what is between, 8 · 16 · 6.
    assert memory.plan(program).size == 256 + 768
    made = bands.banded_part(program, range(0, 3), 2)
    assert rows_computed(made) == rows_computed(program) == {"conv 2": 16, "conv 3": 16}
    # Two rows of the result are made of four of what is between, of 48 bytes, of which two were
    # kept; these of four of the input, of 16 bytes; the result has 128 bytes.
    live = bands._live(made, none)
    assert max(live) == 2 * 48 + 4 * 48 + 4 * 16 + 128
    assert max(live) <= memory.plan(made).size <= 1.1 * max(live)


def mobilenet(width, side):
    """MobileNetV2's layers."""
    b = Build((side, side, 3)).conv(16, strides=(2, 2), padding=((0, 1), (0, 1)), clip=RELU6)
    for expansion, features, count, stride in [
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
        (6, 160, 3, 2), (6, 320, 1, 1),
    ]:  # fmt: skip
        features = max(8, int(features * width + 4) // 8 * 8)
        for i in range(count):
            before, shape, wide = b.last, b.shape, expansion * b.shape[2]
            none = ((0, 0), (0, 0))
            if expansion > 1:
                b.conv(wide, (1, 1), padding=none, clip=RELU6)
            step = 1 if i else stride
            padding = ((2 - step, 1), (2 - step, 1))
            b.conv(wide, strides=(step, step), padding=padding, groups=wide, clip=RELU6)
            b.conv(features, (1, 1), padding=none)
            if b.shape == shape:
                b.add(Add, shape, Q, inputs=(before, b.last))
    return b.add(Mean, b.shape[2:], Q).dense(10).program()


def test_a_mobilenet_takes_less_than_a_third_of_its_memory():
    program = mobilenet(0.35, 96)
    made = bands.in_bands(program, c_statements._scratch)
    sizes = [memory.plan(own, c_statements._scratch(own)).size for own in (program, made)]
    # The widest tensor, of 48 · 48 · 48 bytes, and what is made of it, besides scratch.
    assert sizes[0] >= 48 * 48 * 48 + 24 * 24 * 48
    assert sizes[1] < sizes[0] / 3
    once, whole = rows_computed(made), rows_computed(program)
    assert once == whole  # no multiply-accumulate is there twice
    # What it takes more of flash is less than what it saves of RAM.
    bodies = []
    for own in (program, made):
        constants = c_text.Constants()
        bodies.append(c_statements.body(own, constants, pack=False))
    assert bodies[0].ram == bodies[1].ram == sizes[1]


def test_what_is_small_or_no_image_stays_whole():
    for program in (
        Build((6, 5, 3)).conv(4, clip=RELU).conv(4).program(),
        Build((4000,)).dense(300, Q).dense(4).program(),
        Build((64, 64, 1)).add(Mean, (64,), Q, (0, 2)).dense(4).program(),
    ):
        assert bands.in_bands(program, none) is program


def test_nothing_that_is_read_elsewhere_is_inside_of_a_part():
    b = Build((30, 30, 4)).conv(8)
    inner = b.last
    program = b.conv(8).add(Add, b.shape, Q, inputs=(inner, b.last)).program()
    assert not bands._alone(program, range(0, 3))
    assert bands._alone(program, range(0, 4))
    assert not bands._alone(dataclasses.replace(program, outputs=(inner, b.last)), range(0, 4))
