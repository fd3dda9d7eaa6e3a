"""Every registered model: published size, and one contract."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import core, models

# A size of each that compiles in no time, and the image side it takes.
SMALL = {
    "resnet8": ({"blocks": [1, 1], "widths": [4, 6]}, 4),
    "resnet20": ({"blocks": [1, 1], "widths": [4, 4]}, 4),
    "resnet32": ({"blocks": [1, 1], "widths": [4, 6], "shortcut": "project"}, 4),
    "resnet56": ({"blocks": [2], "widths": [4]}, 4),
    "resnet18": ({"blocks": [1], "widths": [4]}, 8),
    "resnet50": ({"blocks": [1], "widths": [4]}, 8),
    "vgg16_bn": ({"widths": [[4], [8]], "hidden": 8}, 4),
    "mobilenet_v2": ({"stages": [[1, 8, 1, 1], [2, 8, 1, 2]], "width": 0.1, "stem": "cifar"}, 4),
    "efficientnet_lite0": ({"stages": [[1, 8, 1, 1, 3], [2, 8, 1, 2, 5]], "widths": [8, 16]}, 4),
    "densenet": ({"blocks": [1, 1], "growth": 4}, 4),
    "densenet40": ({"blocks": [1, 1], "growth": 4}, 4),
}


def abstract(model, side, channels=3):
    images = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def filled(variables):
    """Values for a model's variables: compiling its initializers would take longer than a test."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if path.endswith("kernel"):
            return jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype)
        return jnp.full(leaf.shape, float(path.endswith(("scale", "var"))), leaf.dtype)

    return core.map_with_path(fill, variables)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "side", "num_classes", "parameters"),
    [
        # CIFAR ResNet of n blocks a stage. Convolutions: stem 3·3·3·16 = 432; 2n of 9·16·16 = 2304;
        # 9·16·32 = 4608 and 2n-1 of 9216; 18432 and 2n-1 of 36864. BatchNorms: scale and bias,
        # 2·(16 + 2n·(16 + 32 + 64)) = 32 + 448n. Dense: 64·10 + 10 = 650. Together 97216n - 21926:
        # n=1, 3, 5 and 9; the paper gives 0.27, 0.46 and 0.85 M for 20, 32 and 56 layers.
        ("resnet8", 32, 10, 75_290),
        ("resnet20", 32, 10, 269_722),
        ("resnet32", 32, 10, 464_154),
        ("resnet56", 32, 10, 853_018),
        # torchvision's published counts.
        ("resnet18", 224, 1000, 11_689_512),
        ("resnet50", 224, 1000, 25_557_032),
        ("mobilenet_v2", 224, 1000, 3_504_872),
        # Its authors give 4.7 M.
        ("efficientnet_lite0", 224, 1000, 4_652_008),
        # Convolutions 14,710,464, their BatchNorms 2·4224 = 8448; hidden 512·512 = 262,144 and
        # BatchNorm 1024; head 5130.
        ("vgg16_bn", 32, 10, 14_987_210),
        # The paper gives 0.8 M for BC of 100 layers. HRank gives 1.04 M for DenseNet-40: without
        # the BatchNorms' 18,720 it is 1,040,578.
        ("densenet", 32, 10, 769_162),
        ("densenet40", 32, 10, 1_059_298),
    ],
)
def test_published_parameter_counts(name, side, num_classes, parameters):
    variables = abstract(models.create(name, num_classes), side)
    assert count(variables["params"]) == parameters


def test_vgg_counts_as_published_without_batchnorm():
    # 14.98 M is of convolutions and dense layers: 14,710,464 + 262,144 + 5,130 = 14,977,738.
    leaves = core.flatten_paths(abstract(models.create("vgg16_bn", 10), 32)["params"])
    assert sum(v.size for path, v in leaves.items() if "norm" not in path) == 14_977_738


def test_every_model_is_covered():
    assert set(SMALL) == set(models.names())


@pytest.mark.parametrize("name", SMALL)
def test_contract(name, key):
    overrides, side = SMALL[name]
    model = models.create(name, 5, **overrides)
    hash(model)
    images = jax.random.normal(key, (3, side, side, 1))
    labels = jnp.array([0, 4, 2])
    variables = filled(abstract(model, side, channels=1))
    assert set(variables) == {"params", "batch_stats"}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    @jax.jit
    def predict(variables, images):
        return model.apply(variables, images)

    logits = predict(variables, images)
    assert (logits.shape, logits.dtype) == ((3, 5), jnp.float32)
    # In evaluation an example's logits do not depend on what else is in the batch.
    assert jnp.allclose(logits[:1], predict(variables, images.at[1:].multiply(3))[:1], atol=1e-5)

    @jax.jit
    def step(variables):
        def loss(params):
            logits, changed = model.apply(
                variables | {"params": params}, images, train=True, mutable=["batch_stats"]
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return loss.mean(), changed

        (value, changed), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return value, changed, grads

    value, changed, grads = step(variables)
    assert jnp.isfinite(value)
    moved = jax.tree.map(
        lambda old, new: bool(jnp.any(old != new)), variables["batch_stats"], changed["batch_stats"]
    )
    assert all(jax.tree.leaves(moved))
    # Every kernel takes part.
    used = core.flatten_paths(jax.tree.map(lambda g: bool(jnp.any(g != 0)), grads))
    assert all(used[path] for path in used if path.endswith("kernel")), used


def test_option_a_shortcut_by_hand():
    # One channel to three: one zero channel before, one after; every other pixel is kept.
    from hybrid_jax.models.resnet import shortcut

    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    y = shortcut(x, width=3, stride=2, kind="pad", train=False)
    assert y[0, :, :, 1].tolist() == [[0, 2], [8, 10]]
    assert not y[..., 0].any()
    assert not y[..., 2].any()


def test_stems():
    # 'imagenet' quarters H and W before the first stage and each later stage halves: 32/4/8 = 1.
    # 'cifar' keeps them: 32/8 = 4.
    for name, last in (("resnet18", "stage3_block1"), ("mobilenet_v2", "last")):
        for stem, side in (("imagenet", 1), ("cifar", 4)):
            model = models.create(name, 10, stem=stem)
            images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
            _, state = jax.eval_shape(
                lambda images, model=model: model.init_with_output(
                    jax.random.key(0), images, capture_intermediates=True
                ),
                images,
            )
            (output,) = state["intermediates"][last]["__call__"]
            assert output.shape[1:3] == (side, side)


@pytest.mark.parametrize(
    ("arguments", "overrides", "message"),
    [
        (("resnet5", 10), {}, r"name must be one of .*did you mean resnet\d+\?"),
        (("resnet8", 0), {}, "num_classes must be an integer of at least 1, got 0"),
        (("resnet8", 10), {"width": 1}, "override of resnet8 must be .*did you mean widths"),
        (("resnet8", 10), {"stem": "cifr"}, "stem must be one of cifar, imagenet, got 'cifr'"),
        (("resnet8", 10), {"widths": (4, 8)}, r"widths must be 3 long as blocks, got \(4, 8\)"),
        (("resnet8", 10), {"widths": (8, 4, 4)}, "widths must not decrease .* got 4 after 8"),
        (("vgg16_bn", 10), {}, "images must be at least 32×32 for 5 stages, got 8×8"),
        (("mobilenet_v2", 10), {"width": 0.0}, "width must be a finite number above 0, got 0.0"),
    ],
)
def test_bad_arguments_are_named(arguments, overrides, message):
    with pytest.raises(ValueError, match=message):
        abstract(models.create(*arguments, **overrides), 8)


def test_half_precision_is_finite_and_close():
    # Compiled as users do: a trial of a whole network on the CPU of jax 0.12.0 had NaN.
    model = models.create("resnet8", 10)
    variables = filled(abstract(model, 32))
    images = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (16, 32, 32, 3)), jnp.float32)

    def loss(variables, images):
        logits = model.apply(variables, images)
        return jax.nn.log_softmax(logits.astype(jnp.float32))[:, 0].mean(), logits

    step = jax.value_and_grad(loss, has_aux=True)
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (variables, images))
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        (_, logits), gradients = jax.jit(step)(*halves)
        (_, expected), _ = jax.jit(step)(variables, images)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    assert logits.dtype == jnp.bfloat16
    for leaf in jax.tree.leaves(gradients):
        assert jnp.isfinite(leaf).all()
    # 8 bits of mantissa, through 9 layers.
    assert jnp.abs(logits.astype(jnp.float32) - expected).max() < 0.05 * jnp.abs(expected).max()
