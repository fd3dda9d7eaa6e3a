"""Weights of published networks: every leaf in its place, and the accuracy that is stated."""

import functools

import jax
import numpy as np
import public
import pytest
from safetensors.numpy import save_file

from hybrid_jax import core, models


def resnet20():
    """{name: shape} of a ResNet-20 of akamaster/pytorch_resnet_cifar10."""
    shapes = {"conv1": (16, 3, 3, 3), "bn1": (16,), "linear": (10, 64)}
    before = 16
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        for block in range(3):
            at = f"layer{stage}.{block}"
            shapes |= {f"{at}.conv1": (width, before, 3, 3), f"{at}.conv2": (width, width, 3, 3)}
            shapes |= {f"{at}.bn1": (width,), f"{at}.bn2": (width,)}
            before = width
    return shapes


def efficientnet():
    """The same of an EfficientNet-Lite0, with 7 classes."""
    shapes = {"_conv_stem": (32, 3, 3, 3), "_bn0": (32,), "_fc": (7, 1280)}
    shapes |= {"_conv_head": (1280, 320, 1, 1), "_bn1": (1280,)}
    outputs = [16, *[24] * 2, *[40] * 2, *[80] * 3, *[112] * 3, *[192] * 4, 320]
    sizes = [3, 3, 3, 5, 5, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 3]
    for i, (before, after, size) in enumerate(zip([32, *outputs], outputs, sizes)):
        wide, at = before if i == 0 else 6 * before, f"_blocks.{i}"
        if i > 0:
            shapes |= {f"{at}._expand_conv": (wide, before, 1, 1), f"{at}._bn0": (wide,)}
        shapes |= {f"{at}._depthwise_conv": (wide, 1, size, size), f"{at}._bn1": (wide,)}
        shapes |= {f"{at}._project_conv": (after, wide, 1, 1), f"{at}._bn2": (after,)}
    return shapes


def drawn(shapes):
    """A state dict with a module of each shape: a norm, a convolution or a dense layer."""
    rng, state = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        leaves = {"weight": shape}
        if len(shape) < 4:
            leaves["bias"] = shape[:1]
        if len(shape) == 1:
            leaves |= {"running_mean": shape, "running_var": shape}
            state[f"{name}.num_batches_tracked"] = np.array(7)
        for leaf, each in leaves.items():
            state[f"{name}.{leaf}"] = rng.random(each, np.float32)
    return state


@pytest.mark.parametrize(
    ("name", "shapes", "places"),
    [
        (
            "resnet20",
            resnet20,
            {
                "layer2.0.conv1": "stage1_block0/conv0/conv",
                "layer2.0.bn1": "stage1_block0/conv0/norm",
                "layer3.2.bn2": "stage2_block2/conv1/norm",
                "linear": "head",
            },
        ),
        (
            "efficientnet_lite0",
            efficientnet,
            {
                "_bn0": "stem/norm",
                "_bn1": "last/norm",
                # Stages of 1, 2, 2 and 3 blocks: block 4 is the third stage's second.
                "_blocks.4._depthwise_conv": "stage2_block1/depthwise/conv",
                "_blocks.0._bn1": "stage0_block0/depthwise/norm",
                "_blocks.15._bn2": "stage6_block0/project/norm",
                "_fc": "head",
            },
        ),
    ],
)
def test_every_leaf_is_where_its_name_says(name, shapes, places, tmp_path):
    state = drawn(shapes())
    save_file(state, tmp_path / "state.safetensors")
    model, variables = models.load(name, tmp_path / "state.safetensors")
    leaves = core.flatten_paths(variables)
    assert model.num_classes == len(leaves["params/head/bias"])
    assert len(leaves) == len([leaf for leaf in state if not leaf.endswith("tracked")])
    order = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}  # OIHW to HWIO
    for theirs, ours in places.items():
        weight = state[f"{theirs}.weight"]
        kind = "scale" if weight.ndim == 1 else "kernel"
        expected = {f"params/{ours}/{kind}": weight.transpose(order[weight.ndim])}
        if weight.ndim < 4:
            expected[f"params/{ours}/bias"] = state[f"{theirs}.bias"]
        if weight.ndim == 1:
            expected[f"batch_stats/{ours}/mean"] = state[f"{theirs}.running_mean"]
            expected[f"batch_stats/{ours}/var"] = state[f"{theirs}.running_var"]
        for path, value in expected.items():
            np.testing.assert_array_equal(leaves[path], value)


def test_a_file_of_other_leaves_is_an_error_with_a_line_for_each(tmp_path):
    state = drawn(resnet20())
    del state["layer1.0.bn1.running_var"]
    state["layer4.0.conv1.weight"] = np.zeros(3, np.float32)
    state["conv1.weight"] = np.zeros((16, 1, 3, 3), np.float32)
    save_file(state, tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match="must be a file of the weights of 'resnet20'") as error:
        models.load("resnet20", tmp_path / "state.safetensors")
    assert str(error.value).splitlines()[1:] == [
        "  lacks 'layer1.0.bn1.running_var'",
        "  has 'layer4.0.conv1.weight' over",
        "  has 'conv1.weight' in shape (16, 1, 3, 3), not (16, 3, 3, 3)",
    ]
    save_file({"fc.bias": np.zeros(10, np.float32)}, tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match=r"lacks 'linear\.weight'"):
        models.load("resnet20", tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match=r"name must be one of resnet20, .*, got 'resnet18'"):
        models.load("resnet18", tmp_path / "state.safetensors")


def accuracy(fn, params, images, labels):
    run = jax.jit(functools.partial(fn, params))
    parts = [run(images[i : i + 100]).argmax(1) for i in range(0, len(images), 100)]
    return float((np.concatenate(parts) == labels).mean())


# Of all 5,000 test images 88.06 and 89.80 % are stated.
@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("resnet20", 500, 0.882),
        pytest.param("resnet20", 5000, 0.8806, marks=pytest.mark.slow),
        pytest.param("resnet56", 5000, 0.8980, marks=pytest.mark.slow),
    ],
)
def test_a_public_resnet_is_as_accurate_as_stated(name, count, expected):
    fn, params = public.network(name, f"{name}_cifar10_jpeg")
    found = accuracy(fn, params, *public.cifar10("test", count))
    assert found == pytest.approx(expected, abs=1 / count)
