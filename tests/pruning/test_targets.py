"""The search for a target, and widths that pay."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax import contrib, core, cost, models, pruning


def identity(sparsity):
    return sparsity


def test_a_falling_cost_is_met_by_the_least_sparsity():
    # 10 − 10 s ≤ 7.25 from s = 0.275 on.
    found = pruning.to_target(identity, lambda s: 10 - 10 * s, 7.25)
    assert found == (0.275, 0.275, 7.25)


@given(
    costs=st.lists(st.integers(0, 50), min_size=2, max_size=20).map(lambda c: sorted(c)[::-1]),
    data=st.data(),
)
def test_the_largest_cost_not_above_the_target(costs, data):
    target = data.draw(st.integers(costs[-1], costs[0]))

    def staircase(sparsity):
        return costs[round(sparsity * (len(costs) - 1))]

    calls = []
    found = pruning.to_target(identity, lambda s: calls.append(s) or staircase(s), target)
    assert found.cost == max(c for c in costs if c <= target)
    assert len(calls) <= 22


def latency(sparsity):
    """Falls, but for a bump: 0.5 and 0.6 are slower than 0.4."""
    return {0.0: 10.0, 0.2: 8.0, 0.4: 5.0, 0.5: 7.0, 0.6: 6.0, 0.8: 3.0}[sparsity]


def test_named_sparsities_are_all_tried():
    found = pruning.to_target(identity, latency, 6.5, sparsities=[0.8, 0.2, 0.6, 0.4, 0.5])
    # 0.4 meets the target first, but 0.6 comes nearer to it.
    assert found == (0.6, 0.6, 6.0)
    assert pruning.to_target(identity, latency, 10.0, sparsities=[0.8]) == (0.0, 0.0, 10.0)


def test_bisection_of_a_cost_that_rises_and_falls_never_goes_above_the_target():
    rng = np.random.default_rng(0)
    bumps = rng.random(1000)

    def bumpy(sparsity):
        return 1 - 0.5 * sparsity + 0.2 * bumps[int(999 * sparsity)] * (0 < sparsity < 1)

    for target in (0.6, 0.8, 0.95):
        found = pruning.to_target(identity, bumpy, target)
        assert found.cost == bumpy(found.sparsity) <= target


NET = {"conv": jnp.arange(54.0).reshape(3, 3, 1, 6), "head": jnp.ones((6, 2))}


def net(params, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=numbers)
    return jax.nn.relu(x).mean((1, 2)) @ params["head"]


@pytest.fixture(scope="module")
def graph():
    return core.trace(net, NET, jnp.ones((1, 4, 4, 1)))


@pytest.mark.parametrize(
    ("of", "per_channel"),
    [
        # A channel: 16 places of 9 weights, and 2 of the head.
        (lambda c: c.macs, 146),
        (lambda c: c.parameters, 11),
        (lambda c: c.bytes, 44),
    ],
)
def test_channels_to_a_target_by_hand(graph, of, per_channel):
    scores = pruning.group_scores(pruning.magnitude(graph.kernels, NET), graph.groups)

    def costs(keep):
        return of(cost.count(core.narrow_graph(graph, keep)))

    for target, channels in [(4, 4), (4.9, 4), (5, 5), (1, 1)]:
        found = pruning.to_target(
            lambda s: pruning.keep_channels(scores, s), costs, target * per_channel
        )
        assert found.cost == channels * per_channel
        # The filters grow with their index: the last ones stay.
        assert found.choice["conv"].tolist() == [False] * (6 - channels) + [True] * channels


def test_weights_to_a_target_by_hand(graph):
    scores = pruning.magnitude(graph.kernels, NET)

    def masks(sparsity):
        return pruning.masks(scores, sparsity, allocation=pruning.global_())

    found = pruning.to_target(masks, lambda m: cost.count(graph, m).nonzero, 40)
    assert found.cost == 40
    found = pruning.to_target(masks, lambda m: cost.count(graph, m).macs, 300)
    # The 18 largest are weights of the convolution, at 16 MACs each; one more would cost 304.
    assert found.cost == 288
    pattern = pruning.to_target(
        lambda s: pruning.masks({"head": scores["head"]}, s, contrib.n_m(graph.kernels, 1, 3)),
        lambda m: cost.count(graph, m).nonzero,
        62,
        most=2 / 3,
    )
    # Four blocks of three lose one each: 66 − 4.
    assert pattern.cost == 62


def test_targets_that_cannot_be_met_name_the_nearest(graph):
    scores = {"conv": jnp.arange(6.0)}

    def macs(keep):
        return core.narrow_graph(graph, keep).macs

    def search(target, **options):
        return pruning.to_target(
            lambda s: pruning.keep_channels(scores, s), macs, target, **options
        )

    with pytest.raises(
        ValueError, match="target must be at most 876, the cost of removing nothing"
    ):
        search(877)
    with pytest.raises(ValueError, match=r"at least 146, the least .*\(at sparsity 1\), got 145"):
        search(145)
    with pytest.raises(ValueError, match=r"at least 438, .*\(at sparsity 0.5\), got 145"):
        search(145, most=0.5)
    with pytest.raises(ValueError, match=r"at least 438, .*\(at sparsity 0.5\), got 145"):
        search(145, sparsities=[0.25, 0.5])
    # No group has more than 6 channels: in steps of 8 there is nothing to remove.
    with pytest.raises(ValueError, match="at least 876, the least"):
        pruning.to_target(lambda s: pruning.keep_channels(scores, s, multiple=8), macs, 400)


def test_bad_arguments_of_a_search_are_named():
    with pytest.raises(ValueError, match="target must be a finite number, got nan"):
        pruning.to_target(identity, identity, float("nan"))
    with pytest.raises(ValueError, match="cost at sparsity 0 must be a finite number, got inf"):
        pruning.to_target(identity, lambda s: float("inf"), 1.0)
    with pytest.raises(ValueError, match="cost at sparsity 0 must be a finite number"):
        pruning.to_target(identity, lambda s: jnp.ones(2), 1.0)
    with pytest.raises(ValueError, match=r"most must be in \[0, 1\], got 1.5"):
        pruning.to_target(identity, lambda s: 1 - s, 0.5, most=1.5)
    with pytest.raises(ValueError, match=r"sparsities must be in \[0, 0.5\], got 0.9"):
        pruning.to_target(identity, lambda s: 1 - s, 0.5, most=0.5, sparsities=[0.9])


@pytest.mark.slow
def test_a_search_on_resnet50_takes_seconds():
    module = models.create("resnet50", 1000)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    graph = core.trace(module.apply, variables, images)
    rng = np.random.default_rng(0)
    scores = {g.name: jnp.asarray(rng.random(g.size), jnp.float32) for g in graph.groups}
    calls = []

    def macs(keep):
        calls.append(keep)
        return cost.count(core.narrow_graph(graph, keep)).macs

    found = pruning.to_target(
        lambda s: pruning.keep_channels(scores, s, pruning.global_(), multiple=8),
        macs,
        2_000_000_000,
    )
    assert 1_900_000_000 < found.cost <= 2_000_000_000
    assert len(calls) <= 22
    assert all(k.size % 8 or int(k.sum()) % 8 == 0 for k in found.choice.values())


TABLE = {
    # Made-up milliseconds: 60 and 58 are slower than 64, 32 no faster than 40.
    "conv": {64: 1.0, 60: 1.3, 58: 1.05, 56: 0.9, 40: 0.5, 32: 0.5, 16: 0.49},
    "head": {8: 2.0, 4: 2.5},
}


def test_widths_that_do_not_pay_are_rejected():
    assert pruning.paying_widths(TABLE) == {"conv": (16, 40, 56, 64), "head": (8,)}
    # 16 is only 2 % faster than 40, and 56 is 10 % faster than 64.
    assert pruning.paying_widths(TABLE, margin=0.05) == {"conv": (40, 56, 64), "head": (8,)}


@given(
    st.dictionaries(st.integers(1, 64), st.floats(0.1, 9.0), min_size=1), st.sampled_from([0, 0.1])
)
def test_latency_rises_with_paying_widths(latencies, margin):
    (widths,) = pruning.paying_widths({"g": latencies}, margin).values()
    times = [latencies[w] for w in widths]
    assert all(a < (1 - margin) * b for a, b in itertools.pairwise(times))
    assert widths[-1] == max(latencies)
    for width in set(latencies) - set(widths):
        assert latencies[width] >= (1 - margin) * min(t for w, t in latencies.items() if w > width)


def test_groups_move_to_the_nearest_width():
    scores = {"conv": jnp.arange(64.0), "head": jnp.arange(8.0), "stem": jnp.arange(4.0)}
    widths = pruning.paying_widths(TABLE)
    keep = pruning.keep_channels(scores, 0.25)
    # 48 lies between 40 and 56, the wider one is taken; 6 can only be 8; the stem has no table.
    moved = pruning.to_widths(keep, scores, widths)
    assert {name: int(k.sum()) for name, k in moved.items()} == {"conv": 56, "head": 8, "stem": 3}
    assert moved["conv"].tolist() == [False] * 8 + [True] * 56
    compiled = jax.jit(
        lambda s: pruning.to_widths(pruning.keep_channels(scores, s), scores, widths)
    )
    chex.assert_trees_all_equal(compiled(0.25), moved)
    assert int(compiled(0.9)["conv"].sum()) == 16


def test_bad_tables_and_widths_are_named():
    with pytest.raises(ValueError, match="table must hold the latencies of a group, got none"):
        pruning.paying_widths({})
    with pytest.raises(ValueError, match="table must hold a width of group 'a', got none"):
        pruning.paying_widths({"a": {}})
    with pytest.raises(ValueError, match="latency of 'a' at 8 must be a finite number above 0"):
        pruning.paying_widths({"a": {8: float("nan")}})
    with pytest.raises(ValueError, match="width of group 'a' must be an integer of at least 1"):
        pruning.paying_widths({"a": {0: 1.0}})
    with pytest.raises(ValueError, match=r"margin must be in \[0, 1\], got 2"):
        pruning.paying_widths({"a": {8: 1.0}}, margin=2)
    keep, scores = {"a": jnp.ones(4, bool)}, {"a": jnp.arange(4.0)}
    with pytest.raises(ValueError, match="group of widths must be one of a, got 'b'"):
        pruning.to_widths(keep, scores, {"b": (1,)})
    with pytest.raises(ValueError, match=r"width of group 'a' must be .*\[1, 4\], got 8"):
        pruning.to_widths(keep, scores, {"a": (8,)})
    with pytest.raises(ValueError, match="widths must allow a width of group 'a', got none"):
        pruning.to_widths(keep, scores, {"a": ()})
