"""Penalties over coupled groups, by hand, and what they are for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import core, pruning


def two_layers(params, x):
    return jax.nn.relu(x @ params["first"] + params["bias"][None]) @ params["second"]


# Hidden unit 0 owns (1, 3), 2 and (1, 1): 16. Unit 1 owns (0, 0), 0 and (3, 4): 25. Unit 2 is zero.
PARAMS = {
    "first": jnp.array([[1.0, 0.0, 0.0], [3.0, 0.0, 0.0]]),
    "bias": jnp.array([2.0, 0.0, 0.0]),
    "second": jnp.array([[1.0, 1.0], [3.0, 4.0], [0.0, 0.0]]),
}


@pytest.fixture(scope="module")
def groups():
    return core.trace(two_layers, PARAMS, jnp.ones((4, 2))).groups


def test_group_lasso_by_hand(groups):
    # √5 (√16 + √25 + √0)
    value, gradient = jax.value_and_grad(pruning.group_lasso)(PARAMS, groups)
    np.testing.assert_allclose(value, 5**0.5 * 9, rtol=1e-6)
    # √5 θ / ‖θ‖: of unit 0 divided by 4, of unit 1 by 5, and zero where the unit is zero.
    expected = {
        "first": np.array([[1, 0, 0], [3, 0, 0]]) / 4,
        "bias": np.array([2, 0, 0]) / 4,
        "second": np.array([[1 / 4, 1 / 4], [3 / 5, 4 / 5], [0, 0]]),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(gradient[name], 5**0.5 * value, rtol=1e-6, atol=1e-7)


def test_units_of_several_indices():
    # A flattened (2 positions, 2 channels): channel 0 owns rows 0 and 2, two weights each.
    group = core.Group("w", 2, (core.Member("w", 0, np.array([[0, 2], [1, 3]]), (4, 2)),))
    w = jnp.array([[1.0, 1.0], [3.0, 0.0], [1.0, 1.0], [0.0, 4.0]])
    # √4 (√4 + √25)
    np.testing.assert_allclose(pruning.group_lasso({"w": w}, [group]), 14, rtol=1e-6)


def test_what_is_not_trained_is_not_penalized(groups):
    statistics = core.Group(
        "k",
        1,
        (core.Member("params/k", 1, np.array([[0]]), (1, 1)),)
        + tuple(
            core.Member(f"batch_stats/{name}", 0, np.array([[0]]), (1,)) for name in ("mean", "var")
        ),
    )
    variables = {"params": {"k": jnp.array([[2.0]])}, "batch_stats": {"mean": 9.0 * jnp.ones(1)}}
    assert float(pruning.group_lasso(variables, [statistics])) == 2.0
    assert float(pruning.group_lasso({"params": variables["params"]}, [statistics])) == 2.0
    held = PARAMS | {"second": optax.MaskedNode()}
    # √3 (√(1 + 9 + 4) + 0 + 0)
    np.testing.assert_allclose(pruning.group_lasso(held, groups), 42**0.5, rtol=1e-6)


def test_batchnorm_l1_by_hand():
    params = {
        "a": {"scale": jnp.array([-2.0, 0.0])},
        "b": {"scale": jnp.array([1.5]), "k": jnp.ones(3)},
    }
    value, gradient = jax.value_and_grad(pruning.batchnorm_l1)(params)
    assert float(value) == 3.5
    assert gradient["a"]["scale"].tolist() == [-1.0, 0.0]
    assert gradient["b"]["k"].tolist() == [0.0] * 3


def test_a_link_of_the_chain_does_what_the_loss_does(groups):
    lasso = functools.partial(pruning.group_lasso, groups=groups)
    tx = optax.chain(pruning.add_penalty(lasso, 0.1), optax.sgd(1.0))
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(PARAMS), PARAMS)
    expected = jax.tree.map(lambda g: -1 - 0.1 * g, jax.grad(lasso)(PARAMS))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    updates, _ = tx.update(halves, tx.init(halves), halves)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


def perceptron(params, x):
    x = jax.nn.relu(x @ params["a"] + params["a_bias"][None])
    x = jax.nn.relu(x @ params["b"] + params["b_bias"][None])
    return x @ params["c"]


def initial(key):
    a, b, c = jax.random.split(key, 3)
    normal = jax.nn.initializers.he_normal()
    return {
        "a": normal(a, (64, 48)),
        "a_bias": jnp.zeros(48),
        "b": normal(b, (48, 32)),
        "b_bias": jnp.zeros(32),
        "c": normal(c, (32, 10)),
    }


def test_a_network_trained_with_group_lasso_loses_less_at_removal(digits):
    x, held_out = (i.reshape(len(i), -1) for i in (digits.images, digits.held_out_images))
    keys = jax.random.split(jax.random.key(0), 3)
    graph = core.trace(perceptron, initial(keys[0]), x[:1])
    groups = graph.groups
    tx = optax.sgd(0.1, momentum=0.9)

    def train(key, strength):
        def step(carry, key):
            params, state = carry
            batch = jax.random.randint(key, (64,), 0, len(x))

            def loss(params):
                losses = optax.softmax_cross_entropy_with_integer_labels(
                    perceptron(params, x[batch]), digits.labels[batch]
                )
                return losses.mean() + strength * pruning.group_lasso(params, groups)

            updates, state = tx.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        params = initial(key)
        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, 400))[0][0]

    def accuracy(params):
        return float((perceptron(params, held_out).argmax(-1) == digits.held_out_labels).mean())

    def lost(params):
        """Accuracy lost at the removal of half and of three quarters of the hidden units."""
        scores = pruning.group_scores(pruning.magnitude(graph.kernels, params, p=2), groups)
        for sparsity in (0.5, 0.75):
            keep = pruning.keep_channels(scores, sparsity)
            kept = core.keep_indices(keep, groups, params)
            yield accuracy(params) - accuracy(core.mask_removed(params, kept))

    seeds = jax.jit(jax.vmap(train, in_axes=(0, None)))
    with_lasso, without = (
        [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(3)]
        for stack in (seeds(keys, 1e-3), seeds(keys, 0.0))
    )
    assert min(map(accuracy, with_lasso)) > 0.9
    # Three seeds, half and three quarters removed.
    less, more = (np.array([[*lost(p)] for p in trained]) for trained in (with_lasso, without))
    assert less[:, 0].max() < 0.01 < more[:, 0].mean()
    assert less[:, 1].mean() + 0.1 < more[:, 1].mean()


def test_bad_input_is_named(groups):
    with pytest.raises(ValueError, match="groups must hold a coupled group to penalize"):
        pruning.group_lasso(PARAMS, [])
    # A tree without the prefix that the traced one has.
    with pytest.raises(ValueError, match=r"params must hold a member of group 'first', got none"):
        pruning.group_lasso({"params": PARAMS}, groups)
    with pytest.raises(ValueError, match="must match at least one path"):
        pruning.batchnorm_l1(PARAMS)
    tx = pruning.add_penalty(pruning.batchnorm_l1, 0.1)
    with pytest.raises(ValueError, match="update must be called with params, got None"):
        tx.update(PARAMS, tx.init(PARAMS))
