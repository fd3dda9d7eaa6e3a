import functools
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax import core, pruning


def two_layers(params, x):
    return jax.nn.relu(x @ params["first"] + params["bias"][None]) @ params["second"]


PARAMS = {
    "first": jnp.array([[1.0, -2.0, 0.0], [3.0, 0.0, 1.0]]),
    "bias": jnp.zeros(3),
    "second": jnp.array([[1.0, 1.0], [-5.0, 0.0], [0.0, 0.0]]),
}


GRAPH = core.trace(two_layers, PARAMS, jnp.ones((4, 2)))


@pytest.fixture(scope="module")
def groups():
    return GRAPH.groups


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        # Per hidden unit the entries are its column of the first and its row of the second
        # kernel: (1, 3, 1, 1), (2, 0, 5, 0), (0, 1, 0, 0). The bias has no score.
        ("sum", [6, 7, 1]),
        ("mean", [6 / 4, 7 / 4, 1 / 4]),
        ("max", [3, 5, 1]),
        ("l2", [12**0.5, 29**0.5, 1]),
    ],
)
def test_scores_reduce_over_the_whole_group(groups, reduce, expected):
    scores = pruning.magnitude(GRAPH.kernels, PARAMS)
    plain = pruning.group_scores(scores, groups, reduce, normalize="none")
    assert list(plain) == ["first"]
    np.testing.assert_allclose(plain["first"], expected, rtol=1e-6)
    by_mean = pruning.group_scores(scores, groups, reduce)
    np.testing.assert_allclose(by_mean["first"], np.array(expected) / np.mean(expected), rtol=1e-6)
    by_max = pruning.group_scores(scores, groups, reduce, "max")
    np.testing.assert_allclose(by_max["first"], np.array(expected) / max(expected), rtol=1e-6)


def test_groups_of_another_scale_compare():
    # Ten times the fan-in of equal weights is no reason to keep a channel.
    wide = core.Group("wide", 2, (core.Member("wide", 1, np.array([[0], [1]]), (10, 2)),))
    thin = core.Group("thin", 2, (core.Member("thin", 1, np.array([[0], [1]]), (1, 2)),))
    scores = {"wide": jnp.ones((10, 2)), "thin": jnp.ones((1, 2))}
    got = pruning.group_scores(scores, [wide, thin])
    np.testing.assert_array_equal(got["wide"], got["thin"])


def test_units_of_several_indices():
    # A flattened (2 positions, 2 channels): channel 0 owns rows 0 and 2.
    group = core.Group("w", 2, (core.Member("w", 0, np.array([[0, 2], [1, 3]]), (4, 1)),))
    scores = {"w": jnp.array([[1.0], [10.0], [2.0], [20.0]])}
    got = pruning.group_scores(scores, [group], normalize="none")
    assert got["w"].tolist() == [3.0, 30.0]


def test_all_zero_scores_stay_zero(groups):
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    assert (
        pruning.group_scores(pruning.magnitude(GRAPH.kernels, zero), groups)["first"].tolist()
        == [0.0] * 3
    )


def test_group_scores_name_what_is_wrong(groups):
    scores = pruning.magnitude(GRAPH.kernels, PARAMS)
    with pytest.raises(ValueError, match=r"reduce must be one of .* did you mean mean"):
        pruning.group_scores(scores, groups, reduce="men")
    with pytest.raises(ValueError, match="normalize must be one of"):
        pruning.group_scores(scores, groups, normalize="l7")
    with pytest.raises(ValueError, match="groups must hold a coupled group"):
        pruning.group_scores(scores, [])
    with pytest.raises(ValueError, match="scores must cover a member of group 'first'"):
        pruning.group_scores(dict.fromkeys(PARAMS, optax.MaskedNode()), groups)
    with pytest.raises(ValueError, match="got none at 'bias'"):
        pruning.group_scores({"first": scores["first"]}, groups)
    with pytest.raises(ValueError, match="scores must be finite"):
        pruning.group_scores({**scores, "first": scores["first"] * jnp.nan}, groups)


def width(n, sparsity, multiple):
    """The steps nearest to n − floor(sparsity · n + ½), at least one, or all n channels."""
    kept = n - int(Fraction(str(sparsity)) * n + Fraction(1, 2))
    widths = [*range(multiple, n, multiple), n]
    return min(widths, key=lambda w: (abs(w - kept), -w))


SIZES = (1, 5, 12, 16)
percents = st.integers(0, 100)
# Few values, so that many are equal.
several_scores = st.tuples(
    *(st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.0]), min_size=n, max_size=n) for n in SIZES)
)
UNIFORM, GLOBAL = pruning.uniform(), pruning.global_()
compiled_keep = jax.jit(pruning.keep_channels, static_argnames=("allocation", "multiple"))


@settings(max_examples=100)
@given(values=several_scores, percent=percents, multiple=st.sampled_from([1, 4, 8]))
def test_uniform_widths_are_exact_and_hold_the_best(values, percent, multiple):
    scores = {str(i): jnp.array(s, jnp.float32) for i, s in enumerate(values)}
    keep = compiled_keep(scores, percent / 100, multiple=multiple)
    for name, s in zip(scores, values, strict=True):
        expected = width(len(s), percent / 100, multiple)
        best = sorted(range(len(s)), key=lambda i, s=s: (-s[i], i))[:expected]
        assert np.flatnonzero(keep[name]).tolist() == sorted(best)


@settings(max_examples=100)
@given(values=several_scores, percent=percents)
def test_global_counts_are_exact(values, percent):
    scores = {str(i): jnp.array(s, jnp.float32) for i, s in enumerate(values)}
    keep = compiled_keep(scores, percent / 100, allocation=GLOBAL)
    total = sum(SIZES)
    wanted = total - int(Fraction(percent, 100) * total + Fraction(1, 2))
    # Every group holds its best channel; the others are taken from the top, the first of equals.
    holds = [(g, max(range(len(s)), key=lambda i, s=s: (s[i], -i))) for g, s in enumerate(values)]
    rest = [(g, i) for g, s in enumerate(values) for i in range(len(s)) if (g, i) not in holds]
    rest.sort(key=lambda unit: (-values[unit[0]][unit[1]], unit))
    expected = holds + rest[: max(wanted - len(holds), 0)]
    got = [(g, i) for g, k in enumerate(keep.values()) for i in np.flatnonzero(k).tolist()]
    assert got == sorted(expected)


@settings(max_examples=60)
@given(values=several_scores, percent=percents)
def test_global_widths_come_within_half_a_step(values, percent):
    scores = {str(i): jnp.array(s, jnp.float32) for i, s in enumerate(values)}
    keep = compiled_keep(scores, percent / 100, allocation=GLOBAL, multiple=4)
    counts = [int(k.sum()) for k in keep.values()]
    assert all(w == n or w % 4 == 0 for w, n in zip(counts, SIZES, strict=True))
    for s, k in zip(values, keep.values(), strict=True):
        best = sorted(range(len(s)), key=lambda i, s=s: (-s[i], i))[: int(k.sum())]
        assert np.flatnonzero(k).tolist() == sorted(best)
    total = sum(SIZES)
    wanted = total - int(Fraction(percent, 100) * total + Fraction(1, 2))
    assert abs(sum(counts) - max(wanted, sum(min(n, 4) for n in SIZES))) <= 2


@settings(max_examples=60)
@given(
    values=several_scores,
    percent=percents,
    allocation=st.sampled_from([UNIFORM, GLOBAL]),
    multiple=st.sampled_from([1, 4]),
)
def test_known_scores_keep_the_channels_of_traced_ones(values, percent, allocation, multiple):
    scores = {str(i): jnp.array(s, jnp.float32) for i, s in enumerate(values)}
    known = pruning.keep_channels(scores, percent / 100, allocation, multiple)
    traced = compiled_keep(scores, percent / 100, allocation=allocation, multiple=multiple)
    chex.assert_trees_all_equal(known, traced)


def test_uniform_experts_stack_whatever_their_criterion(groups, key):
    chosen = [
        pruning.keep_channels(pruning.group_scores(criterion(GRAPH.kernels, PARAMS), groups), 0.4)
        for criterion in (
            pruning.magnitude,
            pruning.geometric_median,
            functools.partial(pruning.random, key=key),
        )
    ]
    assert [int(keep["first"].sum()) for keep in chosen] == [2, 2, 2]


def test_exempt_groups_keep_all():
    scores = {"stem": jnp.arange(4.0), "body": jnp.arange(4.0)}
    keep = pruning.keep_channels(scores, 0.5, exempt=["stem"])
    assert keep["stem"].all()
    assert keep["body"].tolist() == [False, False, True, True]


def test_keep_channels_names_what_is_wrong():
    scores = {"a": jnp.arange(4.0)}
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got -0.1"):
        pruning.keep_channels(scores, -0.1)
    with pytest.raises(TypeError, match=r"pruning.Allocation such as uniform\(\), got global"):
        pruning.keep_channels(scores, 0.5, "global")
    with pytest.raises(ValueError, match="must be of kernels with erk, got some at 'a'"):
        pruning.keep_channels(scores, 0.5, pruning.erk({}))
    with pytest.raises(ValueError, match="multiple must be an integer of at least 1"):
        pruning.keep_channels(scores, 0.5, multiple=0)
    with pytest.raises(ValueError, match="rule 'stem' must match"):
        pruning.keep_channels(scores, 0.5, exempt=["stem"])
    with pytest.raises(ValueError, match="scores must hold a group"):
        pruning.keep_channels(scores, 0.5, exempt=["a"])
    with pytest.raises(ValueError, match="scores must be finite"):
        pruning.keep_channels({"a": jnp.array([jnp.nan, 1.0])}, 0.5)


def three_layers(params, x):
    hidden = jax.nn.relu(x @ params["a"] + params["bias"][None])
    return jax.nn.relu(hidden @ params["c"]) @ params["d"]


RNG = np.random.default_rng(0)
DEEP = {
    name: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for name, shape in {"a": (3, 8), "bias": (8,), "c": (8, 12), "d": (12, 2)}.items()
}
DEEP_GRAPH = core.trace(three_layers, DEEP, jnp.ones((1, 3)))
DEEP_GROUPS, DEEP_KERNELS = DEEP_GRAPH.groups, DEEP_GRAPH.kernels


def widths(masks):
    return {"a": int(masks["bias"].sum()), "c": int(masks["d"].any(axis=1).sum())}


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize(
    "allocation", [UNIFORM, GLOBAL, pruning.erk(DEEP_KERNELS)], ids=lambda a: a.name
)
def test_masks_of_channels_are_those_of_the_channels_kept(allocation, multiple):
    scores = pruning.magnitude(DEEP_KERNELS, DEEP)
    granularity = pruning.channels(DEEP_GROUPS, "l2", "max", multiple)
    compiled = jax.jit(lambda s: pruning.masks(scores, s, granularity, allocation))
    group_scores = pruning.group_scores(scores, DEEP_GROUPS, "l2", "max")
    sparsities = [0.0, 0.3, 0.5, 0.9, 1.0]
    stacked = jax.vmap(compiled)(jnp.array(sparsities))
    for i, sparsity in enumerate(sparsities):
        keep = pruning.keep_channels(group_scores, sparsity, allocation, multiple)
        expected = core.expand(keep, DEEP_GROUPS, DEEP)
        masks = compiled(jnp.float32(sparsity))
        chex.assert_trees_all_equal(masks, expected)
        jax.tree.map(lambda s, e, i=i: np.testing.assert_array_equal(s[i], e), stacked, expected)
    assert compiled._cache_size() == 1


def test_erk_of_channels_has_the_densities_of_their_kernels():
    # Raw densities (3+8)/24 and (8+12)/96 of 8 and 12 channels: shares 3.67 : 2.5 of the
    # 20 − floor(0.5 · 20 + ½) = 10 that stay, 5.95 and 4.05; totals are rounded down to 5, 10.
    masks = pruning.masks(
        pruning.magnitude(DEEP_KERNELS, DEEP),
        0.5,
        pruning.channels(DEEP_GROUPS),
        pruning.erk(DEEP_KERNELS),
    )
    assert widths(masks) == {"a": 5, "c": 5}


def test_exempt_channels_are_named_by_their_group():
    scores = pruning.magnitude(DEEP_KERNELS, DEEP)
    masks = pruning.masks(scores, 0.5, pruning.channels(DEEP_GROUPS), exempt=["a"])
    # The rows of "c" are channels of "a": all of them stay.
    assert masks["a"] == masks["bias"] == optax.MaskedNode()
    assert (masks["c"] == masks["d"].any(axis=1)[None]).all()
    assert widths({**masks, "bias": jnp.ones(8)})["c"] == 6
    with pytest.raises(
        ValueError, match="rule 'd' must match at least one path, got none of: a, c"
    ):
        pruning.masks(scores, 0.5, pruning.channels(DEEP_GROUPS), exempt=["d"])


def test_a_group_keeps_its_last_channel():
    scores = pruning.magnitude(DEEP_KERNELS, DEEP)
    kept = pruning.masks(scores, 1.0, pruning.channels(DEEP_GROUPS))
    assert widths(kept) == {"a": 1, "c": 1}
    kept = pruning.masks(scores, 1.0, pruning.channels(DEEP_GROUPS, at_least=0))
    assert widths(kept) == {"a": 0, "c": 0}


def test_a_channel_of_nan_leaves_first():
    scores = pruning.magnitude(DEEP_KERNELS, DEEP)
    scores["a"] = scores["a"].at[0, 5].set(jnp.nan)
    granularity = pruning.channels(DEEP_GROUPS)
    masks = jax.jit(lambda s: pruning.masks(s, 0.05, granularity, pruning.global_()))(scores)
    # floor(0.05 · 20 + ½) = 1 of 20.
    assert np.flatnonzero(~np.asarray(masks["bias"])).tolist() == [5]
    assert widths(masks) == {"a": 7, "c": 12}


def test_a_scheduled_channel_that_left_stays_away():
    # The second scores are the inverse of the first, so that what left would rank best; and the
    # channels of "a" have weights in "c" that left with those of "c", and yet stay.
    granularity = pruning.channels(DEEP_GROUPS)
    first = pruning.masks(
        pruning.magnitude(DEEP_KERNELS, DEEP), 0.5, granularity, pruning.global_()
    )
    other = jax.tree.map(lambda w: 1 / (1e-3 + jnp.abs(w)), DEEP)
    second = pruning.masks(
        pruning.magnitude(DEEP_KERNELS, other), 0.6, granularity, pruning.global_(), previous=first
    )
    for name in DEEP:
        assert (np.asarray(second[name]) <= np.asarray(first[name])).all()
    assert sum(widths(first).values()) == 10
    assert sum(widths(second).values()) == 8
    # And all that belongs to them can be removed for good.
    _, small, certificate = core.shrink(three_layers, DEEP, second, jnp.ones((2, 3)))
    assert small["bias"].shape == (widths(second)["a"],)
    assert small["d"].shape == (widths(second)["c"], 2)
    assert certificate.difference <= 1e-5


def test_channels_name_what_is_wrong():
    scores = pruning.magnitude(DEEP_KERNELS, DEEP)
    granularity = pruning.channels(DEEP_GROUPS)
    with pytest.raises(ValueError, match="groups must hold a coupled group"):
        pruning.channels([])
    with pytest.raises(ValueError, match="multiple must be an integer of at least 1"):
        pruning.channels(DEEP_GROUPS, multiple=0)
    with pytest.raises(ValueError, match="at_least must be an integer of at least 0"):
        pruning.channels(DEEP_GROUPS, at_least=-1)
    with pytest.raises(ValueError, match="scores must have the paths of the groups, got none at"):
        pruning.masks({"params": scores}, 0.5, granularity)
    with pytest.raises(ValueError, match=r"scores must have shape \(8, 12\) at 'c', got \(8, 9\)"):
        pruning.masks({**scores, "c": jnp.ones((8, 9))}, 0.5, granularity)
    with pytest.raises(ValueError, match="scores must cover a member of group 'a'"):
        pruning.masks(dict.fromkeys(DEEP, optax.MaskedNode()), 0.5, granularity)


def test_equal_scores_fall_alike_compiled_and_eager():
    scores = {"b": jnp.ones(3), "a": jnp.ones(3)}
    eager = pruning.keep_channels(scores, 0.5, GLOBAL)
    compiled = jax.jit(lambda s: pruning.keep_channels(s, 0.5, GLOBAL))(scores)
    assert {name: k.tolist() for name, k in eager.items()} == {
        "a": [True, True, False],
        "b": [True, False, False],
    }
    chex.assert_trees_all_equal(eager, compiled)
