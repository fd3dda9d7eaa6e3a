import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import contrib, core, models, program, pruning

NET = {
    "a": jnp.array([[1.0, -2.0], [0.0, 2.0], [3.0, 0.5]]),
    "b": jnp.array([[-1.0, 4.0], [2.0, 1.0]]),
}


def linear(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def test_scores_are_the_flow_through_each_weight():
    # |a| has column sums (4, 4.5), |b| row sums (5, 3); what enters and leaves a weight are these.
    flow = contrib.synaptic_flow(linear, NET, jax.ShapeDtypeStruct((1, 3), jnp.float32))
    kernels = core.trace(linear, NET, jnp.ones((1, 3))).kernels
    scores = contrib.synflow(kernels, NET, flow)
    np.testing.assert_allclose(scores["a"], [[5, 6], [0, 6], [15, 1.5]])
    np.testing.assert_allclose(scores["b"], [[4, 16], [9, 4.5]])
    # Conserved: either layer carries all of R = 4 · 5 + 4.5 · 3.
    assert scores["a"].sum() == scores["b"].sum() == 33.5


def test_values_of_inputs_and_signs_of_weights_do_not_matter():
    flow = contrib.synaptic_flow(linear, NET, -7 * jnp.ones((1, 3)))
    again = contrib.synaptic_flow(linear, jax.tree.map(jnp.negative, NET), jnp.zeros((1, 3)))
    chex.assert_trees_all_equal(flow, again)


def test_scale_multiplies_all_scores_alike():
    plain = contrib.synaptic_flow(linear, NET, jnp.ones((1, 3)))
    scaled = contrib.synaptic_flow(linear, NET, jnp.ones((1, 3)), scale=0.5)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(0.25 * a, b), plain, scaled)


def deep(params, x):
    return x @ params["0"] @ params["1"] @ params["2"]


def bounded(params, x):
    return jax.nn.relu6(x @ params["0"] @ params["1"]) @ params["2"]


@pytest.fixture
def deep_params(key):
    shapes = {"0": (2, 50), "1": (50, 50), "2": (50, 2)}
    return {name: jax.random.normal(key, shape) for name, shape in shapes.items()}


def test_rounds_keep_every_layer_where_one_round_empties_the_largest(deep_params):
    # 2700 weights, of which 27 stay.
    x = jnp.ones((1, 2))
    once, rounds = (
        contrib.synflow_masks(deep, deep_params, x, sparsity=0.99, rounds=n) for n in (1, 100)
    )
    flow, kernels = (
        contrib.synaptic_flow(deep, deep_params, x),
        core.trace(deep, deep_params, x).kernels,
    )
    scores = contrib.synflow(kernels, deep_params, flow)
    single = pruning.masks(scores, 0.99, allocation=pruning.global_())
    chex.assert_trees_all_equal(once, single)
    assert sum(int(mask.sum()) for mask in rounds.values()) == 27
    assert once["1"].sum() == 0
    assert all(mask.sum() > 0 for mask in rounds.values())
    assert jnp.abs(deep(pruning.apply_masks(deep_params, rounds), x)).sum() > 0


def test_one_compilation_serves_all_sparsities(deep_params):
    prune = jax.jit(
        lambda s: contrib.synflow_masks(deep, deep_params, jnp.ones((1, 2)), sparsity=s, rounds=5)
    )
    for sparsity in (0.0, 0.5, 0.9, 1.0):
        kept = sum(int(mask.sum()) for mask in prune(sparsity).values())
        assert kept == 2700 - round(2700 * sparsity)
    assert prune._cache_size() == 1


def test_exempt_layers_stay_whole_and_do_not_count(deep_params):
    masks = contrib.synflow_masks(
        deep, deep_params, jnp.ones((1, 2)), sparsity=0.5, rounds=5, exempt=["0"]
    )
    assert core.is_masked_node(masks["0"])
    assert int(masks["1"].sum() + masks["2"].sum()) == 1300


def test_flow_of_a_batchnorm_network_at_initialization():
    model = models.create("resnet8", 5, widths=[4, 4, 8])
    x = jnp.ones((1, 8, 8, 3))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    masks = jax.jit(lambda v: contrib.synflow_masks(model.apply, v, x, sparsity=0.9, rounds=10))(
        variables
    )
    kept = [mask for mask in jax.tree.leaves(masks)]
    total = sum(mask.size for mask in kept)
    assert sum(int(mask.sum()) for mask in kept) == total - round(0.9 * total)
    assert all(mask.any() for mask in kept)
    # Gradients still reach the input.
    alive = jax.grad(lambda x: model.apply(pruning.apply_masks(variables, masks), x).sum())(x)
    assert jnp.abs(alive).max() > 0


def test_a_trained_batchnorm_lets_the_flow_through_once_it_is_folded():
    """Random means of deviation 9 are subtracted before a ReLU; no weight is zero."""
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(8, 8)), jnp.float32) for name in "ab"}
    params["mean"] = jnp.asarray(9 * rng.normal(size=8), jnp.float32)
    fn = lambda p, x: jax.nn.relu(x @ p["a"] - p["mean"][None]) @ p["b"]  # noqa: E731
    x = jnp.ones((1, 8))
    lowered = program.lower(fn, params, x)
    folded = functools.partial(program.apply, lowered)
    for f, p, stopped in ((fn, params, True), (folded, lowered.params, False)):
        p = jax.tree.map(jnp.asarray, p)
        kernels = core.trace(f, p, x).kernels
        scores = contrib.synflow(kernels, p, contrib.synaptic_flow(f, p, x))
        zeros = [float((leaf == 0).mean()) for leaf in jax.tree.leaves(scores)]
        assert len(zeros) == 2
        assert (max(zeros) > 0.1) == stopped


def test_integers_and_embeddings_may_stand_among_the_parameters():
    fn = lambda p, tokens: p["table"][tokens] @ p["w"]  # noqa: E731
    params = {"table": jnp.ones((5, 4)), "w": jnp.ones((4, 2)), "step": jnp.zeros((), jnp.int32)}
    masks = contrib.synflow_masks(fn, params, jnp.zeros(1, jnp.int32), sparsity=0.5, rounds=2)
    assert masks["w"].sum() == 4
    assert core.is_masked_node(masks["step"])


def test_bad_flow_is_named(deep_params):
    x = jnp.ones((1, 2))
    huge = jax.tree.map(lambda leaf: leaf * 1e15, deep_params)
    with pytest.raises(
        ValueError, match=r"a flow that is finite .* got none through '.' at scale 1"
    ):
        contrib.synflow_masks(deep, huge, x, sparsity=0.5, rounds=2)
    contrib.synflow_masks(deep, huge, x, sparsity=0.5, rounds=2, scale=1e-10)
    dead = deep_params | {"1": jnp.zeros((50, 50))}
    with pytest.raises(ValueError, match="got none through '0' at scale 1"):
        contrib.synflow_masks(deep, dead, x, sparsity=0.5, rounds=2)
    with pytest.raises(ValueError, match="got none through '0'"):
        contrib.synflow_masks(bounded, deep_params, x, sparsity=0.5, rounds=2)
    with pytest.raises(ValueError, match="rounds must be an integer of at least 1"):
        contrib.synflow_masks(deep, deep_params, x, sparsity=0.5, rounds=0)
    with pytest.raises(ValueError, match="sparsity must be in"):
        contrib.synflow_masks(deep, deep_params, x, sparsity=1.5)
    with pytest.raises(ValueError, match="scale must be a finite number above 0"):
        contrib.synaptic_flow(deep, deep_params, x, scale=0.0)
