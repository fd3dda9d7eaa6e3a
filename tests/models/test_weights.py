"""Weights of published networks: every leaf in its place, and the accuracy that is stated."""

import functools

import jax
import numpy as np
import orbax.checkpoint as ocp
import public
import pytest
from flax import serialization
from safetensors.numpy import save_file

from hybrid_jax import core, models, training
from hybrid_jax.models import tables


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
    with pytest.raises(ValueError, match="path must hold the network's weights, got ") as error:
        models.load("resnet20", tmp_path / "state.safetensors")
    assert str(error.value).splitlines()[1:] == [
        "  lacks 'layer1.0.bn1.running_var'",
        "  has 'layer4.0.conv1.weight' over",
        "  has 'conv1.weight' in shape (3, 3, 1, 16), not (3, 3, 3, 16), "
        "for 'params/stem/conv/kernel'",
    ]
    save_file({"fc.bias": np.zeros(10, np.float32)}, tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match=r"lacks 'linear\.weight'"):
        models.load("resnet20", tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match=r"name must be one of resnet20, .*, got 'resnet8'"):
        models.load("resnet8", tmp_path / "state.safetensors")


# Of the tables of one name for every leaf: places that show how each of them counts.
PLACES = {
    "resnet18": {
        "params/stem/conv/kernel": "conv1.weight",
        "params/stage1_block0/shortcut/conv/kernel": "layer2.0.downsample.0.weight",
        "batch_stats/stage1_block0/shortcut/norm/var": "layer2.0.downsample.1.running_var",
        "params/stage3_block1/conv1/norm/scale": "layer4.1.bn2.weight",
        "params/head/bias": "fc.bias",
    },
    "resnet50": {
        "params/stage0_block0/shortcut/conv/kernel": "layer1.0.downsample.0.weight",
        "params/stage2_block5/conv2/conv/kernel": "layer3.5.conv3.weight",
    },
    "mobilenet_v2": {
        "params/stem/norm/bias": "features.0.1.bias",
        # The first block has no expansion.
        "params/stage0_block0/depthwise/conv/kernel": "features.1.conv.0.0.weight",
        "params/stage0_block0/project/conv/kernel": "features.1.conv.1.weight",
        "batch_stats/stage0_block0/project/norm/mean": "features.1.conv.2.running_mean",
        "params/stage1_block0/expand/norm/scale": "features.2.conv.0.1.weight",
        "batch_stats/stage6_block0/project/norm/var": "features.17.conv.3.running_var",
        "params/last/conv/kernel": "features.18.0.weight",
        "params/head/kernel": "classifier.1.weight",
    },
    "densenet": {
        "params/block0_layer0_narrow/conv/kernel": "dense1.0.conv1.weight",
        "params/block0_layer0_narrow/norm/scale": "dense1.0.bn1.weight",
        "params/block2_layer15/conv/kernel": "dense3.15.conv2.weight",
        "params/transition1/norm/bias": "trans2.bn1.bias",
        "params/norm/bias": "bn1.bias",
    },
    "densenet40": {
        "params/block2_layer11/conv/kernel": "dense3.11.conv1.weight",
        "params/transition0/conv/kernel": "trans1.conv1.weight",
        "batch_stats/norm/mean": "bn.running_mean",
    },
    "vgg16_bn": {
        # Two convolutions of three modules each, and a pool: the second stage begins at 7.
        "params/stage1_conv0/conv/kernel": "features.7.weight",
        "params/stage4_conv2/norm/bias": "features.41.bias",
        "params/head/kernel": "classifier.weight",
    },
}


@pytest.mark.parametrize("name", PLACES)
def test_names_of_public_networks(name):
    model = models.create(name, 10, **({"hidden": 0} if name == "vgg16_bn" else {}))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    leaves = core.flatten_paths(jax.eval_shape(model.init, jax.random.key(0), images))
    found = tables.table(name, leaves)
    assert found.keys() == leaves.keys()
    assert PLACES[name].items() <= found.items()
    assert len(set(map(str, found.values()))) == len(leaves)


def test_a_bias_before_a_batchnorm_goes_into_its_mean(tmp_path):
    """Of one convolution a stage; the file is of a network in DataParallel."""
    widths = {"widths": [[4], [6]], "hidden": 0}
    places = {0: (4, 3), 4: (6, 4)}
    state = {"module.classifier.weight": np.ones((5, 6 * 64), np.float32)}
    state["module.classifier.bias"] = np.ones(5, np.float32)
    for place, (out, before) in places.items():
        parts = {f"{place}": (out, before, 3, 3), f"{place + 1}": (out,)}
        own = drawn({f"module.features.{k}": shape for k, shape in parts.items()})
        state |= own | {f"module.features.{place}.bias": np.full(out, 0.25, np.float32)}
    save_file(state, tmp_path / "vgg.safetensors")
    model, variables = models.load("vgg16_bn", tmp_path / "vgg.safetensors", **widths)
    assert model.num_classes == 5
    np.testing.assert_array_equal(
        variables["batch_stats"]["stage1_conv0"]["norm"]["mean"],
        state["module.features.5.running_mean"] - 0.25,
    )


VARIABLES = {
    "params": {
        "conv": {"kernel": np.zeros((1, 1, 2, 3), np.float32)},
        "w": np.zeros((2, 2), np.float32),
    },
    "count": np.zeros((), np.int32),
}


def filled(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.uniform(1, 9, leaf.shape).astype(leaf.dtype), VARIABLES)


def save_orbax(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree)


FORMATS = {
    "a.npz": lambda path, tree: np.savez(path, **core.flatten_paths(tree)),
    "a.safetensors": lambda path, tree: save_file(core.flatten_paths(tree), path),
    "a.msgpack": lambda path, tree: path.write_bytes(serialization.to_bytes(tree)),
    "a": save_orbax,
    "steps/7": lambda path, tree: training.Checkpoints(path.parent).save(7, tree),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, tmp_path):
    expected = filled()
    FORMATS[name](tmp_path / name, expected)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), VARIABLES)
    network = models.Network(None, None, shapes)
    for found in (
        models.restore(network, tmp_path / name),
        models.restore(shapes, tmp_path / name),
    ):
        core.check_same_structure("found", shapes, found)
        assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


def test_names_of_a_strangers_own(tmp_path):
    """A kernel turned as PyTorch has it, one as it is, and one made of two."""
    rng = np.random.default_rng(0)
    state = {"c.weight": rng.normal(size=(3, 2, 1, 1)), "w": np.eye(2), "v": np.ones((2, 2))}
    np.savez(tmp_path / "a.npz", **state, n=np.array(3), **{"c.num_batches_tracked": np.array(1)})
    names = {
        "params/conv/kernel": "c.weight",
        "params/w": ("w", "v", lambda w, v: w + 2 * v),
        "count": ("n", lambda n: n),
    }
    found = models.restore(VARIABLES, tmp_path / "a.npz", names)
    np.testing.assert_allclose(
        found["params"]["conv"]["kernel"], state["c.weight"].transpose(2, 3, 1, 0), rtol=1e-6
    )
    assert found["params"]["w"].tolist() == [[3, 2], [2, 3]]
    assert found["count"] == 3
    faulty = {"params/conv/kernel": ("c.weight", lambda w: w), "params/x": "x", "count": "w"}
    with pytest.raises(ValueError, match="path must hold") as error:
        models.restore(VARIABLES, tmp_path / "a.npz", faulty)
    assert str(error.value).splitlines()[1:] == [
        "  has no entry of names for 'params/w'",
        "  has an entry of names for 'params/x' over",
        "  lacks 'x'",
        "  has 'n' over",
        "  has 'v' over",
        "  has 'c.weight' in shape (3, 2, 1, 1), not (1, 1, 2, 3), for 'params/conv/kernel'",
        "  has 'w' in shape (2, 2), not (), for 'count'",
    ]


def test_what_is_no_file_of_weights(tmp_path):
    (tmp_path / "a.safetensors").write_text("no weights")
    (tmp_path / "a.h5").write_text("no weights")
    np.savez(
        tmp_path / "nan.npz", **core.flatten_paths(filled()) | {"params/w": np.full((2, 2), np.nan)}
    )
    np.savez(
        tmp_path / "int.npz", **core.flatten_paths(filled()) | {"params/w": np.eye(2, dtype=int)}
    )
    faults = {
        "none.npz": "path must be a file of weights, got .*none.npz, which does not exist",
        "a.safetensors": "path must be readable, got .*a.safetensors: ",
        "a.h5": "path must be an orbax directory or end in .safetensors, .npz, .msgpack, got .*h5",
        "nan.npz": "the weights in .*nan.npz must be finite, got 4 NaN .* at 'params/w'",
        "int.npz": "has 'params/w' in int64, not float32, for 'params/w'",
        "": "path must be readable, got ",
    }
    for name, message in faults.items():
        with pytest.raises(ValueError, match=message):
            models.restore(VARIABLES, tmp_path / name)


def test_a_pickle_is_refused_with_the_lines_that_convert_it(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    path = tmp_path / "net.pth"
    torch.save({"state_dict": {"fc.weight": torch.tensor([[1.0, 2.0]])}}, path)
    with pytest.raises(ValueError, match=r"path must not be a pickle, .* got .*net\.pth") as error:
        models.restore({"w": np.zeros((2, 1), np.float32)}, path)
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 2
    exec("\n".join(line.strip() for line in lines), {})
    found = models.restore(
        {"w": np.zeros((2, 1))}, path.with_suffix(".safetensors"), {"w": "fc.weight"}
    )
    assert found["w"].tolist() == [[1], [2]]


def accuracy(fn, params, images, labels):
    run = jax.jit(functools.partial(fn, params))
    parts = [run(images[i : i + 100]).argmax(1) for i in range(0, len(images), 100)]
    return float((np.concatenate(parts) == labels).mean())


# Stated are those of all 5,000 test images.
@pytest.mark.parametrize(
    ("file", "count", "expected"),
    [
        ("resnet20_cifar10_jpeg", 500, 0.882),
        pytest.param("resnet20_cifar10_jpeg", 5000, 0.8806, marks=pytest.mark.slow),
        pytest.param("resnet56_cifar10_jpeg", 5000, 0.8980, marks=pytest.mark.slow),
        pytest.param("resnet20_cifar10", 5000, 0.8100, marks=pytest.mark.slow),
        pytest.param("resnet56_cifar10", 5000, 0.8312, marks=pytest.mark.slow),
    ],
)
def test_a_public_resnet_is_as_accurate_as_stated(file, count, expected):
    fn, params = public.network(file.partition("_")[0], file)
    found = accuracy(fn, params, *public.cifar10("test", count))
    assert found == pytest.approx(expected, abs=1 / count)


@pytest.mark.slow
def test_a_public_efficientnet_is_as_accurate_as_stated():
    fn, params = public.network("efficientnet_lite0", "efficientnet_lite0_imagenet")
    assert accuracy(fn, params, *public.imagenet()) == pytest.approx(0.878, abs=1 / 500)
