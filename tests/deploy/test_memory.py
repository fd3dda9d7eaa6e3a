import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax.deploy import memory
from hybrid_jax.deploy.memory import Buffer
from hybrid_jax.deploy.program import (
    Add,
    Clip,
    Concatenate,
    Convert,
    Encoding,
    Lookup,
    Multiply,
    Program,
    Reshape,
    Tensor,
)

E = Encoding(1.0)


@st.composite
def buffers(draw):
    spans = st.tuples(st.integers(0, 50), st.integers(0, 9), st.integers(0, 9))
    drawn = draw(st.lists(spans, max_size=12))
    return {i: Buffer(size, min(ends), max(ends)) for i, (size, *ends) in enumerate(drawn)}


def together(a, b):
    return a.first <= b.last and b.first <= a.last


@given(buffers())
def test_what_lives_at_one_time_does_not_overlap(given):
    placed = memory.place(given)
    assert set(placed) == set(given)
    for i, a in given.items():
        assert placed[i] >= 0
        for j, b in given.items():
            if i != j and together(a, b) and a.size and b.size:
                assert placed[i] + a.size <= placed[j] or placed[j] + b.size <= placed[i]


@given(buffers())
def test_the_block_lies_between_what_is_live_and_the_sum(given):
    placed = memory.place(given)
    size = max((placed[i] + b.size for i, b in given.items()), default=0)
    live = [sum(b.size for b in given.values() if b.first <= t <= b.last) for t in range(10)]
    assert max(live) <= size <= sum(b.size for b in given.values())


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


def program(*steps, **shapes):
    tensors = {"x": Tensor((1,)), **{name: Tensor(shape, E) for name, shape in shapes.items()}}
    return Program("x", "y", tensors | {"y": Tensor((1,))}, steps)


@pytest.mark.parametrize(
    "step",
    [
        Clip(("a",), "b", 0.0, 1.0),
        Convert(("a",), "b"),
        Lookup(("a",), "b", "tanh"),
        Reshape(("a",), "b"),
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
        Reshape(("a",), "b"),
        Lookup(("b",), "c", "tanh"),
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
    steps = (Convert(("x",), "a"), Concatenate(("a",), "b", 0), Convert(("b",), "y"))
    assert memory.plan(program(*steps, a=(4,), b=(4,))).size == 8


def test_scratch_lies_beside_what_is_live_in_its_step():
    steps = (Convert(("x",), "a"), Concatenate(("a",), "b", 0), Convert(("b",), "y"))
    plan = memory.plan(program(*steps, a=(4,), b=(4,)), {"b": 5})
    assert plan.size == 13
    assert len({plan.offsets["a"], plan.offsets["b"], plan.scratch["b"]}) == 3
    # In the first step only `a` is there: 4 bytes, and 5 fit into what the second needs anyway.
    assert memory.plan(program(*steps, a=(4,), b=(4,)), {"a": 4}).size == 8
