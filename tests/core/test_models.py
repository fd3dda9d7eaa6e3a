"""Law 1 on every model we ship, in inference and in training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import core, models

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
