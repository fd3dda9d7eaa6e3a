"""The law of layouts: what a criterion, granularity or allocation says does not depend on them."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hybrid_jax import contrib, core, pruning

KEY = jax.random.key(0)
# {kernel: its axes in the second network}: HWIO and OIHW, a layer as (C, O) and (O, C).
TURNED = {"first": (3, 2, 0, 1), "grouped": (3, 2, 0, 1), "depthwise": (3, 2, 0, 1), "head": (1, 0)}
GROUPS = {"first": 1, "grouped": 2, "depthwise": 8}
SHAPES = {
    "first": (3, 3, 4, 8),
    "grouped": (3, 3, 4, 8),
    "depthwise": (3, 1, 1, 8),
    "head": (8, 6),
}


def network(image, kernel, turn):
    """Convolutions in a layout of images and kernels, and a dense layer."""

    def fn(params, x):
        for name, groups in GROUPS.items():
            x = lax.conv_general_dilated(
                x,
                params[name],
                (1, 1),
                "SAME",
                dimension_numbers=(image, kernel, image),
                feature_group_count=groups,
            )
            x = jax.nn.relu(x)
        x = x.mean((image.index("H"), image.index("W")))
        return x @ (params["head"].T if turn else params["head"])

    return fn


def turned(tree, axes=TURNED):
    return {
        name: leaf if core.is_masked_node(leaf) else leaf.transpose(axes[name])
        for name, leaf in tree.items()
    }


def back(tree):
    return turned(tree, {name: np.argsort(axes) for name, axes in TURNED.items()})


USUAL = {
    name: jax.random.normal(jax.random.fold_in(KEY, i), shape)
    for i, (name, shape) in enumerate(SHAPES.items())
}
OTHER = turned(USUAL)
FNS = network("NHWC", "HWIO", False), network("NCHW", "OIHW", True)
IMAGES = jax.random.normal(KEY, (3, 4, 4, 4))
INPUTS = IMAGES, IMAGES.transpose(0, 3, 1, 2)
KERNELS = [
    core.trace(fn, params, x).kernels
    for fn, params, x in zip(FNS, (USUAL, OTHER), INPUTS, strict=True)
]


def given(i):
    """What criteria by name ask for, in one of the networks; the head of the second is transposed.

    A Gram matrix is of a parameter that is the kernel itself, which a transposed one is not.
    """

    def loss(params, x):
        return jnp.square(FNS[i](params, x) - 1).mean()

    params = (USUAL, OTHER)[i]
    return pruning.Given(KERNELS[i], params, FNS[i], loss, [(INPUTS[i],)], KEY)


def obs(given):
    grams = core.input_grams(given.fn, given.params, given.batches, exempt=["head"])
    return pruning.obs(given.params, grams, damping=0.1)


# There are no normalizations here.
CRITERIA = {n: f for n, f in pruning.CRITERIA.items() if n != "batchnorm_scale"} | {"obs": obs}
GRANULARITIES = pruning.GRANULARITIES | contrib.GRANULARITIES
GRAPHS = [
    core.trace(fn, params, x) for fn, params, x in zip(FNS, (USUAL, OTHER), INPUTS, strict=True)
]


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_are_the_same_in_any_layout(name):
    usual, other = CRITERIA[name](given(0)), back(CRITERIA[name](given(1)))
    largest = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(usual))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5 * largest), usual, other
    )


@pytest.mark.parametrize("allocation", pruning.ALLOCATIONS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_masks_are_the_same_in_any_layout(granularity, allocation):
    usual = pruning.lamp(KERNELS[0], USUAL)
    masks = []
    for scores, graph in zip((usual, turned(usual)), GRAPHS, strict=True):
        kind = GRANULARITIES[granularity](graph)
        spread = pruning.ALLOCATIONS[allocation](graph)
        if kind.max_sparsity < 1 and not spread.by_row:
            pytest.skip(f"{granularity} goes with uniform alone")
        # Four does not divide the C of a depthwise kernel, nor two.
        exempt = ["depthwise"] if granularity in ("n_m", "blocks") else []
        masks.append(pruning.masks(scores, 0.5, kind, spread, exempt=exempt))
    chex.assert_trees_all_equal(masks[0], back(masks[1]))


def test_geometric_median_of_filters_stored_first():
    # The reviewer's filters as (O, C): (0, 0), (3, 4), (3, 0): 5 + 3, 5 + 4, 3 + 4.
    params = {"k": jnp.array([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]])[:, :, None, None]}
    fn = lambda params, x: lax.conv(x, params["k"], (1, 1), "SAME")  # noqa: E731
    kernels = core.trace(fn, params, jnp.ones((1, 2, 4, 4))).kernels
    scores = pruning.geometric_median(kernels, params)["k"].sum((1, 2, 3))
    np.testing.assert_allclose(scores, [8.0, 9.0, 7.0])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(8)(x))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        over = {"params": 0, "batch_stats": 0}
        blocks = nn.scan(Block, variable_axes=over, split_rngs={"params": True}, length=3)
        return nn.Dense(2)(blocks()(x, None)[0])


@pytest.mark.parametrize("module", [Scanned(), nn.MultiHeadDotProductAttention(2)])
def test_what_is_stacked_by_a_scan_or_has_heads_is_no_kernel_for_that(module):
    with jax.numpy_rank_promotion("allow"):
        variables = module.init(KEY, IMAGES[0].reshape(1, 8, 8))
        kernels = core.trace(module.apply, variables, IMAGES[0].reshape(1, 8, 8)).kernels
    masks = pruning.masks(pruning.magnitude(kernels, variables), 0.5)
    for path, mask in core.flatten_paths(masks).items():
        # Half of every kernel, and nothing of means, variances, scales and biases.
        assert core.is_masked_node(mask) != path.endswith("kernel"), path
        if path.endswith("kernel"):
            assert int(mask.sum()) == mask.size // 2


def test_the_layers_of_a_scan_are_scored_each_for_itself():
    stack = jax.random.normal(KEY, (3, 4, 4))

    def fn(params, x):
        return lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, params["w"])[0]

    kernels = core.trace(fn, {"w": stack}, jnp.ones((2, 4))).kernels
    one = core.trace(lambda p, x: x @ p["w"], {"w": stack[0]}, jnp.ones((2, 4))).kernels
    for criterion in (pruning.magnitude, pruning.lamp, pruning.geometric_median):
        scores = criterion(kernels, {"w": stack})["w"]
        alone = jnp.stack([criterion(one, {"w": w})["w"] for w in stack])
        np.testing.assert_allclose(scores, alone, rtol=1e-6)
    mask = pruning.masks({"w": stack}, 0.5, contrib.n_m(kernels, 2, 4))["w"]
    assert (mask.sum(axis=1) == 2).all()


@functools.cache
def heads():
    """Attention's query (C, heads, dim) and output (heads, dim, C) as two layers."""

    def fn(params, x):
        q = jnp.einsum("bc,chd->bhd", x, params["q"])
        return jnp.einsum("bhd,hdc->bc", q, params["o"])

    params = {
        "q": jax.random.normal(KEY, (8, 2, 4)),
        "o": jax.random.normal(jax.random.key(1), (2, 4, 8)),
    }
    flat = {"q": params["q"].reshape(8, 8), "o": params["o"].reshape(8, 8)}
    flat_fn = lambda p, x: x @ p["q"] @ p["o"]  # noqa: E731
    x = jnp.ones((2, 8))
    return params, core.trace(fn, params, x), flat, core.trace(flat_fn, flat, x)


@pytest.mark.parametrize("kind", contrib.GRANULARITIES)
def test_heads_are_output_or_input_channels(kind):
    params, graph, flat, flat_graph = heads()
    masks, expected = (
        pruning.masks(
            pruning.geometric_median(own.kernels, p), 0.5, contrib.GRANULARITIES[kind](own)
        )
        for p, own in ((params, graph), (flat, flat_graph))
    )
    for name in params:
        np.testing.assert_array_equal(masks[name].reshape(8, 8), expected[name])
