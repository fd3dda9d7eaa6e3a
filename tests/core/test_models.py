"""Law 1 on every model we ship, in inference and in training, and after further steps of both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
IMAGES = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
LABELS = jnp.array([0, 1, 2, 3])


def test_every_model_is_here():
    assert set(SIZES) == set(models.names())


@functools.cache
def trained(name):
    """A model with statistics of real activations, so that no layer explodes."""
    module = models.create(name, 5, **SIZES[name])
    variables = jax.jit(module.init)(jax.random.key(0), IMAGES)
    bumped = core.map_with_path(
        lambda path, leaf: (
            leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)
            if path.startswith("params")
            else leaf
        ),
        variables,
    )
    _, update = jax.jit(lambda v: module.apply(v, IMAGES, True, mutable=["batch_stats"]))(bumped)
    return module, bumped | update


def keep_half(graph):
    rng = np.random.default_rng(0)
    return {g.name: rng.permutation(g.size) < max(1, g.size // 2) for g in graph.groups}


@pytest.mark.parametrize("name", SIZES)
def test_masked_equals_shrunk(name):
    module, variables = trained(name)

    def inference(variables, images):
        return module.apply(variables, images)

    def training(variables, images):
        return module.apply(variables, images, True, mutable=["batch_stats"])

    graph = core.trace(inference, variables, IMAGES)
    masks = core.expand(keep_half(graph), graph.groups, variables)
    small_inference, small, certificate = core.shrink(inference, variables, masks, IMAGES)
    scale = float(jnp.abs(small_inference(small, IMAGES)).max())
    assert certificate.difference < 1e-5 * max(1.0, scale)
    assert certificate.macs[1] < 0.5 * certificate.macs[0]
    kept = certificate.kept
    small_training = core.narrow(training, variables, kept)

    def steps(fn, variables, hold):
        tx = optax.sgd(0.02)

        def loss(params, stats):
            logits, new = fn({"params": params, "batch_stats": stats}, IMAGES)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
            return losses.mean(), (logits, new["batch_stats"])

        @jax.jit
        def step(_, carry):
            params, stats, _ = carry
            gradient, (logits, stats) = jax.grad(loss, has_aux=True)(params, stats)
            updates, _ = tx.update(hold({"params": gradient})["params"], tx.init(params))
            return optax.apply_updates(params, updates), stats, logits

        start = variables["params"], variables["batch_stats"], jnp.zeros((4, 5))
        first = step(0, start)
        return first, jax.lax.fori_loop(0, 19, step, first)

    masked = core.mask_removed(variables, kept)
    large, large_after = steps(training, masked, functools.partial(core.mask_removed, kept=kept))
    own, own_after = steps(small_training, small, lambda gradient: gradient)
    np.testing.assert_allclose(own[2], large[2], rtol=1e-4, atol=1e-5)
    # Twenty steps of a chaotic system multiply rounding; what they reach is the same network.
    np.testing.assert_allclose(own_after[2], large_after[2], rtol=0.02, atol=0.02)


def test_resnet50_at_full_resolution_is_traced_grouped_and_sliced():
    module = models.create("resnet50", 1000)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
    graph = core.trace(module.apply, variables, images)
    masks = core.expand(keep_half(graph), graph.groups, variables)
    _, small, certificate = core.shrink(module.apply, variables, masks, images)
    assert small["params"]["head"]["kernel"].shape == (1024, 1000)
    assert certificate.parameters == (25_610_152, 6_949_736)
