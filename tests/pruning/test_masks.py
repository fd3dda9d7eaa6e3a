import functools
import math
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import flax_kernels

from hybrid_jax import pruning
from hybrid_jax.pruning.allocation import _erk_counts
from hybrid_jax.pruning.selection import keep_best, removed_count


def made(allocation, scores):
    return allocation(flax_kernels(scores)) if allocation is pruning.erk else allocation()


def exact_count(sparsity, n):
    """floor(sparsity · n + ½) of the decimal number as written."""
    return int(Fraction(f"{sparsity:.6f}") * n + Fraction(1, 2))


counts = jax.vmap(removed_count, in_axes=(0, None))


@settings(max_examples=40)
@given(
    n=st.one_of(st.integers(1, 50), st.sampled_from([999_999, 25_557_032, 2**31 - 1])),
    millionths=st.lists(st.integers(0, 10**6), min_size=8, max_size=8),
)
def test_removed_count_is_exact(n, millionths):
    sparsities = [value / 10**6 for value in millionths]
    expected = [exact_count(sparsity, n) for sparsity in sparsities]
    assert counts(jnp.array(sparsities, jnp.float32), n).tolist() == expected
    assert [removed_count(sparsity, n) for sparsity in sparsities] == expected


@pytest.mark.parametrize(
    ("sparsity", "n", "expected"),
    [(0.5, 3, 2), (0.8, 10, 8), (0.45, 10, 5), (0.25, 10, 3), (0.9, 4, 4), (0, 7, 0), (1, 7, 7)],
)
def test_halves_are_removed(sparsity, n, expected):
    assert removed_count(sparsity, n) == expected


@settings(max_examples=60)
@given(
    values=st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0]), min_size=12, max_size=12),
    kept=st.integers(0, 12),
)
def test_keep_best_keeps_the_highest_then_the_first(values, kept):
    order = sorted(range(12), key=lambda i: (-values[i], i))[:kept]
    for xp in (jnp, np):
        mask = keep_best(xp.array(values, np.float32), kept)
        assert np.flatnonzero(mask).tolist() == sorted(order)


@settings(max_examples=30)
@given(
    values=st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 2.0]), min_size=15, max_size=15),
    kept=st.lists(st.integers(0, 5), min_size=3, max_size=3),
)
def test_each_row_keeps_its_own_count(values, kept):
    rows, counts = np.array(values, np.float32).reshape(3, 5), np.array(kept)[:, None]
    np.testing.assert_array_equal(keep_best(rows, counts), keep_best(jnp.array(rows), counts))


def test_equal_scores_leave_from_the_end():
    assert pruning.masks({"w": jnp.ones((2, 2))}, 0.5)["w"].tolist() == [[True, True], [False] * 2]


def test_erk_densities():
    # raw density: (3+3+4+8)/(3·3·4·8) = 18/288 = 1/16 and (8+6)/48 = 14/48, (2+2)/4 = 1, of
    # 288 + 48 + 4 = 340 weights. Sparsity 0.7 keeps 340 − 238 = 102 = ε (18 + 14 + 4), ε = 17/6:
    # the last two would be 0.83 and 2.83, so that the last is dense, and 98 = ε (18 + 14) shares
    # as 18 : 14 → 55.125 and 42.875, rounded to whole weights: 55 and 43.
    scores = {"a": jnp.ones((3, 3, 4, 8)), "b": jnp.ones((8, 6)), "c": jnp.ones((2, 2))}
    kept = pruning.masks(scores, 0.7, allocation=pruning.erk(flax_kernels(scores)))
    assert {name: int(mask.sum()) for name, mask in kept.items()} == {"a": 55, "b": 43, "c": 4}
    # At 0.65: 340 − 221 = 119; "b" overflows too (115 · 14/32 = 50.3 > 48): 119 − 52 = 67.
    kept = pruning.masks(scores, 0.65, allocation=pruning.erk(flax_kernels(scores)))
    assert {name: int(mask.sum()) for name, mask in kept.items()} == {"a": 67, "b": 48, "c": 4}


def test_global_compares_leaves():
    scores = {"a": jnp.array([[9.0, 8.0]]), "b": jnp.array([[1.0, 2.0]])}
    kept = pruning.masks(scores, 0.5, allocation=pruning.global_())
    assert kept["a"].all()
    assert not kept["b"].any()


SHAPES = ((1, 1), (2, 9), (3, 3, 2, 4), (7, 5))
few_values = st.tuples(
    *(st.lists(st.integers(0, 4), min_size=n, max_size=n) for n in map(math.prod, SHAPES))
)


@functools.partial(jax.jit, static_argnums=0)
def compiled_masks(allocation, scores, sparsity):
    return pruning.masks(scores, sparsity, allocation=made(allocation, scores))


@settings(max_examples=40)
@given(values=few_values, percent=st.integers(0, 100))
def test_counts_are_exact_for_any_scores(values, percent):
    sparsity = percent / 100
    scores = {
        str(i): jnp.array(value, jnp.float32).reshape(shape)
        for i, (value, shape) in enumerate(zip(values, SHAPES, strict=True))
    }
    sizes = np.array([s.size for s in scores.values()])
    total = int(sizes.sum())

    def lost(allocation):
        kept = compiled_masks(allocation, scores, jnp.float32(sparsity))
        return sizes - np.array([int(mask.sum()) for mask in kept.values()])

    assert lost(pruning.uniform).tolist() == [exact_count(sparsity, n) for n in sizes.tolist()]
    assert lost(pruning.global_).sum() == exact_count(sparsity, total)
    erk = lost(pruning.erk)
    assert erk.sum() == exact_count(sparsity, total)
    assert (erk >= 0).all()
    assert (erk <= sizes).all()


@settings(max_examples=40)
@given(values=few_values, percent=st.integers(0, 100))
def test_masks_of_known_scores_are_those_of_traced_ones(values, percent):
    scores = {
        str(i): jnp.array(value, jnp.float32).reshape(shape)
        for i, (value, shape) in enumerate(zip(values, SHAPES, strict=True))
    }
    for allocation in (pruning.uniform, pruning.global_, pruning.erk):
        known = pruning.masks(scores, percent / 100, allocation=made(allocation, scores))
        traced = compiled_masks(allocation, scores, jnp.float32(percent / 100))
        chex.assert_trees_all_equal(known, traced)
        assert all(isinstance(mask, jax.Array) for mask in known.values())


def test_erk_stays_within_one_of_its_share_on_a_large_net():
    # ResNet-50's kind of sizes, 23 million weights: float32 must not lose count.
    shapes = {f"{i}": (3, 3, 512, 512) for i in range(9)} | {"first": (7, 7, 3, 64)}
    scores = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    sizes = np.array([np.prod(s.shape) for s in scores.values()])
    raw = np.array([sum(s.shape) / np.prod(s.shape) for s in scores.values()])
    total = int(sizes.sum())
    for sparsity in (0.5, 0.8, 0.9, 0.99):
        kept = total - exact_count(sparsity, total)
        counts = np.asarray(_erk_counts(raw, sizes, jnp.int32(kept)))
        share = raw * sizes
        expected = kept * share / share.sum()
        if expected[-1] > sizes[-1]:
            share = share[:-1]
            expected = np.append((kept - sizes[-1]) * share / share.sum(), sizes[-1])
        assert counts.sum() == kept
        # float32 holds 24 bits: two weights in 23 million beside the one of rounding.
        np.testing.assert_allclose(counts, expected, atol=3)


def test_exempt_leaves_are_left_alone():
    scores = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2)), "bias": optax.MaskedNode()}
    kept = pruning.masks(scores, 0.5, exempt=["a"])
    assert kept["a"] == kept["bias"] == optax.MaskedNode()
    assert kept["b"].sum() == 2


def test_a_leaf_keeps_at_least_what_its_granularity_says():
    scores = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0, 4.0], [5.0, 6.0]])}

    def kept(sparsity, allocation, at_least):
        masks = pruning.masks(scores, sparsity, pruning.unstructured(at_least), allocation)
        return {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()}

    # Of 6 weights floor(0.5 · 6 + ½) = 3 are lost, and "a" has the lowest.
    assert kept(0.5, pruning.global_(), 0) == {"a": [], "b": [1, 2, 3]}
    assert kept(0.5, pruning.global_(), 1) == {"a": [1], "b": [2, 3]}
    # One is to stay, but each leaf has one; a leaf cannot keep more than it has.
    assert kept(0.8, pruning.global_(), 1) == {"a": [1], "b": [3]}
    assert kept(1.0, pruning.global_(), 3) == {"a": [0, 1], "b": [1, 2, 3]}
    # floor(0.75 · 2 + ½) = 2 and floor(0.75 · 4 + ½) = 3.
    assert kept(0.75, pruning.uniform(), 0) == {"a": [], "b": [3]}
    assert kept(0.75, pruning.uniform(), 1) == {"a": [1], "b": [3]}


@settings(max_examples=40)
@given(values=few_values, percent=st.integers(0, 100))
def test_the_others_pay_for_what_a_leaf_keeps(values, percent):
    scores = {
        str(i): jnp.array(value, jnp.float32).reshape(shape)
        for i, (value, shape) in enumerate(zip(values, SHAPES, strict=True))
    }
    sizes = np.array([s.size for s in scores.values()])
    least = np.minimum(sizes, 3)
    total = int(sizes.sum())
    wanted = max(total - exact_count(percent / 100, total), least.sum())
    for allocation in (pruning.global_, pruning.erk):
        kept = compiled_least_three(allocation, scores, jnp.float32(percent / 100))
        counts = np.array([int(mask.sum()) for mask in kept.values()])
        assert counts.sum() == wanted
        assert (counts >= least).all()
        assert (counts <= sizes).all()


@functools.partial(jax.jit, static_argnums=0)
def compiled_least_three(allocation, scores, sparsity):
    return pruning.masks(
        scores, sparsity, pruning.unstructured(at_least=3), made(allocation, scores)
    )


def test_lamp_is_global_on_its_scores():
    # Squares 1, 4 and 100, 400: LAMP gives 1/5, 1 and 1/5, 1, so that both leaves lose half,
    # where the weights themselves would empty "a".
    params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[10.0, 20.0]])}
    kept = pruning.masks(
        pruning.lamp(flax_kernels(params), params), 0.5, allocation=pruning.global_()
    )
    assert kept["a"].tolist() == kept["b"].tolist() == [[False, True]]
    kept = pruning.masks(
        pruning.magnitude(flax_kernels(params), params), 0.5, allocation=pruning.global_()
    )
    assert not kept["a"].any()


not_finite = st.sampled_from([jnp.nan, jnp.inf, -jnp.inf, -1.0, 0.0, 2.0])


@settings(max_examples=40)
@given(values=st.lists(not_finite, min_size=18, max_size=18), percent=st.integers(0, 100))
def test_traced_scores_that_are_not_finite_keep_the_counts(values, percent):
    scores = {"w": jnp.array(values, jnp.float32).reshape(2, 9)}
    mask = compiled_masks(pruning.global_, scores, jnp.float32(percent / 100))["w"]
    # NaN and −∞ leave first, of equal ones the last; ∞ leaves last.
    rank = [-math.inf if math.isnan(value) else value for value in values]
    order = sorted(range(18), key=lambda i: (-rank[i], i))
    assert np.flatnonzero(mask).tolist() == sorted(order[: 18 - exact_count(percent / 100, 18)])


def test_what_was_removed_ranks_below_all():
    scores = {"w": jnp.array([[9.0, 8.0, 1.0, 2.0]]), "bias": optax.MaskedNode()}
    previous = {"w": jnp.array([[False, True, True, True]]), "bias": optax.MaskedNode()}
    assert pruning.masks(scores, 0.5, previous=previous)["w"].tolist() == [[0, 1, 0, 1]]
    # It comes back only where too few others are left.
    assert pruning.masks(scores, 0.0, previous=previous)["w"].all()
    # Even NaN, which ranks last of the others, stays before it.
    scores = {"w": jnp.array([[9.0, jnp.nan, 1.0, 2.0]]), "bias": optax.MaskedNode()}
    masks = jax.jit(lambda s: pruning.masks(s, 0.25, previous=previous))(scores)
    assert masks["w"].tolist() == [[False, True, True, True]]


def test_bad_input_is_named():
    scores = {"w": jnp.ones((6, 4))}
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got 1.3"):
        pruning.masks(scores, 1.3)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got nan"):
        pruning.masks(scores, jnp.nan)
    with pytest.raises(ValueError, match=r"sparsity must be one number, got shape \(2,\)"):
        pruning.masks(scores, jnp.array([0.5, 0.6]))
    with pytest.raises(ValueError, match="rule 'head' must match"):
        pruning.masks(scores, 0.5, exempt=["head"])
    for nothing in ({"w": optax.MaskedNode()}, {}):
        with pytest.raises(ValueError, match="scores must have a leaf to prune"):
            pruning.masks(nothing, 0.5)
    with pytest.raises(ValueError, match="scores must have a leaf to prune"):
        pruning.masks(scores, 0.5, exempt=["w"])
    for bad in (jnp.nan, jnp.inf):
        with pytest.raises(ValueError, match="scores must be finite, got 1 NaN or infinite value"):
            pruning.masks({"w": jnp.ones((2, 2)).at[0, 1].set(bad)}, 0.5)
    with pytest.raises(ValueError, match=r"scores must be floating .* got int32\[\] at 'step'"):
        pruning.masks({**scores, "step": jnp.int32(3)}, 0.5)
    with pytest.raises(ValueError, match=r"not empty, got float32\[0, 3\] at 'gone'"):
        pruning.masks({**scores, "gone": jnp.ones((0, 3))}, 0.5)
    with pytest.raises(TypeError, match=r"granularity must be a pruning.Granularity such as"):
        pruning.masks(scores, 0.5, pruning.unstructured)
    with pytest.raises(TypeError, match=r"allocation must be a pruning.Allocation .* lamp"):
        pruning.masks(scores, 0.5, allocation=pruning.lamp)
    with pytest.raises(ValueError, match="previous must have the structure of scores, got 'w'"):
        pruning.masks(scores, 0.5, previous={})
    with pytest.raises(ValueError, match=r"previous must have shape \(6, 4\) at 'w'"):
        pruning.masks(scores, 0.5, previous={"w": jnp.ones(4, bool)})


def test_scalars_and_vectors_are_pruned_where_they_are_scored():
    scores = {"scalar": jnp.array(2.0), "vector": jnp.array([1.0, 3.0])}
    kept = pruning.masks(scores, 0.5)
    # floor(0.5 · 1 + ½) = 1 of one.
    assert not kept["scalar"]
    assert kept["vector"].tolist() == [False, True]
    # They have no sizes C and O.
    with pytest.raises(ValueError, match="must be of kernels with erk, got some at 'scalar'"):
        pruning.masks(scores, 0.34, allocation=pruning.erk({}))


def test_apply_masks_zeroes_even_what_is_not_finite():
    params = {"w": jnp.array([[jnp.nan, 2.0]]), "b": jnp.ones(2)}
    got = pruning.apply_masks(params, {"w": jnp.array([[False, True]]), "b": optax.MaskedNode()})
    assert got["w"].tolist() == [[0.0, 2.0]]
    assert got["b"] is params["b"]


def test_apply_masks_names_a_mask_that_does_not_fit():
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=r"masks must have bool\[2,2\] at 'w', got bool\[2\]"):
        pruning.apply_masks(params, {"w": jnp.ones(2, bool)})
    with pytest.raises(ValueError, match="got 'v' in one of them only"):
        pruning.apply_masks(params, {"w": jnp.ones((2, 2), bool), "v": jnp.ones(2, bool)})


@pytest.mark.parametrize("sparsity", [7.0, 1e30, np.inf, -0.5, -np.inf, np.nan])
def test_traced_sparsities_outside_of_their_range_count_as_its_ends(sparsity):
    count = jax.jit(lambda sparsity: removed_count(sparsity, 10))
    assert int(count(jnp.float32(sparsity))) == (10 if sparsity > 1 else 0)
