"""Programs that hypothesis draws, as C: in integers to the bit, and in floats."""

import math
import tempfile

import numpy as np
import pytest
from built import PRELU, RELU, RELU6, SLOPES, TANH, Build, Q, floats
from compiled import COMPILERS, SANITIZED, assert_same, expected, inputs, run_c
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax.program import (
    UNBOUNDED,
    Add,
    AveragePool,
    Clip,
    Concatenate,
    Convert,
    Encoding,
    Function,
    Gather,
    Largest,
    Maximum,
    MaxPool,
    Mean,
    Minimum,
    Multiply,
    Normalize,
    Pad,
    Reshape,
    Slice,
    Softmax,
    Transpose,
)

pytestmark = pytest.mark.skipif(not COMPILERS, reason="no C compiler")


@st.composite
def built_programs(draw):
    """A chain of random operations, some of which read an earlier tensor of the same shape."""
    size = st.integers(1, 6)
    b = Build(
        (draw(size), draw(size), draw(st.integers(1, 20))),
        draw(encodings),
        draw(st.integers(0, 99)),
    )
    for _ in range(draw(st.integers(1, 5))):
        draw(st.sampled_from(STEPS))(draw, b)
    draw(st.sampled_from([_leave, _mean, _flatten, _softmax, _normalize]))(draw, b)
    return b.program()


@st.composite
def _encodings(draw):
    low = draw(st.sampled_from([0, 0, 3]))
    high = draw(st.sampled_from([255, 255, 100, 15]))
    scale = draw(st.sampled_from([0.02, 0.0625, 0.1, 0.25]))
    return Encoding(scale, draw(st.integers(low, high)), low, high)


encodings = _encodings()
clips = st.sampled_from([UNBOUNDED, RELU, RELU6])
pairs = st.tuples(st.integers(0, 2), st.integers(0, 2))


def _window(draw, b):
    """Window, strides, padding, dilation that leave an output."""
    padding = draw(st.tuples(pairs, pairs))
    room = [n + sum(p) for n, p in zip(b.shape, padding, strict=False)]
    window = tuple(draw(st.integers(1, min(n, 4))) for n in room)
    dilation = tuple(
        draw(st.integers(1, max((n - 1) // (k - 1), 1) if k > 1 else 2))
        for n, k in zip(room, window, strict=True)
    )
    return window, draw(st.tuples(*[st.integers(1, 3)] * 2)), padding, dilation


def _conv(draw, b):
    window, strides, padding, dilation = _window(draw, b)
    channels = b.shape[2]
    groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    features = groups * draw(st.integers(1, 3))
    options = {"dilation": dilation, "groups": groups, "clip": draw(clips), "to": draw(encodings)}
    b.conv(features, window, strides, padding, bits=draw(st.sampled_from([8, 4, 3, 2])), **options)


def _pool(draw, b):
    window, strides, padding, _ = _window(draw, b)
    if draw(st.booleans()):
        b.pool(MaxPool, window, strides, padding)
    else:
        b.pool(AveragePool, window, strides, padding, draw(encodings))


def _earlier(draw, b):
    """A name of a tensor of the last one's shape, itself included."""
    made = [op.output for op in b.operations]
    return draw(st.sampled_from([name for name in made if b.tensors[name].shape == b.shape]))


def _pairwise(draw, b):
    last = b.last
    if draw(st.booleans()):
        # Of one axis only the first entry: it is repeated.
        axis = draw(st.integers(0, 2))
        stops = [1 if i == axis else n for i, n in enumerate(b.shape)]
        shape = b.shape
        b.add(Slice, stops, b.encoding, (0, 0, 0), tuple(stops), (1, 1, 1))
        other = b.last
    else:
        shape, other = b.shape, _earlier(draw, b)
    names = (last, other)[:: draw(st.sampled_from([1, -1]))]
    kind = draw(st.sampled_from([Add, Multiply, Maximum, Minimum]))
    fields = {Add: (draw(clips), draw(st.booleans())), Multiply: (draw(clips),)}.get(kind, ())
    b.add(kind, shape, draw(encodings), *fields, inputs=names)


def _join(draw, b):
    axis, shape = draw(st.integers(0, 2)), list(b.shape)
    shape[axis] *= 2
    b.add(Concatenate, shape, draw(encodings), axis, inputs=(_earlier(draw, b), b.last))


def _single(draw, b):
    slopes = np.linspace(-1, 1, b.shape[2], dtype=np.float32)
    prelu = Function, PRELU, (slopes, SLOPES[1])
    fields = draw(st.sampled_from([(Clip, -0.5, 1.1), (Function, TANH), (Convert,), prelu]))
    b.add(fields[0], b.shape, draw(encodings), *fields[1:])


def _move(draw, b):
    order = tuple(draw(st.permutations(range(3))))
    b.add(Transpose, [b.shape[axis] for axis in order], b.encoding, order)
    padding = draw(st.tuples(pairs, pairs, pairs))
    shape = [n + sum(p) for n, p in zip(b.shape, padding, strict=True)]
    b.add(Pad, shape, b.encoding, padding, draw(st.sampled_from([0.0, 0.7])))
    axis = draw(st.integers(0, 2))
    indices = tuple(draw(st.lists(st.integers(0, b.shape[axis] - 1), min_size=1, max_size=6)))
    shape = [len(indices) if i == axis else n for i, n in enumerate(b.shape)]
    b.add(Gather, shape, b.encoding, axis, indices)
    starts = [draw(st.integers(0, n - 1)) for n in b.shape]
    stops = [draw(st.integers(s + 1, n)) for s, n in zip(starts, b.shape, strict=True)]
    strides = draw(st.tuples(*[st.integers(1, 3)] * 3))
    shape = [-(-(e - s) // k) for s, e, k in zip(starts, stops, strides, strict=True)]
    b.add(Slice, shape, b.encoding, tuple(starts), tuple(stops), strides)


def _reduce(draw, b):
    axes = tuple(sorted(draw(st.sets(st.integers(0, 2), min_size=1))))
    kept = [n for i, n in enumerate(b.shape) if i not in axes]
    shape = tuple(1 if i in axes else n for i, n in enumerate(b.shape))
    if draw(st.booleans()):
        b.add(Mean, kept, draw(encodings), axes)
    else:
        b.add(Largest, kept, b.encoding, axes)
    b.add(Reshape, shape, b.encoding, shape)


def _leave(draw, b):
    b.add(Convert, b.shape, None)


def _mean(draw, b):
    b.add(Mean, b.shape[2:], draw(st.sampled_from([None, draw(encodings)])))


def _flatten(draw, b):
    b.add(Reshape, (math.prod(b.shape),), b.encoding, (math.prod(b.shape),))
    b.dense(
        draw(st.integers(1, 5)),
        draw(st.sampled_from([None, Q])),
        bits=draw(st.sampled_from([8, 4])),
    )


def _softmax(draw, b):
    b.add(Convert, b.shape, None).add(Softmax, b.shape, None, draw(st.integers(0, 2)))


def _normalize(draw, b):
    axes = tuple(sorted(draw(st.sets(st.integers(0, 2), min_size=1))))
    b.add(Convert, b.shape, None).add(Normalize, b.shape, None, axes, 0.1)


STEPS = [_conv, _conv, _pool, _pairwise, _join, _single, _move, _reduce]


@pytest.mark.parametrize("examples", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_random_programs_give_what_the_reference_gives(examples):
    @settings(max_examples=examples)
    @given(st.lists(built_programs(), min_size=8, max_size=12), st.booleans())
    def check(drawn, pack):
        given = {f"net_{i}": (program, inputs(program)) for i, program in enumerate(drawn)}
        for name, (program, _) in list(given.items())[::2]:
            program = floats(program)
            given[f"{name}_floats"] = program, inputs(program, finite=True)
        with tempfile.TemporaryDirectory() as folder:
            got = run_c(folder, given, SANITIZED, pack=pack)
        for name, (program, xs) in given.items():
            # Along a chain of floats the differences of its operations add up.
            assert_same(got[name], expected(program, xs), program, name, within=1e-4)

    check()
