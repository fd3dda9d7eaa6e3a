"""Sensitivity equals separate evaluations, is compiled once, and names bad input."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import contrib, core, pruning

SPARSITIES = (0.0, 0.25, 0.5, 0.8)


def two_layers(params, x):
    return jax.nn.relu(x @ params["a"] + params["bias"][None]) @ params["b"]


PARAMS = {
    "a": jnp.array([[1.0, 2.0, 3.0, 4.0]]),
    "bias": jnp.zeros(4),
    "b": jnp.array([[8.0], [7.0], [6.0], [1.0]]),
}
X = jnp.ones((1, 1))


def output(params, x):
    return jnp.sum(two_layers(params, x))


GRAPH = core.trace(two_layers, PARAMS, X)


def test_weights_by_hand():
    # Dense 1·8 + 2·7 + 3·6 + 4·1 = 44. Of `a` leave 1, then 2, then 3: 36, 22, 4; of `b` leave 1,
    # then 6, then 7: 40, 22, 8. 0.8 of 4 is 3.
    losses = pruning.sensitivity(
        output, PARAMS, pruning.magnitude(GRAPH.kernels, PARAMS), SPARSITIES, X
    )
    assert {path: own.tolist() for path, own in losses.items()} == {
        "a": [44.0, 36.0, 22.0, 4.0],
        "b": [44.0, 40.0, 22.0, 8.0],
    }


def test_channels_by_hand():
    groups = GRAPH.groups
    # With those of `b`, 8, 7, 6 and 1, the units score 9, 8, 14 and 5.
    scores = pruning.magnitude(GRAPH.kernels, PARAMS) | {"a": jnp.array([[1.0, 1.0, 8.0, 4.0]])}

    def losses(multiple):
        granularity = pruning.channels(groups, multiple=multiple)
        found = pruning.sensitivity(output, PARAMS, scores, SPARSITIES, X, granularity=granularity)
        return {name: own.tolist() for name, own in found.items()}

    # The unit of 4·1 leaves first, then that of 2·7, then that of 1·8.
    assert losses(multiple=1) == {"a": [44.0, 40.0, 26.0, 18.0]}
    # In steps of two, half a step up: 0, 1, 2 and 3 that leave are 0, 0, 2 and 2.
    assert losses(multiple=2) == {"a": [44.0, 44.0, 26.0, 26.0]}


@pytest.fixture(scope="module")
def loss_of(digits):
    traces = []

    def loss(params, images, labels):
        traces.append(None)
        logits = digits.fn(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss, traces


def test_weights_of_a_network_as_separate_evaluations_in_one_compilation(digits, loss_of):
    loss, traces = loss_of
    batch = digits.images[:32], digits.labels[:32]
    kernels = core.trace(digits.fn, digits.params, batch[0]).kernels
    scores = pruning.magnitude(kernels, digits.params)
    losses = pruning.sensitivity(loss, digits.params, scores, (0.25, 0.5), *batch)
    assert len(traces) == 1
    # Other sparsities, another number of them, other parameters: nothing is compiled anew.
    other = jax.tree.map(lambda leaf: 1.01 * leaf, digits.params)
    more = pruning.sensitivity(loss, other, pruning.magnitude(kernels, other), (0.9,), *batch)
    assert len(traces) == 1
    assert list(losses) == list(more) == [p for p in core.flatten_paths(scores) if "kernel" in p]
    evaluate = jax.jit(loss)
    for path, own in losses.items():
        alone = core.map_with_path(
            lambda p, s, path=path: s if p == path else optax.MaskedNode(), scores
        )
        for sparsity, value in zip((0.25, 0.5), own, strict=True):
            pruned = pruning.apply_masks(digits.params, pruning.masks(alone, sparsity))
            np.testing.assert_allclose(value, evaluate(pruned, *batch), rtol=1e-5)


def test_channels_of_a_network_as_the_shrunk_ones(digits, loss_of):
    loss, traces = loss_of
    batch = digits.images[:32], digits.labels[:32]
    graph = core.trace(digits.fn, digits.params, batch[0])
    groups, kernels = graph.groups, graph.kernels
    weight_scores = pruning.magnitude(kernels, digits.params)
    sweep = functools.partial(pruning.sensitivity, loss, granularity=pruning.channels(groups))
    before = len(traces)
    losses = sweep(digits.params, weight_scores, (0.0, 0.5), *batch)
    assert len(traces) == before + 1
    # Other sparsities and parameters: nothing is compiled anew.
    other = jax.tree.map(lambda leaf: 1.01 * leaf, digits.params)
    sweep(other, pruning.magnitude(kernels, other), (0.9,), *batch)
    assert len(traces) == before + 1
    assert list(losses) == sorted(group.name for group in groups)
    scores = pruning.group_scores(weight_scores, groups)
    evaluate = jax.jit(loss)
    for name, own in losses.items():
        keep = pruning.keep_channels({name: scores[name]}, 0.5)
        kept = core.keep_indices(keep, groups, digits.params)
        separate = evaluate(core.mask_removed(digits.params, kept), *batch)
        np.testing.assert_allclose(own, [evaluate(digits.params, *batch), separate], rtol=1e-5)


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_several_at_once_are_the_same(batch_size):
    scores = pruning.magnitude(GRAPH.kernels, PARAMS)
    groups = GRAPH.groups
    for granularity in (None, pruning.channels(groups)):
        sweep = functools.partial(
            pruning.sensitivity, output, PARAMS, scores, SPARSITIES, X, granularity=granularity
        )
        one, several = (sweep(batch_size=size) for size in (1, batch_size))
        chex.assert_trees_all_equal(one, several)


def test_under_jit_with_traced_sparsities_and_blocks():
    # (O, C), and three that are no kernel.
    scores, params = {"a": PARAMS["a"], "b": optax.MaskedNode()}, PARAMS | {"b": jnp.ones(3)}
    params = {"a": params["a"], "b": params["b"]}
    kernels = core.trace(lambda p, x: x @ p["a"].T + p["b"].sum(), params, jnp.ones((1, 4))).kernels

    @jax.jit
    def sweep(sparsities):
        return pruning.sensitivity(
            lambda params: jnp.sum(params["a"]),
            params,
            scores,
            sparsities,
            granularity=contrib.n_m(kernels, 2, 4),
        )

    # One block of 1, 2, 3, 4 loses none, 1, and 1 and 2; more than a half it cannot lose.
    assert sweep(jnp.array([0.0, 0.25, 0.5]))["a"].tolist() == [10.0, 9.0, 7.0]


def test_bad_input_is_named():
    scores = pruning.magnitude(GRAPH.kernels, PARAMS)

    def sweep(sparsities=(0.5,), loss=output, params=PARAMS, scores=scores, **options):
        return pruning.sensitivity(loss, params, scores, sparsities, X, **options)

    with pytest.raises(ValueError, match=r"sparsities must be in \[0, 1\], got 1.5"):
        sweep((0.5, 1.5))
    with pytest.raises(ValueError, match=r"sparsities must have shape \(S,\), got \(0,\)"):
        sweep(())
    with pytest.raises(ValueError, match=r"sparsities must be in \[0, 0.5\], got 0.75"):
        sweep((0.75,), granularity=contrib.n_m(GRAPH.kernels, 2, 4))
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        sweep(batch_size=0)
    with pytest.raises(ValueError, match="scores must have a leaf to prune, got none"):
        sweep(scores=jax.tree.map(lambda _: optax.MaskedNode(), PARAMS))
    with pytest.raises(ValueError, match="scores must be finite"):
        sweep(scores=scores | {"a": scores["a"] * jnp.nan})
    with pytest.raises(
        ValueError, match="scores must have the structure of params, got 'c' in one"
    ):
        sweep(scores=scores | {"c": scores["a"]})
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar, got shape \(1, 1\)"):
        sweep(loss=two_layers)
    with pytest.raises(ValueError, match=r"losses must be finite, got 1 NaN .* at 'a'"):
        sweep(loss=lambda params, x: output(params, x) / params["a"][0, 0])
    with pytest.raises(
        ValueError, match=r"scores must be floating and not empty, got int32\[1, 4\]"
    ):
        sweep(scores=scores | {"a": jnp.ones((1, 4), jnp.int32)})
    with pytest.raises(TypeError, match=r"granularity must be a pruning\.Granularity such as"):
        sweep(granularity=pruning.channels)
    channels = pruning.channels(GRAPH.groups)
    less = {"a": PARAMS["a"], "bias": PARAMS["bias"]}
    with pytest.raises(ValueError, match="scores must cover a member of group 'a', got none of"):
        sweep(scores=jax.tree.map(lambda _: optax.MaskedNode(), PARAMS), granularity=channels)
    with pytest.raises(
        ValueError, match="scores must have the structure of params, got 'b' in one"
    ):
        sweep(params=less, granularity=channels)
    with pytest.raises(ValueError, match=r"scores must have the paths of the groups, .* at 'b'"):
        sweep(params=less, scores={name: scores[name] for name in less}, granularity=channels)
