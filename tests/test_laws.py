"""The design's laws 2, 5 and 6 on every model we ship.

Law 1 is in tests/pruning/test_law1.py, law 9 in tests/cost/test_macs.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import core, cost, experts, models, pruning, quantization


def keep_half(graph):
    rng = np.random.default_rng(0)
    return {g.name: rng.permutation(g.size) < max(1, g.size // 2) for g in graph.groups}


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


@pytest.mark.parametrize("name", models.names())
def test_a_target_is_met_from_below_and_costs_are_those_of_the_shrunk_network(name, small_model):
    fn, _, *arrays = small_model(name)
    variables, x = jax.eval_shape(lambda: arrays)
    graph = core.trace(fn, variables, x)
    rng = np.random.default_rng(0)
    scores = {g.name: jnp.asarray(rng.random(g.size), jnp.float32) for g in graph.groups}
    dense = cost.count(graph)

    def choose(sparsity):
        return pruning.keep_channels(scores, sparsity, pruning.global_())

    def macs(keep):
        return core.narrow_graph(graph, keep).macs

    target = 0.45 * dense.macs
    found = pruning.to_target(choose, macs, target)
    # The next larger choice, one channel more, is above the target.
    assert found.cost <= target < macs(choose(found.sparsity - 1e-6))

    kept = core.keep_indices(found.choice, graph.groups, variables)
    small = core.slice_tree(variables, kept)
    shrunk = core.trace(core.narrow(fn, variables, kept), small, x)
    narrowed = core.narrow_graph(graph, found.choice)
    assert narrowed.parameters == shrunk.parameters
    assert narrowed.sites == shrunk.sites
    assert [(g.name, g.size) for g in narrowed.groups if g.size > 1] == [
        (g.name, g.size) for g in shrunk.groups
    ]
    assert cost.count(narrowed) == cost.count(shrunk)
    assert cost.count(narrowed).bytes < dense.bytes


@pytest.mark.parametrize("name", models.names())
def test_a_mask_keeps_exactly_what_its_sparsity_means(name, small_model):
    fn, _, variables, x = small_model(name)
    kernels = core.trace(fn, variables, x).kernels
    masks = jax.jit(lambda v, sparsity: pruning.masks(pruning.magnitude(kernels, v), sparsity))(
        variables, 0.8
    )
    for path, mask in core.flatten_paths(masks).items():
        if core.is_masked_node(mask):
            assert not path.endswith("kernel")
        else:
            # The number removed is 0.8 n, rounded half up.
            assert mask.size - int(mask.sum()) == (8 * mask.size + 5) // 10, path


@pytest.mark.parametrize("name", models.names())
def test_the_stack_equals_the_loop(name, small_model):
    fn, _, variables, x = small_model(name)
    other = jax.tree.map(lambda leaf: leaf * 1.1, variables)
    stack = experts.stack([variables, other])
    apply = jax.jit(fn)
    one_by_one = jnp.stack([apply(variables, x), apply(other, x)])
    for method in ("vmap", "unroll"):
        mapped = jax.jit(experts.map_experts(fn, method, in_axes=(0, None)))
        np.testing.assert_allclose(mapped(stack, x), one_by_one, rtol=1e-4, atol=1e-5)
    both = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    chosen = experts.combine(one_by_one, both)
    np.testing.assert_array_equal(chosen, one_by_one[[0, 1, 0, 1], np.arange(4)])


@pytest.mark.parametrize("name", models.names())
def test_one_compilation_for_all_bits_ranges_and_sparsities(name, small_model):
    fn, _, variables, x = small_model(name)
    graph = core.trace(fn, variables, x)
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
        masks = pruning.masks(pruning.magnitude(graph.kernels, variables), sparsity)
        variables = pruning.apply_masks(variables, masks)
        return quantization.fake_quantized(fn, spec)(variables, ranges, x, bits=bits)

    outs = []
    for bits, sparsity, scale in ((8, 0.0, 1.0), (4, 0.5, 2.0), (2, 0.8, 0.5)):
        traced = jax.tree.map(lambda b, bits=bits: jnp.full_like(b, bits), spec.bits())
        wider = jax.tree.map(lambda leaf, scale=scale: leaf * scale, ranges)
        outs.append(pruned_and_quantized(variables, wider, traced, jnp.float32(sparsity)))
    assert pruned_and_quantized._cache_size() == 1
    assert all(np.isfinite(out).all() for out in outs)
    assert not np.allclose(outs[0], outs[1])
