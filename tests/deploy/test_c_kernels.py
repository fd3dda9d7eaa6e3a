"""Layers that hypothesis draws, by the plain C kernels and by those for the DSP extension, whose
instructions are C here: both give the bits of the reference, and stay within their memory."""

import math
import re
import tempfile

import pytest
from built import Build, Q
from compiled import COMPILERS, SANITIZED, assert_same, expected, inputs, run_c
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax.program import UNBOUNDED, Encoding, Reshape

pytestmark = pytest.mark.skipif(not COMPILERS, reason="no C compiler")

BYTE = "(uint32_t)(uint16_t)({0})(bytes >> {1}) | (uint32_t)({0})(bytes >> {2}) << 16"
INSTRUCTIONS = {
    "sxtb16 %0, %1": "pair = " + BYTE.format("int8_t", 0, 16),
    "sxtb16 %0, %1, ror #8": "pair = " + BYTE.format("int8_t", 8, 24),
    "uxtb16 %0, %1": "pair = " + BYTE.format("uint8_t", 0, 16),
    "uxtb16 %0, %1, ror #8": "pair = " + BYTE.format("uint8_t", 8, 24),
    "smlad %0, %1, %2, %0": "sum += (int16_t)a * (int16_t)b"
    " + (int16_t)(a >> 16) * (int16_t)(b >> 16)",
}


def as_c(text):
    """The kernels for the DSP extension with C for its instructions; of others nothing changes."""
    part = r'__asm__(?: volatile)?\("(\w+tb16[^"]*|smlad[^"]*)"[^;]*;'
    return "#define DSP\n" + re.sub(part, lambda found: f"{INSTRUCTIONS[found[1]]};", text)


@st.composite
def layers(draw):
    """One convolution or dense layer of any kind."""
    size = st.integers(1, 9)
    groups, depth, each = draw(
        st.one_of(
            st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5)),
            st.tuples(st.integers(2, 13), st.just(1), st.just(1)),
        )
    )
    b = Build(
        (draw(size), draw(size), groups * depth),
        Encoding(0.05, draw(st.integers(0, 255))),
        draw(st.integers(0, 99)),
    )
    bits = draw(st.sampled_from([8, 4, 2]))
    to = draw(st.sampled_from([None, Q, Encoding(0.1, 3, 3, 200)]))
    clip = draw(st.sampled_from([UNBOUNDED, (0.0, 2.0)]))
    if draw(st.integers(0, 3)) == 0:
        flat = (math.prod(b.shape),)
        return b.add(Reshape, flat, b.encoding, flat).dense(groups * each, to, clip, bits).program()
    window = draw(st.tuples(*[st.integers(1, 4)] * 2))
    padding = tuple(draw(st.tuples(*[st.integers(0, k)] * 2)) for k in window)
    room = [n + sum(pair) for n, pair in zip(b.shape, padding, strict=False)]
    window = tuple(min(pair) for pair in zip(window, room, strict=True))
    dilation = tuple(
        draw(st.integers(1, min(3, (n - 1) // (k - 1)))) if k > 1 else 1
        for n, k in zip(room, window, strict=True)
    )
    strides = draw(st.tuples(*[st.integers(1, 3)] * 2))
    options = {"dilation": dilation, "groups": groups, "clip": clip, "to": to, "bits": bits}
    return b.conv(groups * each, window, strides, padding, **options).program()


def edges():
    """Windows of which rows or columns lie beside the input, and what is one, odd or alone."""
    for i, (shape, features, window, padding, options) in enumerate([
        ((4, 5, 6), 4, (1, 3), ((1, 2), (0, 2)), {}),
        ((4, 5, 6), 4, (3, 1), ((0, 2), (1, 2)), {"dilation": (2, 1)}),
        ((5, 4, 4), 6, (1, 1), ((1, 1), (1, 1)), {"groups": 2, "to": None}),
        ((1, 1, 5), 3, (3, 3), ((1, 1), (1, 1)), {"clip": (0.0, 0.5), "to": None}),
        ((3, 1, 7), 5, (2, 1), ((1, 0), (0, 0)), {"strides": (2, 1)}),
        ((5, 6, 9), 9, (3, 3), ((2, 2), (2, 2)), {"groups": 9, "dilation": (2, 1)}),
        ((6, 5, 4), 4, (2, 2), ((0, 1), (0, 1)), {"groups": 4, "strides": (2, 3)}),
        ((2, 3, 16), 2, (1, 1), ((0, 0), (0, 0)), {}),
    ]):  # fmt: skip
        for bits in (8, 4):
            b = Build(shape, Encoding(0.05, 77), seed=i)
            yield b.conv(features, window, padding=padding, bits=bits, **options).program()


def check_both(programs, pack):
    given = {f"layer_{i}": (program, inputs(program)) for i, program in enumerate(programs)}
    want = {name: expected(*pair) for name, pair in given.items()}
    for rewrite in (str, as_c):
        with tempfile.TemporaryDirectory() as folder:
            got = run_c(folder, given, SANITIZED, pack=pack, rewrite=rewrite)
        for name, (program, _) in given.items():
            assert_same(got[name], want[name], program, f"{rewrite} {name}")


def test_edges_give_the_bits_of_the_reference_by_both_kernels():
    check_both(edges(), pack=True)


@pytest.mark.parametrize("examples", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_drawn_layers_give_the_bits_of_the_reference_by_both_kernels(examples):
    @settings(max_examples=examples)
    @given(st.lists(layers(), min_size=10, max_size=10), st.booleans())
    def check(drawn, pack):
        check_both(drawn, pack)

    check()
