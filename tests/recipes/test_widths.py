"""Experts of different widths in one stack: what is masked there, and what is cut out of it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import core, pruning, quantization, recipes
from hybrid_jax.recipes import cutting, phase1


@pytest.fixture
def spec():
    (first, *_) = recipes.expert_specs(recipes.default_config())
    return first


def fn(variables, x):
    params = variables["params"]
    hidden = jnp.maximum(x @ params["a"]["kernel"] + params["a"]["bias"][None], 0)
    return hidden @ params["b"]["kernel"]


def cut(keep):
    """A stack's network with 4 hidden channels, of which an expert keeps these."""
    rng = np.random.default_rng(0)
    params = {
        "a": {"kernel": rng.standard_normal((3, 4)), "bias": rng.standard_normal(4)},
        "b": {"kernel": rng.standard_normal((4, 2))},
    }
    variables = core.map_with_path(
        lambda path, leaf: jnp.float32(leaf), {"params": params, "batch_stats": {}}
    )
    graph = core.trace(fn, variables, jnp.ones((1, 3)))
    (group,) = graph.groups
    kept = core.keep_indices({group.name: np.array(keep)}, graph.groups, variables)
    small = core.narrow(fn, variables, kept)
    sites = core.trace(small, core.slice_tree(variables, kept), jnp.ones((1, 3)))
    return variables, graph, cutting.Cut(None, variables, None, cutting.Own(small, sites, kept))


def test_all_but_the_own_channels_are_masked(spec):
    _, graph, made = cut([True, False, True, False])
    masks = cutting.stack_masks(made, graph.kernels, spec)
    assert masks["a"]["kernel"].tolist() == [[True, False, True, False]] * 3
    assert masks["a"]["bias"].tolist() == [True, False, True, False]
    assert masks["b"]["kernel"].tolist() == [[True] * 2, [False] * 2] * 2


def test_weights_are_thinned_among_the_own_channels(spec):
    variables, graph, made = cut([True, False, True, False])
    half = dataclasses.replace(spec, weight_sparsity=0.5)
    mask = np.asarray(cutting.stack_masks(made, graph.kernels, half)["a"]["kernel"])
    # Of the 6 weights of the own channels the 3 largest stay.
    own = np.abs(np.asarray(variables["params"]["a"]["kernel"]))[:, [0, 2]]
    np.testing.assert_array_equal(mask[:, [0, 2]], own >= np.sort(own.ravel())[3])
    assert not mask[:, [1, 3]].any()


def test_a_stack_of_one_width_has_no_masks(spec):
    _, graph, made = cut([True] * 4)
    masks = cutting.stack_masks(made._replace(own=None), graph.kernels, spec)
    assert all(core.is_masked_node(m) for m in core.flatten_paths(masks).values())


def test_an_expert_alone_computes_what_it_does_in_the_stack(spec):
    variables, graph, narrow = cut([True, False, True, False])
    *_, wide = cut([True] * 4)
    quantizer = quantization.spec(graph, weight_bits=4)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((8, 3)), jnp.float32)
    stack, masks = [], []
    for made in (narrow, wide):
        mask = cutting.stack_masks(made, graph.kernels, spec)
        masked = variables | {"params": pruning.apply_masks(variables["params"], mask)}
        ranges = quantization.calibrate(fn, masked, [(x,)], quantizer)
        stack.append({**masked, "ranges": ranges, "bits": quantizer.bits()})
        masks.append(mask)
    cheap, dear = (
        phase1._alone(own, mask, made, graph, fn)
        for own, mask, made in zip(stack, masks, (narrow, wide), strict=True)
    )
    assert cheap.variables["params"]["a"]["kernel"].shape == (3, 2)
    assert dear.variables["params"]["a"]["kernel"].shape == (3, 4)
    assert cheap.masks["b"]["kernel"].shape == (2, 2)
    for own, expert in zip((cheap, dear), stack, strict=True):
        assert {site.name for site in own.graph.sites} == {"params/a/kernel", "params/b/kernel"}
        np.testing.assert_allclose(
            quantization.fake_quantized(own.predict, quantizer)(own.variables, own.ranges, x),
            quantization.fake_quantized(fn, quantizer)(expert, expert["ranges"], x),
            atol=1e-6,
        )
