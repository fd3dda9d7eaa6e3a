import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax import pruning
from hybrid_jax.pruning.allocation import _erk_counts
from hybrid_jax.pruning.selection import keep_best, removed_count


def exact_count(sparsity, n):
    """floor(sparsity · n + ½) of the decimal number as written."""
    return int(Fraction(f"{sparsity:.6f}") * n + Fraction(1, 2))


counts = jax.vmap(removed_count, in_axes=(0, None))


@settings(deadline=None, max_examples=40)
@given(
    n=st.one_of(st.integers(1, 50), st.sampled_from([999_999, 25_557_032, 2**31 - 1])),
    millionths=st.lists(st.integers(0, 10**6), min_size=8, max_size=8),
)
def test_removed_count_is_exact(n, millionths):
    sparsities = [value / 10**6 for value in millionths]
    expected = [exact_count(sparsity, n) for sparsity in sparsities]
    assert counts(jnp.array(sparsities, jnp.float32), n).tolist() == expected


@pytest.mark.parametrize(
    ("sparsity", "n", "expected"),
    [(0.5, 3, 2), (0.8, 10, 8), (0.45, 10, 5), (0.25, 10, 3), (0.9, 4, 4), (0, 7, 0), (1, 7, 7)],
)
def test_halves_are_removed(sparsity, n, expected):
    assert removed_count(sparsity, n) == expected


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0]), min_size=12, max_size=12),
    kept=st.integers(0, 12),
)
def test_keep_best_keeps_the_highest_then_the_first(values, kept):
    order = sorted(range(12), key=lambda i: (-values[i], i))[:kept]
    mask = keep_best(jnp.array(values, jnp.float32), kept)
    assert np.flatnonzero(mask).tolist() == sorted(order)


def test_equal_scores_leave_from_the_end():
    assert pruning.masks({"w": jnp.ones((2, 2))}, 0.5)["w"].tolist() == [[True, True], [False] * 2]


def test_n_m_runs_along_the_contracted_axis():
    # Kernel (C = 4, O = 2): the best two of each column of four.
    scores = jnp.array([[1.0, 8.0], [2.0, 7.0], [3.0, 6.0], [4.0, 5.0]])
    expected = [[False, True], [False, True], [True, False], [True, False]]
    assert pruning.masks({"w": scores}, 0.5, pruning.n_m(2, 4))["w"].tolist() == expected
    # By default as many as 1:2 allows; equal scores within a pair keep the first.
    tied = jnp.array([[1.0, 2.0], [1.0, 3.0], [0.0, 9.0], [5.0, 9.0]])
    expected = [[True, False], [False, True], [False, True], [True, False]]
    assert pruning.masks({"w": tied}, granularity=pruning.n_m(1, 2))["w"].tolist() == expected


def test_n_m_of_a_convolution_and_of_another_layout(key):
    scores = jax.random.uniform(key, (3, 3, 8, 5))
    mask = pruning.masks({"w": scores}, 0.5, pruning.n_m(2, 4))["w"]
    assert (mask.reshape(3, 3, 2, 4, 5).sum(3) == 2).all()
    turned = pruning.masks(
        {"w": jnp.moveaxis(scores, 2, 0)}, 0.5, pruning.n_m(2, 4, axis={"w": 0})
    )["w"]
    np.testing.assert_array_equal(jnp.moveaxis(turned, 0, 2), mask)


def test_n_m_on_its_way_there():
    # 2:4 at sparsity 0.25 loses floor(0.25 · 4 + ½) = 1 of each four.
    mask = pruning.masks({"w": jnp.arange(8.0).reshape(8, 1)}, 0.25, pruning.n_m(2, 4))["w"]
    assert mask[:, 0].tolist() == [False, True, True, True] * 2


def test_erk_densities():
    # raw density: (3+3+4+8)/(3·3·4·8) = 18/288 = 1/16 and (8+6)/48 = 14/48, (2+2)/4 = 1, of
    # 288 + 48 + 4 = 340 weights. Sparsity 0.7 keeps 340 − 238 = 102 = ε (18 + 14 + 4), ε = 17/6:
    # the last two would be 0.83 and 2.83, so that the last is dense, and 98 = ε (18 + 14) shares
    # as 18 : 14 → 55.125 and 42.875, rounded to whole weights: 55 and 43.
    scores = {"a": jnp.ones((3, 3, 4, 8)), "b": jnp.ones((8, 6)), "c": jnp.ones((2, 2))}
    kept = pruning.masks(scores, 0.7, allocation=pruning.erk())
    assert {name: int(mask.sum()) for name, mask in kept.items()} == {"a": 55, "b": 43, "c": 4}
    # At 0.65: 340 − 221 = 119; "b" overflows too (115 · 14/32 = 50.3 > 48): 119 − 52 = 67.
    kept = pruning.masks(scores, 0.65, allocation=pruning.erk())
    assert {name: int(mask.sum()) for name, mask in kept.items()} == {"a": 67, "b": 48, "c": 4}


def test_global_compares_leaves():
    scores = {"a": jnp.array([[9.0, 8.0]]), "b": jnp.array([[1.0, 2.0]])}
    kept = pruning.masks(scores, 0.5, allocation=pruning.global_())
    assert kept["a"].all()
    assert not kept["b"].any()


SHAPES = ((1, 1), (2, 9), (3, 3, 2, 4), (7, 5))
few_values = [
    st.lists(st.integers(0, 4), min_size=(n := int(np.prod(shape))), max_size=n) for shape in SHAPES
]


@functools.partial(jax.jit, static_argnums=0)
def compiled_masks(allocation, scores, sparsity):
    return pruning.masks(scores, sparsity, allocation=allocation())


@settings(deadline=None, max_examples=40)
@given(values=st.tuples(*few_values), percent=st.integers(0, 100))
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


@pytest.mark.parametrize("allocation", [pruning.uniform, pruning.erk, pruning.global_])
def test_a_sweep_over_sparsity_compiles_once_and_equals_eager(allocation, key):
    scores = {"a": jax.random.uniform(key, (3, 3, 4, 8)), "b": jnp.ones((8, 6))}

    @jax.jit
    def compiled(scores, sparsity):
        return pruning.masks(scores, sparsity, allocation=allocation())

    sparsities = [0.0, 0.123, 0.5, 0.77, 0.9, 1.0]
    eager = [pruning.masks(scores, s, allocation=allocation()) for s in sparsities]
    for sparsity, expected in zip(sparsities, eager, strict=True):
        got = compiled(scores, jnp.float32(sparsity))
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert compiled._cache_size() == 1
    stacked = jax.vmap(lambda s: pruning.masks(scores, s, allocation=allocation()))(
        jnp.array(sparsities)
    )
    for i, expected in enumerate(eager):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), stacked, expected)


def test_exempt_leaves_are_left_alone():
    scores = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2)), "bias": optax.MaskedNode()}
    kept = pruning.masks(scores, 0.5, exempt=["a"])
    assert kept["a"] == kept["bias"] == optax.MaskedNode()
    assert kept["b"].sum() == 2


def test_bad_input_is_named():
    scores = {"w": jnp.ones((6, 4))}
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got 1.3"):
        pruning.masks(scores, 1.3)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 0.5\], got 0.8"):
        pruning.masks(scores, 0.8, pruning.n_m(2, 4))
    with pytest.raises(
        ValueError, match=r"m must divide axis -2 of 'w' with shape \(6, 4\), got 4"
    ):
        pruning.masks(scores, 0.5, pruning.n_m(2, 4))
    with pytest.raises(ValueError, match="contracted axis of 'w' with shape"):
        pruning.masks(scores, 0.5, pruning.n_m(2, 4, axis={"other": 0}))
    with pytest.raises(ValueError, match="contracted axis of 'w' with shape"):
        pruning.masks({"w": jnp.ones(4)}, 0.5, pruning.n_m(2, 4))
    with pytest.raises(ValueError, match=r"must be uniform\(\) with n_m\(1, 2\).*got erk\(\)"):
        pruning.masks(scores, 0.5, pruning.n_m(1, 2), pruning.erk())
    with pytest.raises(ValueError, match=r"n must be an integer in \[1, 4\], got 5"):
        pruning.n_m(5, 4)
    with pytest.raises(ValueError, match="rule 'head' must match"):
        pruning.masks(scores, 0.5, exempt=["head"])
    with pytest.raises(ValueError, match="scores must have a leaf to prune"):
        pruning.masks(scores, 0.5, exempt=["w"])
    for bad in (jnp.nan, jnp.inf):
        with pytest.raises(ValueError, match="scores must be finite, got 1 NaN or infinite value"):
            pruning.masks({"w": jnp.ones((2, 2)).at[0, 1].set(bad)}, 0.5)


def test_apply_masks_zeroes_even_what_is_not_finite():
    params = {"w": jnp.array([[jnp.nan, 2.0]]), "b": jnp.ones(2)}
    got = pruning.apply_masks(params, {"w": jnp.array([[False, True]]), "b": optax.MaskedNode()})
    assert got["w"].tolist() == [[0.0, 2.0]]
    assert got["b"] is params["b"]


def test_apply_masks_names_a_mask_that_does_not_fit():
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=r"masks must have bool\[2, 2\] at 'w', got bool\[2\]"):
        pruning.apply_masks(params, {"w": jnp.ones(2, bool)})
    with pytest.raises(ValueError, match="got 'v' in one of them only"):
        pruning.apply_masks(params, {"w": jnp.ones((2, 2), bool), "v": jnp.ones(2, bool)})
