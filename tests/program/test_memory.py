import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax.program import (
    Add,
    Clip,
    Concatenate,
    Constant,
    Convert,
    Encoding,
    Function,
    Maximum,
    Multiply,
    Program,
    Reshape,
    Slice,
    Softmax,
    Step,
    Tensor,
    Transpose,
    memory,
)
from hybrid_jax.program.memory import Buffer

TANH = (Step("tanh", (0,)),)
E = Encoding(1.0)


@st.composite
def buffers(draw):
    align = draw(st.sampled_from([(1,), (1, 4)]))
    spans = st.tuples(
        st.integers(0, 50), st.integers(0, 9), st.integers(0, 9), st.sampled_from(align)
    )
    drawn = draw(st.lists(spans, max_size=12))
    return {i: Buffer(n, min(a, b), max(a, b), unit) for i, (n, a, b, unit) in enumerate(drawn)}


def together(a, b):
    return a.first <= b.last and b.first <= a.last


@given(buffers())
def test_what_lives_at_one_time_does_not_overlap(given):
    placed = memory.place(given)
    assert set(placed) == set(given)
    for i, a in given.items():
        assert placed[i] >= 0 == placed[i] % a.align
        for j, b in given.items():
            if i != j and together(a, b) and a.size and b.size:
                assert placed[i] + a.size <= placed[j] or placed[j] + b.size <= placed[i]


@given(buffers())
def test_the_block_lies_between_what_is_live_and_the_sum(given):
    placed = memory.place(given)
    size = max((placed[i] + b.size for i, b in given.items()), default=0)
    live = [sum(b.size for b in given.values() if b.first <= t <= b.last) for t in range(10)]
    # Up to three bytes before each buffer make it start on a multiple of four.
    assert max(live) <= size <= sum(b.size + b.align - 1 for b in given.values())


def test_the_tightest_gap_is_taken():
    given = {
        "a": Buffer(20, 0, 9),
        "gone": Buffer(10, 0, 3),
        "b": Buffer(8, 0, 9),
        "too": Buffer(6, 0, 3),
        "c": Buffer(5, 0, 9),
        "late": Buffer(4, 5, 9),
    }
    placed = memory.place(given)
    # The largest first, one behind the other. From step 4 on bytes 20 to 29 and 38 to 43 are free:
    # the last takes the smaller gap.
    assert placed == {"a": 0, "gone": 20, "b": 30, "too": 38, "c": 44, "late": 38}


def program(*steps, encoding=E, outputs="y", **shapes):
    tensors = {"x": Tensor((1,))} | {n: Tensor(shape, encoding) for n, shape in shapes.items()}
    return Program("x", outputs, {"y": Tensor((1,))} | tensors, steps)


@pytest.mark.parametrize(
    "step",
    [
        Clip(("a",), "b", 0.0, 1.0),
        Convert(("a",), "b"),
        Function(("a",), "b", TANH),
        Reshape(("a",), "b", (2, 3)),
        Maximum(("a", "c"), "b"),
        Add(("c", "a"), "b"),
        Add(("a", "a"), "b"),
        Multiply(("a", "c"), "b"),
    ],
)
def test_an_elementwise_result_takes_the_place_of_what_is_not_read_again(step):
    shapes = {"a": (2, 3), "c": (2, 3), "b": (2, 3)}
    steps = (Convert(("x",), "c"), Convert(("x",), "a"), step)
    last = Add(("b", "c"), "y")
    assert memory.plan(program(*steps, last, **shapes)).size == 12
    if not isinstance(step, Reshape | Convert):
        # Where `a` is read again, `b` needs a place of its own.
        assert memory.plan(program(*steps, last, Add(("a", "b"), "y"), **shapes)).size == 18


def test_a_view_lives_as_long_as_any_of_its_names():
    # `b` is `a`; the sum with `c` may not fall on it, as `a` is read once more.
    steps = (
        Convert(("x",), "a"),
        Reshape(("a",), "b", (6,)),
        Function(("b",), "c", TANH),
        Add(("a", "c"), "y"),
    )
    plan = memory.plan(program(*steps, a=(2, 3), b=(6,), c=(6,)))
    assert plan.offsets["a"] == plan.offsets["b"] != plan.offsets["c"]
    assert plan.size == 12


def test_the_smaller_factor_is_no_place_for_the_product():
    steps = (Convert(("x",), "a"), Convert(("x",), "s"), Multiply(("a", "s"), "b"))
    steps += (Add(("a", "b"), "y"),)
    plan = memory.plan(program(*steps, a=(2, 2, 3), s=(1, 1, 3), b=(2, 2, 3)))
    # a and b of 12 bytes and s of 3 are live in the third step.
    assert plan.size == 27


def test_what_moves_has_room_of_its_own():
    steps = (Convert(("x",), "a"), Transpose(("a",), "b", (0,)), Convert(("b",), "y"))
    assert memory.plan(program(*steps, a=(4,), b=(4,))).size == 8


def test_rows_of_a_tensor_lie_in_it_and_other_parts_do_not():
    steps = (
        Convert(("x",), "a"),
        Slice(("a",), "b", (2, 0), (4, 3), (1, 1)),
        Slice(("b",), "c", (1, 0), (2, 3), (1, 1)),
        Slice(("a",), "d", (0, 1), (4, 3), (1, 1)),
        Slice(("a",), "e", (0, 0), (4, 3), (2, 1)),
        Function(("c",), "f", TANH),
        Concatenate(("d", "e", "f"), "g", 0),
        Convert(("g",), "y"),
    )
    shapes = {"a": (4, 3), "b": (2, 3), "c": (1, 3), "d": (4, 2), "e": (2, 3), "f": (1, 3)}
    plan = memory.plan(program(*steps, **shapes, g=(17,)))
    assert plan.offsets["b"] == plan.offsets["a"] + 6
    assert plan.offsets["c"] == plan.offsets["a"] + 9
    # A tensor is no place for the function of its last row; what is read last is written over.
    assert len({plan.offsets[name] for name in "adef"}) == 4
    # The rows of an input lie with it; what an output is cut from is no output's.
    steps = (Slice(("x",), "v", (1, 0), (3, 2), (1, 1)), Function(("v",), "w", TANH))
    steps += (Slice(("w",), "y", (1, 0), (2, 2), (1, 1)),)
    made = program(*steps, encoding=None, v=(2, 2), w=(2, 2))
    made.tensors.update(x=Tensor((3, 2)), y=Tensor((1, 2)))
    plan = memory.plan(made)
    assert plan.ends == {"x": "x", "v": "x"}
    assert plan.offsets == {"x": 0, "v": 8, "w": 0, "y": 8}


def test_rows_are_made_where_they_are_put_together_unless_they_are_read_again_or_views():
    steps = (
        Convert(("x",), "a"),
        Convert(("x",), "b"),
        Convert(("x",), "c"),
        Reshape(("b",), "v", (2, 3)),
        Concatenate(("a", "v", "c"), "d", 0),
        Add(("c", "c"), "e"),
        Concatenate(("d", "e"), "f", 0),
        Convert(("f",), "y"),
    )
    shapes = {"a": (1, 3), "b": (2, 3), "v": (2, 3), "c": (1, 3), "d": (4, 3), "e": (1, 3)}
    plan = memory.plan(program(*steps, **shapes, f=(5, 3)))
    start = plan.offsets["f"]
    assert [plan.offsets[name] - start for name in "ade"] == [0, 0, 12]
    assert plan.offsets["b"] == plan.offsets["v"] not in (start + 3, start + 9)
    assert plan.size == 12 + 3 + 6  # `e` is written over `c`


def test_scratch_lies_beside_what_is_live_in_its_step():
    steps = (Convert(("x",), "a"), Transpose(("a",), "b", (0,)), Convert(("b",), "y"))
    plan = memory.plan(program(*steps, a=(4,), b=(4,)), {"b": 5})
    assert plan.size == 13 + 3  # whole words, as what an operation needs begins at one
    assert len({plan.offsets["a"], plan.offsets["b"], plan.scratch["b"]}) == 3
    # In the first step only `a` is there: 4 bytes, and 5 fit into what the second needs anyway.
    assert memory.plan(program(*steps, a=(4,), b=(4,)), {"a": 4}).size == 8


def test_floats_take_four_bytes_each_from_a_multiple_of_four_on():
    steps = (Convert(("x",), "q"), Convert(("q",), "f"), Softmax(("f",), "g"))
    steps += (Convert(("g",), "r"), Concatenate(("q", "r"), "t", 0))
    made = program(*steps, outputs="t", q=(5,), r=(5,), t=(10,))
    made.tensors.update(f=Tensor((5,)), g=Tensor((5,)))
    plan = memory.plan(made)
    # In the softmax: two times 20 bytes, and 10 of which the first are there; whole words of them.
    assert plan.size == 50 + 2
    assert plan.offsets["f"] % 4 == plan.offsets["g"] % 4 == 0


def test_outputs_lie_with_the_caller_inputs_and_constants_where_they_are():
    value = np.ones(3, np.float32)
    steps = (Constant((), "c", value), Add(("x", "c"), "a"), Function(("a",), "b", TANH))
    steps += (Reshape(("b",), "y", (1, 3)), Reshape(("x",), "v", (3, 1)))
    made = program(*steps, encoding=None, outputs=("y", "a", "v"), c=(3,), a=(3,), b=(3,), v=(3, 1))
    made.tensors.update(x=Tensor((3,)), y=Tensor((1, 3)))
    plan = memory.plan(made)
    # `a` is returned: `b` does not take its place, though it is not read again.
    assert plan.ends == {"x": "x", "v": "x", "c": "c", "a": "a", "b": "y", "y": "y"}
    assert (set(plan.offsets.values()), plan.size) == ({0}, 0)


def test_an_output_of_another_dtype_is_made_in_the_block_and_stays():
    steps = (Convert(("x",), "n"), Function(("n",), "m", TANH), Convert(("m",), "o"))
    made = program(*steps, outputs=("n", "o"), n=(4,), m=(4,), o=(4,))
    made.tensors.update(n=Tensor((4,), None, "int32"), m=Tensor((4,)))
    plan = memory.plan(made)
    # `n` of 16 bytes is `x` itself, in floats; `m` takes 16 and `o`, encoded, 4.
    assert plan.ends == {"x": "x", "n": "x"}
    assert plan.size == 20
