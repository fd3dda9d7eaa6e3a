"""The design's laws 1, 2, 5 and 6 on every model we ship; law 9 is in tests/cost/test_macs.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import core, cost, experts, models, pruning, quantization

# Whole models where they compile quickly; of the deep ones, every kind of block once or twice.
SIZES = {
    "resnet8": {},
    "resnet20": {"blocks": [2, 2, 1]},
    "resnet32": {"blocks": [1, 2, 1], "shortcut": "project"},
    "resnet56": {"blocks": [3, 1, 1]},
    "resnet18": {"stem": "cifar", "widths": [8, 16, 24, 32]},
    "resnet50": {"blocks": [2, 1, 1, 2], "widths": [8, 8, 16, 16], "stem": "cifar"},
    "vgg16_bn": {"widths": [[8, 8], [16, 16], [16, 16, 16], [24, 24, 24], [24, 24, 24]]},
    "mobilenet_v2": {"stages": [[1, 8, 1, 1], [6, 8, 2, 2], [6, 16, 2, 2]], "stem": "cifar"},
    "densenet": {"blocks": [3, 3, 2]},
    "densenet40": {"blocks": [3, 3, 2]},
}


def test_every_model_is_here():
    assert set(SIZES) == set(models.names())


def images(name):
    side = 32 if name == "vgg16_bn" else 16
    return jax.random.normal(jax.random.key(1), (4, side, side, 3))


@functools.cache
def trained(name):
    """A model with statistics of real activations, so that no layer explodes."""
    module, x = models.create(name, 5, **SIZES[name]), images(name)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    bumped = core.map_with_path(
        lambda path, leaf: (
            leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)
            if path.startswith("params")
            else leaf
        ),
        variables,
    )
    _, update = jax.jit(lambda v: module.apply(v, x, True, mutable=["batch_stats"]))(bumped)
    return module, bumped | update


def keep_half(graph):
    rng = np.random.default_rng(0)
    return {g.name: rng.permutation(g.size) < max(1, g.size // 2) for g in graph.groups}


@pytest.mark.parametrize("name", SIZES)
def test_masked_equals_shrunk(name):
    (module, variables), x = trained(name), images(name)

    def inference(variables, images):
        return module.apply(variables, images)

    def training(variables, images):
        return module.apply(variables, images, True, mutable=["batch_stats"])

    graph = core.trace(inference, variables, x)
    masks = core.expand(keep_half(graph), graph.groups, variables)
    _, small, certificate = core.shrink(inference, variables, masks, x)
    assert certificate.macs[1] < 0.5 * certificate.macs[0]
    assert certificate.difference < 1e-5
    masked = core.mask_removed(variables, certificate.kept)
    small_training = core.narrow(training, variables, certificate.kept)
    logits, update = jax.jit(training)(masked, x)
    small_logits, small_update = jax.jit(small_training)(small, x)
    np.testing.assert_allclose(small_logits, logits, rtol=1e-5, atol=1e-5)
    update = core.slice_tree(update, certificate.kept)
    for a, b in zip(jax.tree.leaves(update), jax.tree.leaves(small_update)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_resnet50_at_full_resolution_is_traced_grouped_and_sliced():
    module = models.create("resnet50", 1000)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
    graph = core.trace(module.apply, variables, images)
    masks = core.expand(keep_half(graph), graph.groups, variables)
    _, small, certificate = core.shrink(module.apply, variables, masks, images)
    assert small["params"]["head"]["kernel"].shape == (1024, 1000)
    assert certificate.parameters == (25_610_152, 6_944_200)


def shapes(name):
    module, x = models.create(name, 5, **SIZES[name]), images(name)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    return module.apply, variables, jax.ShapeDtypeStruct(x.shape, x.dtype)


@pytest.mark.parametrize("name", SIZES)
def test_a_target_is_met_from_below_and_costs_are_those_of_the_shrunk_network(name):
    fn, variables, x = shapes(name)
    graph = core.trace(fn, variables, x)
    rng = np.random.default_rng(0)
    scores = {g.name: jnp.asarray(rng.random(g.size), jnp.float32) for g in graph.groups}
    dense = cost.count(graph)

    def choose(sparsity):
        return pruning.keep_channels(scores, sparsity, "global")

    def macs(keep):
        return core.narrow_graph(graph, keep).macs

    target = 0.45 * dense.macs
    found = pruning.to_target(choose, macs, target)
    # The next larger choice, one channel more, is above the target.
    assert found.cost <= target < macs(choose(found.sparsity - 1e-6))

    kept = core.keep_indices(found.choice, graph.groups, variables)
    small = jax.eval_shape(lambda tree: core.slice_tree(tree, kept), variables)
    shrunk = core.trace(core.narrow(fn, variables, kept), small, x)
    narrowed = core.narrow_graph(graph, found.choice)
    assert narrowed.parameters == shrunk.parameters
    assert narrowed.sites == shrunk.sites
    assert [(g.name, g.size) for g in narrowed.groups if g.size > 1] == [
        (g.name, g.size) for g in shrunk.groups
    ]
    assert cost.count(narrowed) == cost.count(shrunk)
    assert cost.count(narrowed).bytes < dense.bytes


@pytest.mark.parametrize("name", SIZES)
def test_a_mask_keeps_exactly_what_its_sparsity_means(name):
    _, variables = trained(name)
    masks = jax.jit(lambda v, sparsity: pruning.masks(pruning.magnitude(v), sparsity))(
        variables, 0.8
    )
    for path, mask in core.flatten_paths(masks).items():
        if core.is_masked_node(mask):
            assert not path.endswith("kernel")
        else:
            # The number removed is 0.8 n, rounded half up.
            assert mask.size - int(mask.sum()) == (8 * mask.size + 5) // 10, path


@pytest.mark.parametrize("name", SIZES)
def test_two_of_four_runs_along_the_contracted_axis(name):
    module, variables = trained(name)
    graph = core.trace(module.apply, variables, images(name))
    axes = {site.path: site.kernel_in_axes[-1] for site in graph.sites}
    fits = {
        path: axis for path, axis in axes.items() if graph.parameters[path].shape[axis] % 4 == 0
    }
    scores = core.map_with_path(
        lambda path, leaf: jnp.abs(leaf) if path in fits else optax.MaskedNode(), variables
    )
    masks = core.flatten_paths(pruning.masks(scores, granularity=pruning.n_m(2, 4)))
    assert fits
    for path, axis in fits.items():
        blocks = np.moveaxis(np.asarray(masks[path]), axis, -1)
        assert (blocks.reshape(-1, 4).sum(-1) == 2).all(), path


@pytest.mark.parametrize("name", SIZES)
def test_the_stack_equals_the_loop(name):
    (module, variables), x = trained(name), images(name)
    other = jax.tree.map(lambda leaf: leaf * 1.1, variables)
    stack = experts.stack([variables, other])
    apply = jax.jit(module.apply)
    one_by_one = jnp.stack([apply(variables, x), apply(other, x)])
    for method in ("vmap", "unroll"):
        mapped = jax.jit(experts.map_experts(module.apply, method, in_axes=(0, None)))
        np.testing.assert_allclose(mapped(stack, x), one_by_one, rtol=1e-4, atol=1e-5)
    both = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    chosen = experts.combine(one_by_one, both)
    np.testing.assert_array_equal(chosen, one_by_one[[0, 1, 0, 1], np.arange(4)])


@pytest.mark.parametrize("name", SIZES)
def test_one_compilation_for_all_bits_ranges_and_sparsities(name):
    (module, variables), x = trained(name), images(name)
    graph = core.trace(module.apply, variables, x)
    spec = quantization.spec(graph, weight_bits=8, activation_bits=8)
    ranges = {
        site.name: {
            "weight": quantization.extent(weight, tuple(site.kernel_in_axes)),
            "activation": quantization.Range(jnp.float32(-4), jnp.float32(4)),
        }
        for site in graph.sites
        for weight in [core.flatten_paths(variables)[site.path]]
    }

    @jax.jit
    def pruned_and_quantized(variables, ranges, bits, sparsity):
        masks = pruning.masks(pruning.magnitude(variables), sparsity)
        variables = pruning.apply_masks(variables, masks)
        return quantization.fake_quantized(module.apply, spec)(variables, ranges, x, bits=bits)

    outs = []
    for bits, sparsity, scale in ((8, 0.0, 1.0), (4, 0.5, 2.0), (2, 0.8, 0.5)):
        traced = jax.tree.map(lambda b, bits=bits: jnp.full_like(b, bits), spec.bits())
        wider = jax.tree.map(lambda leaf, scale=scale: leaf * scale, ranges)
        outs.append(pruned_and_quantized(variables, wider, traced, jnp.float32(sparsity)))
    assert pruned_and_quantized._cache_size() == 1
    assert all(np.isfinite(out).all() for out in outs)
    assert not np.allclose(outs[0], outs[1])
