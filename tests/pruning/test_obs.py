import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hybrid_jax import contrib, core, pruning

TINY = 1e-6


def dense(params, x):
    return x @ params["w"]


def layer(x, w):
    """A dense layer's parameters and Gram matrices."""
    params, x = {"w": jnp.asarray(w, jnp.float32)}, jnp.asarray(x, jnp.float32)
    return params, core.input_grams(dense, params, [(x,)])


def test_scores_and_update_by_hand():
    # X = [[1, 1], [1, 0]]: H = [[2, 1], [1, 1]], H⁻¹ = [[1, −1], [−1, 2]], w = (1, 2).
    #   alone: 1² / (2 · 1) = 0.5 and 2² / (2 · 2) = 1
    #   without w_0 the move is −w_0 / 1 · (1, −1) = (−1, 1): ŵ = (0, 3)
    #   greedily: 0.5, then 3² / (2 · 1/H_11) = 4.5
    params, grams = layer([[1, 1], [1, 0]], [[1], [2]])
    scores = pruning.obs(params, grams, damping=TINY)["w"]
    np.testing.assert_allclose(scores, [[0.5], [1.0]], rtol=1e-4)
    greedy = pruning.obs(params, grams, damping=TINY, greedy=True)["w"]
    np.testing.assert_allclose(greedy, [[0.5], [4.5]], rtol=1e-4)
    masks = pruning.masks({"w": scores}, 0.5)
    moved = pruning.compensate(params, masks, grams, damping=TINY)["w"]
    np.testing.assert_allclose(moved, [[0.0], [3.0]], rtol=1e-4)
    # The loss is what the score said: the outputs change by X (1, −1) = (0, 1), and ½ · 1 = 0.5.


def test_a_weight_is_not_scored_below_one_that_left_before():
    # H⁻¹ = [[2, 1], [1, 1]]; after w_0 left it is 1 − 1/2 for w_1, after w_1 left 2 − 1 for w_0.
    #   (2, −1):   2²/4 or 1²/2: w_1 leaves at 0.5, w_0 = 2 + 1 = 3 leaves at 3²/2 = 4.5
    #   (1, 1.2):  1²/4 or 1.2²/2: w_0 leaves at 0.25, w_1 = 1.2 − 1/2 leaves at 0.7² = 0.49
    #   (1, 0.6):  1²/4 or 0.6²/2: w_1 leaves at 0.18, w_0 = 1 − 0.6 would leave at 0.4²/2 = 0.08
    x = np.linalg.cholesky(np.linalg.inv([[2.0, 1.0], [1.0, 1.0]])).T
    params, grams = layer(x, [[2, 1, 1], [-1, 1.2, 0.6]])
    scores = pruning.obs(params, grams, damping=TINY, greedy=True)["w"]
    expected = [[4.5, 0.25, 0.18], [0.5, 0.49, 0.18]]
    np.testing.assert_allclose(scores, expected, rtol=1e-3)
    assert scores[0, 2] > scores[1, 2]


def random_layer(seed):
    """Well-conditioned inputs (12, 5) and weights (5, 3), in float32."""
    rng = np.random.default_rng(seed)
    x = np.vstack([rng.normal(size=(7, 5)), np.eye(5)]).astype(np.float32)
    return x, rng.normal(size=(5, 3)).astype(np.float32)


def least_squares(x, target, kept):
    """The weights with support `kept` whose outputs are nearest to `target`, and their loss."""
    w = np.zeros(x.shape[1])
    w[kept] = np.linalg.lstsq(np.float64(x[:, kept]), target, rcond=None)[0]
    return w, 0.5 * np.sum((x @ w - target) ** 2)


@hypothesis.given(
    seed=st.integers(0, 10**6), kept=st.lists(st.booleans(), min_size=15, max_size=15)
)
@hypothesis.settings(max_examples=25)
def test_compensation_is_least_squares(seed, kept):
    x, w = random_layer(seed)
    kept = np.array(kept).reshape(5, 3)
    params, grams = layer(x, w)
    moved = pruning.compensate(params, {"w": jnp.asarray(kept)}, grams, damping=TINY)["w"]
    for o in range(3):
        expected, _ = least_squares(x, np.float64(x) @ w[:, o], kept[:, o])
        np.testing.assert_allclose(moved[:, o], expected, rtol=1e-2, atol=1e-3)
    assert not np.any(np.asarray(moved)[~kept])
    whole = kept.all(axis=0)
    np.testing.assert_array_equal(moved[:, whole], w[:, whole])


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_exhaustive_search_at_each_step(seed):
    # Not by the formulas of OBS: every candidate is removed, and the least squares solved anew.
    x, w = random_layer(seed)
    params, grams = layer(x, w)
    scores = pruning.obs(params, grams, damping=TINY, greedy=True)["w"]
    for o in range(3):
        kept, loss, last = np.ones(5, bool), 0.0, 0.0
        target = np.float64(x) @ w[:, o]
        while kept.any():
            tried = {}
            for i in np.flatnonzero(kept):
                without = kept & (np.arange(5) != i)
                tried[i] = least_squares(x, target, without)[1]
            i = min(tried, key=tried.get)
            last = max(last, tried[i] - loss)
            kept[i], loss = False, tried[i]
            np.testing.assert_allclose(scores[i, o], last, rtol=1e-3, atol=1e-5)


def test_compensation_helps_every_layer(digits, digits_grams, layer_errors):
    kernels = core.trace(digits.fn, digits.params, digits.images[:1]).kernels
    plain_scores = pruning.magnitude(kernels, digits.params)
    for granularity in (pruning.unstructured(), None):
        if granularity is None:  # 2:4 where C is a multiple of 4
            granularity, exempt = contrib.n_m(kernels, 2, 4), [".*(stem|depthwise).*"]
        else:
            exempt = []
        masks = pruning.masks(plain_scores, 0.5, granularity, exempt=exempt)
        moved = pruning.compensate(digits.params, masks, digits_grams)
        before = layer_errors(pruning.apply_masks(digits.params, masks))
        after = layer_errors(moved)
        for path, mask in core.flatten_paths(masks).items():
            if not core.is_masked_node(mask):
                assert after[path] < 0.95 * before[path], path
                assert not np.any(np.asarray(core.flatten_paths(moved)[path])[~np.asarray(mask)])


def test_full_obs_is_better_than_compensated_magnitude(digits, digits_grams, layer_errors):
    errors, divergences = {}, {}
    kernels = core.trace(digits.fn, digits.params, digits.images[:1]).kernels
    candidates = {
        "magnitude": pruning.magnitude(kernels, digits.params),
        "obs": pruning.obs(digits.params, digits_grams),
        "greedy": pruning.obs(digits.params, digits_grams, greedy=True),
    }
    predict = jax.jit(digits.fn)

    def divergence(params):
        logs, wanted = (
            jax.nn.log_softmax(predict(each, digits.held_out_images))
            for each in (params, digits.params)
        )
        return float((jnp.exp(wanted) * (wanted - logs)).sum(-1).mean())

    for name, scores in candidates.items():
        masks = pruning.masks(scores, 0.5)
        moved = pruning.compensate(digits.params, masks, digits_grams)
        errors[name], divergences[name] = layer_errors(moved), divergence(moved)
    for path in digits_grams:
        assert errors["greedy"][path] < errors["magnitude"][path], path
        assert errors["greedy"][path] < 1.05 * errors["obs"][path], path  # nine weights: alike
    assert sum(errors["greedy"].values()) < sum(errors["obs"].values())
    plain = pruning.apply_masks(digits.params, pruning.masks(candidates["magnitude"], 0.5))
    assert max(divergences["magnitude"], divergences["greedy"]) < 0.5 * divergence(plain)


@pytest.mark.parametrize("channels", [1, 2])
def test_groups_are_dense_layers_of_their_own(digits, channels):
    # A depthwise (1) and a grouped (2) convolution over 2 × 2 patches of real images as 4 channels.
    x = digits.images[:16].reshape(16, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(16, 4, 4, 4)
    groups = 4 // channels
    kernel = jax.random.normal(jax.random.key(0), (2, 2, channels, 2 * groups))

    def conv(params, x):
        return lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip

    params = {"w": kernel}
    grams = core.input_grams(conv, params, [(x,)])
    scores = pruning.obs(params, grams, greedy=True)
    masks = pruning.masks(scores, 0.5)
    moved = pruning.compensate(params, masks, grams)
    rule = lambda site, x, kernel, apply: (apply(x, kernel), core.patches(site, x, apply))  # noqa: E731
    seen = core.at_sites(conv, rule)(params, x)[1]["w"]
    site = grams["w"].site
    in_groups = [core.kernel_matrix(site, tree["w"]) for tree in (params, masks, scores, moved)]
    for g in range(groups):
        w, mask, score, expected = (leaf[g] for leaf in in_groups)
        alone, gram = layer(seen[g], w)
        np.testing.assert_allclose(
            pruning.obs(alone, gram, greedy=True)["w"], score, rtol=1e-3, atol=1e-5
        )
        own = pruning.compensate(alone, {"w": mask}, gram)["w"]
        np.testing.assert_allclose(own, expected, rtol=1e-3, atol=1e-5)


def test_jit_and_a_stack_of_experts():
    stacks = [random_layer(seed) for seed in range(2)]
    x = jnp.asarray(stacks[0][0])
    params = {"w": jnp.stack([w for _, w in stacks])}
    grams = core.input_grams(dense, params, [(x,)], stacked=True)

    def prune(params, grams, sparsity):
        masks = pruning.masks(pruning.obs(params, grams), sparsity)
        return pruning.compensate(params, masks, grams)

    compiled = jax.jit(jax.vmap(prune))
    together = compiled(params, grams, jnp.array([0.4, 0.8]))
    for i, sparsity in enumerate([0.4, 0.8]):
        alone, gram = layer(x, stacks[i][1])
        expected = prune(alone, gram, sparsity)["w"]
        np.testing.assert_allclose(together["w"][i], expected, rtol=1e-4, atol=1e-5)
    compiled(params, grams, jnp.array([0.1, 0.2]))
    assert compiled._cache_size() == 1


def test_dead_inputs_answer_nothing():
    # The second input is always zero: what its weight is does not matter, and it does not move.
    params, grams = layer([[1, 0, 1], [1, 0, 0]], [[1], [5], [2]])
    scores = pruning.obs(params, grams)["w"]
    assert scores[1, 0] < scores[0, 0]
    assert np.all(np.isfinite(scores))
    kept = {"w": jnp.array([[False], [True], [True]])}
    moved = pruning.compensate(params, kept, grams)["w"]
    assert float(moved[1, 0]) == 5.0
    assert float(moved[2, 0]) > 2.5
    dead, nothing = layer(np.zeros((4, 3)), [[1], [5], [2]])
    np.testing.assert_array_equal(pruning.compensate(dead, kept, nothing)["w"], [[0], [5], [2]])


def test_bad_input():
    params, grams = layer([[1, 1], [1, 0]], [[1], [2]])
    masks = {"w": jnp.array([[True], [False]])}
    with pytest.raises(ValueError, match="grams must hold at least one kernel, got none"):
        pruning.obs(params, {})
    with pytest.raises(ValueError, match="grams must be of parameters, got 'w' among: v"):
        pruning.obs({"v": params["w"]}, grams)
    with pytest.raises(ValueError, match="damping must be a finite number above 0, got 0"):
        pruning.obs(params, grams, damping=0.0)
    with pytest.raises(ValueError, match="every kernel with a mask, got none for 'w' among: noth"):
        pruning.compensate(params, masks, {})
    with pytest.raises(ValueError, match=r"masks must have bool\[2,1\] at 'w'"):
        pruning.compensate(params, {"w": jnp.array([True, False])}, grams)
