"""Pruning in rounds: exact counts, and training that goes on as the masked network's does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import core, pruning, training


def two_layers(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


PARAMS = {"a": jnp.arange(1.0, 21.0)[None] * jnp.ones((3, 1)), "b": jnp.ones((20, 2))}
GRAPH = core.trace(two_layers, PARAMS, jnp.ones((1, 3)))


def by_magnitude(fns, tree, graph):
    return pruning.group_scores(pruning.magnitude(graph.kernels, tree), graph.groups)


def rounds(sparsities, score=by_magnitude, train=lambda fns, tree: tree, **options):
    return pruning.prune_in_rounds(
        [two_layers], PARAMS, PARAMS, GRAPH, sparsities, score, train, **options
    )


def test_counts_are_of_the_first_width_however_many_rounds():
    schedule, seen = pruning.cubic(0.85, 0, 5), []

    def train(fns, tree):
        assert fns[0](tree, jnp.ones((2, 3))).shape == (2, 2)
        seen.append(tree["a"].shape[1])
        return tree

    sparsities = [float(schedule(r)) for r in range(1, 6)]
    _, small, keep = rounds(sparsities, train=train)
    # 0.85 (1 − (1 − r/5)³) = 0.4148, 0.6664, 0.7956, 0.8432, 0.85 of 20, rounded half up: 8, 13,
    # 16, 17, 17 leave.
    assert seen == [12, 7, 4, 3, 3]
    # The columns grow: the last three stay.
    assert keep["a"].tolist() == [False] * 17 + [True] * 3
    assert small["a"].tolist() == [[18.0, 19.0, 20.0]] * 3


def test_what_is_removed_does_not_come_back_when_scores_change():
    orders = iter([jnp.arange(20.0), -jnp.arange(15.0), jnp.arange(10.0)])
    _, small, keep = rounds([0.25, 0.5, 0.75], score=lambda fns, tree, graph: {"a": next(orders)})
    # The first five leave, then the last five, then of 5..14 the first five.
    assert np.flatnonzero(keep["a"]).tolist() == [10, 11, 12, 13, 14]
    assert small["a"][0].tolist() == [11.0, 12.0, 13.0, 14.0, 15.0]


def test_rounds_towards_targets_of_macs():
    def choose(scores, target):
        return pruning.to_target(
            lambda s: pruning.keep_channels(scores, s),
            lambda keep: core.narrow_graph(GRAPH, keep).macs,
            target,
        ).choice

    # 5 MACs a hidden unit.
    _, small, _ = rounds([80, 52, 31], choose=choose)
    assert small["a"].shape == (3, 6)


def test_exempt_groups_and_steps_of_widths():
    choose = functools.partial(pruning.keep_channels, multiple=4)
    _, small, _ = rounds([0.1, 0.3], choose=choose)
    # 14 of 20 are to stay: 12 and 16 are as near, half a step up.
    assert small["a"].shape == (3, 16)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="sparsities must hold the sparsity of a round, got none"):
        rounds([])
    with pytest.raises(ValueError, match=r"sparsities must not fall, .* group 'a' than the 10"):
        rounds([0.5, 0.25])
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got 1.5"):
        rounds([1.5])
    with pytest.raises(ValueError, match="scores must be finite"):
        rounds([0.5], score=lambda *_: {"a": jnp.full(20, jnp.nan)})
    with pytest.raises(ValueError, match="group of scores must be one of a, got 'b'"):
        rounds([0.5], score=lambda *_: {"b": jnp.ones(20)})
    with pytest.raises(
        ValueError, match=r"scores of group 'a' must have 20 channels, got shape \(19,\)"
    ):
        rounds([0.5], score=lambda *_: {"a": jnp.ones(19)})


STEPS = 4


def removed(tree, kept):
    """The tree with zeros, and masks False, where `slice_tree` removes."""

    def zero(path, leaf):
        owner = next((own for own in kept if path.endswith(own)), None)
        if owner is None:
            return leaf
        inside = np.zeros(leaf.shape, bool)
        inside[np.ix_(*kept[owner])] = True
        return jnp.where(inside, leaf, jnp.zeros_like(leaf))

    return core.map_with_path(zero, tree)


@functools.cache
def make_step(forward):
    def loss_fn(params, state, batch, key):
        logits, updates = forward(params | {"batch_stats": state["batch_stats"]}, batch["image"])
        loss = training.cross_entropy(logits, batch["label"]).mean()
        average = optax.incremental_update(params, state["average"], 0.1)
        return loss, ({"average": average, **updates}, {})

    return training.make_step(loss_fn)


def trained(forward, state, digits):
    step, losses = make_step(forward), []
    for i in range(STEPS):
        batch = slice(64 * i, 64 * (i + 1))
        with jax.numpy_dtype_promotion("standard"):  # for optax
            state, metrics = step(
                state, {"image": digits.images[batch], "label": digits.labels[batch]}
            )
        losses.append(float(metrics["loss"]))
    return state, losses


def variables_of(state):
    return state.params | {"batch_stats": state.state["batch_stats"]}


def test_training_goes_on_as_the_masked_network_does(digits):
    """Adam, an average of its updates and of the parameters, held masks and BatchNorm."""
    graph = core.trace(digits.fn, digits.params, digits.images[:1])
    params = {"params": digits.params["params"]}
    masks = core.map_with_path(
        lambda path, leaf, mask: jnp.ones(leaf.shape, bool) if core.is_masked_node(mask) else mask,
        params,
        pruning.masks(pruning.magnitude(graph.kernels, params), 0.2),
    )
    tx = pruning.hold_masks(
        optax.chain(optax.scale_by_adam(), optax.ema(0.9), optax.sgd(1e-3)), masks
    )

    def fresh():
        start = pruning.apply_masks(params, masks)
        state = {"batch_stats": digits.params["batch_stats"], "average": start}
        return training.create_state(start, state, tx, jax.random.key(0))

    chosen, small_losses = [], []

    def score(fns, state, graph):
        scores = pruning.magnitude(graph.kernels, variables_of(state))
        return pruning.group_scores(scores, graph.groups)

    def cut(state, kept):
        statistics = {"batch_stats": state.state["batch_stats"]}
        return state.replace(
            params=core.slice_tree(state.params, kept),
            state={
                **core.slice_tree(statistics, kept),
                "average": core.slice_tree(state.state["average"], kept),
            },
            opt_state=core.slice_state(state.tx, state.opt_state, state.params, kept),
        )

    def choose(scores, sparsity):
        chosen.append(pruning.keep_channels(scores, sparsity))
        return chosen[-1]

    def train(fns, state):
        state, losses = trained(fns[1], state, digits)
        small_losses.extend(losses)
        return state

    (small_fn, _), small, keep = pruning.prune_in_rounds(
        [digits.fn, digits.train],
        digits.params,
        fresh(),
        graph,
        [0.25, 0.5],
        score,
        train,
        choose,
        cut,
    )
    # A half of 8, 12 and 16 channels, in all that a step reads.
    assert [int(k.sum()) for k in keep.values()] == [4, 6, 8]
    for tree in (small.params, small.state["average"], small.opt_state.masks):
        assert tree["params"]["expand"]["kernel"].shape == (3, 3, 4, 6)

    masked, losses = fresh(), []
    for keep_then in chosen:
        kept = core.keep_indices(keep_then, graph.groups, digits.params)
        masked, more = trained(digits.train, removed(masked, kept), digits)
        losses += more
    np.testing.assert_allclose(small_losses, losses, rtol=1e-5)
    left = core.flatten_paths(cut(masked, kept))
    for path, leaf in core.flatten_paths(small).items():
        if path != "key":
            np.testing.assert_allclose(leaf, left[path], rtol=1e-5, atol=1e-5, err_msg=path)
    for mask, leaf in zip(
        jax.tree.leaves(small.opt_state.masks), jax.tree.leaves(small.params), strict=True
    ):
        assert not leaf[~mask].any()
    x = digits.held_out_images[:8]
    np.testing.assert_allclose(
        small_fn(variables_of(small), x), digits.fn(variables_of(masked), x), rtol=1e-5, atol=1e-5
    )
    # It learns in every round.
    assert small_losses[STEPS - 1] < small_losses[0]
    assert small_losses[-1] < small_losses[STEPS]
