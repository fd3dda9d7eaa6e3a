import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax.quantization.program import Limit, Sum, Table, count, solve

OPTIONS = {"a": (2, 4), "b": (2, 3, 8), "c": (1, 5, 9)}
SCOPES = [("a",), ("b",), ("c",), (), ("a", "b"), ("c", "b"), ("b", "a", "c")]


def shape(of):
    return tuple(len(OPTIONS[d]) for d in of)


def enumerate_choices():
    for chosen in itertools.product(*(range(len(each)) for each in OPTIONS.values())):
        yield dict(zip(OPTIONS, chosen, strict=True))


@st.composite
def tables(draw, scopes, entries):
    of = draw(st.sampled_from(scopes))
    n = int(np.prod(shape(of)))
    values = draw(st.lists(entries, min_size=n, max_size=n))
    return Table(of, np.array(values).reshape(shape(of)))


sums = st.builds(
    Sum,
    st.lists(tables(SCOPES, st.integers(0, 40)), min_size=1, max_size=3).map(tuple),
    st.sampled_from([1, 1, 8]),
)
rows = st.lists(sums, min_size=1, max_size=3).map(tuple)
limits = st.lists(
    st.builds(
        Limit,
        st.just("bytes"),
        st.integers(0, 150),
        st.lists(rows, min_size=1, max_size=2).map(tuple),
    ),
    min_size=1,
    max_size=2,
)
damages = st.lists(tables([("a",), ("b",), ("c",)], st.integers(-50, 50)), min_size=1, max_size=4)


@settings(max_examples=60)
@given(damages, limits)
def test_equals_brute_force(damage, limits):
    limits = [limit._replace(name=f"bytes{i}") for i, limit in enumerate(limits)]

    def total(choice):
        return sum(table.values[tuple(choice[d] for d in table.of)] for table in damage)

    fitting = [
        choice
        for choice in enumerate_choices()
        if all(count(limit, choice) <= limit.budget for limit in limits)
    ]
    if fitting:
        choice = solve(OPTIONS, damage, limits)
        assert choice in fitting
        assert total(choice) == min(map(total, fitting))
        return
    # The first limit that those before it make impossible, and the least it can be.
    kept = list(enumerate_choices())
    for limit in limits:
        least = min(count(limit, choice) for choice in kept)
        if least > limit.budget:
            break
        kept = [choice for choice in kept if count(limit, choice) <= limit.budget]
    with pytest.raises(ValueError, match=f"budget of {limit.name} must be at least {least}( |,)"):
        solve(OPTIONS, damage, limits)


def test_count_by_hand():
    # ⌈(3 + 5) / 3⌉ + 10 = 13 in the first row, 4 in the second.
    choice = {"a": 1, "b": 0}
    a, both = Table(("a",), np.array([0, 3])), Table(("b", "a"), np.array([[1, 5], [7, 9]]))
    first = (Sum((a, both), 3), Sum((Table((), np.array(10)),)))
    second = (Sum((Table(("b",), np.array([4, 0])),)),)
    assert count(Limit("bytes", 0, (first, second)), choice) == 13


def test_large_numbers_are_kept_to_the_unit():
    # Sums near 10^13 that differ by one: the solver's tolerance cannot tell them apart.
    size = 10**12
    options = {i: (0, 1) for i in range(10)}
    tables = tuple(Table((i,), np.array([0, size + i])) for i in options)
    damage = [Table((i,), np.array([1.0, 0.0])) for i in options]
    # Three fit only if their rests are 0, 1 and 2.
    limit = Limit("bops", 3 * size + 3, ((Sum(tables),),))
    choice = solve(options, damage, [limit])
    assert [i for i in options if choice[i]] == [0, 1, 2]
    with pytest.raises(ValueError, match="budget of bops must be at least 0, got -1"):
        solve(options, damage, [limit._replace(budget=-1)])


def test_says_which_budget_and_within_which():
    options = {"a": (0, 1)}
    small = Limit("macs", 3, ((Sum((Table(("a",), np.array([3, 9])),)),),))
    other = Limit("bytes", 5, ((Sum((Table(("a",), np.array([7, 1])),)),),))
    with pytest.raises(ValueError, match="bytes must be at least 7 within macs 3, got 5"):
        solve(options, [], [small, other])
