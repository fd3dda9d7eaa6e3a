"""Law 9: the counter's MACs equal numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hybrid_jax import core, cost, models


def graph_of(name, side, num_classes):
    model = models.create(name, num_classes)
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return core.trace(model.apply, variables, images)


def convolve(x, kernel, stride=1, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def test_small_network_by_hand():
    params = {
        "a": jnp.ones((3, 3, 3, 8)),
        "b": jnp.ones((3, 3, 1, 8)),
        "c": jnp.ones((3, 3, 4, 6)),
        "d": jnp.ones((96, 10)),
    }

    def fn(params, x):
        x = jax.nn.relu(convolve(x, params["a"], stride=2))
        x = convolve(x, params["b"], groups=8)
        x = convolve(x, params["c"], groups=2)
        return x.reshape(x.shape[0], -1) @ params["d"]

    found = cost.count(core.trace(fn, params, jnp.ones((5, 8, 8, 3))))
    # 8×8 with stride 2 is 4×4, 16 places. Strided: 16·9·3·8 = 3456. Depthwise: 16·9·8 = 1152.
    # Two groups of 4 to 3: 16·9·4·6 = 3456. Dense of 16·6 = 96 features: 96·10 = 960.
    assert [row.macs for row in found.sites] == [3456, 1152, 3456, 960]
    assert [row.width for row in found.sites] == [8, 8, 6, 10]
    assert found.macs == found.dense_macs == 9024
    assert found.bops == 9024 * 32 * 32
    # 216 + 72 + 216 + 960 = 1464 weights.
    assert (found.parameters, found.nonzero, found.bytes) == (1464, 1464, 4 * 1464)


def test_products_of_activations_and_repeated_kernels():
    def fn(params, x):  # (B, 6, 4)
        q, k = x @ params["w"], x @ params["w"]
        return jnp.einsum("bic,bjc->bij", q, k)

    found = cost.count(core.trace(fn, {"w": jnp.ones((4, 5))}, jnp.ones((3, 6, 4))))
    # 6·4·5 = 120 twice, and 6·6·5 = 180 between activations.
    assert [(row.name, row.macs) for row in found.sites] == [("w", 120), ("w#2", 120)]
    assert found.macs == found.dense_macs == 420
    assert [row.bytes for row in found.sites] == [80, 0]
    assert (found.parameters, found.bytes) == (20, 80)


def every_account(fn, params, x):
    """The MACs of one example by each that counts them, which must agree; so does any batch."""
    found = set()
    for batch in (1, 6):
        graph = core.trace(fn, params, jnp.ones((batch, *x.shape[1:])))
        counted = cost.count(graph)
        assert counted.bops == 1024 * counted.macs
        found |= {graph.macs, counted.macs, counted.dense_macs, core.narrow_graph(graph, {}).macs}
        found |= {cost.formula(graph).count()["macs"], sum(site.macs for site in graph.sites)}
        found |= {*core.shrink(fn, params, {}, jnp.ones((batch, *x.shape[1:])))[2].macs}
    (macs,) = found
    return macs


@pytest.mark.parametrize(
    ("padding", "size", "kernel", "stride"),
    [
        ("SAME", 4, 2, 2),
        ("SAME", 4, 3, 2),
        ("VALID", 4, 3, 2),
        ("VALID", 1, 3, 2),
        ("VALID", 1, 3, 1),
    ],
)
def test_each_entry_of_a_transposed_convolution_meets_each_tap_once(padding, size, kernel, stride):
    def fn(params, x):
        return lax.conv_transpose(x, params["k"], (stride, stride), padding)

    params = {"k": jnp.ones((kernel, kernel, 32, 1))}
    found = every_account(fn, params, jnp.ones((1, size, size, 32)))
    assert found == size**2 * kernel**2 * 32


@pytest.mark.parametrize(
    ("size", "kernel", "options", "each_axis"),
    [
        # Entries a b c d with a zero between: a0b0c0d. Every second place: a0b, b0c, c0d.
        (4, 3, {"strides": 2, "lhs_dilation": 2}, 3 * 2),
        # a0b0c under two taps with a hole between: ab at 0, zeros at 1, bc at 2.
        (3, 2, {"strides": 1, "lhs_dilation": 2, "rhs_dilation": 2}, 2 + 0 + 2),
        # Two zeros between, a00b, all but the middle cut off: 0 0 under one tap.
        (2, 1, {"strides": 1, "lhs_dilation": 3, "padding": (-1, -1)}, 0),
        # A kernel with holes on plain entries: 5 - 2 places of two taps each.
        (5, 2, {"strides": 1, "rhs_dilation": 2}, 3 * 2),
        # Padding taps count where there are no more places than entries: 3 places of 3 taps.
        (3, 3, {"strides": 1, "padding": (1, 1)}, 3 * 3),
        # One entry between two zeros on each side: 3 places, but it meets each of 3 taps once.
        (1, 3, {"strides": 1, "padding": (2, 2)}, 3),
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_strides_dilations_and_paddings_by_hand(size, kernel, options, each_axis, groups):
    padding = options.get("padding", (0, 0))
    two = {name: (n, n) for name, n in options.items() if name.endswith("dilation")}

    def fn(params, x):
        return lax.conv_general_dilated(
            x,
            params["k"],
            (options["strides"],) * 2,
            (padding, padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            **two,
        )

    params = {"k": jnp.ones((kernel, kernel, 4 // groups, 6))}
    found = every_account(fn, params, jnp.ones((1, size, size, 4)))
    assert found == each_axis**2 * (4 // groups) * 6


def spectral_norm(p, x):
    sigma = p["v"] @ p["w"] @ p["u"]
    return x @ (p["w"] / sigma)


def power_iteration(p, x):
    u = lax.fori_loop(0, 3, lambda _, u: p["w"].T @ (p["w"] @ u), p["u"])
    return x @ (p["w"] * u[None])


def beside_an_input(p, x):
    def body(carry, _):
        x, u = carry
        return (x + 1, p["w"].T @ (p["w"] @ u)), None

    (x, u), _ = lax.scan(body, (x, p["u"]), length=3)
    return x @ (p["w"] * u[None])


def while_beside_an_input(p, x):
    def body(carry):
        i, x, u = carry
        return i + 1, x + 1, p["w"].T @ (p["w"] @ u)

    _, x, u = lax.while_loop(lambda carry: carry[0] < 3, body, (0, x, p["u"]))
    return x @ (p["w"] * u[None])


def over_examples(p, x):
    return jax.vmap(lambda x: x @ (p["w"] * (p["v"] @ p["w"])[None]))(x[:, None])


def product_with_a_constant(p, x):
    mix = jnp.array(np.tri(4), jnp.float32)
    return x @ (p["w"] @ (mix @ mix))


@pytest.mark.parametrize(
    "fn",
    [
        spectral_norm,
        power_iteration,
        beside_an_input,
        while_beside_an_input,
        over_examples,
        product_with_a_constant,
    ],
)
def test_products_of_parameters_alone_cost_an_image_nothing(fn):
    params = {"w": jnp.ones((3, 4)), "u": jnp.ones(4), "v": jnp.ones(3)}
    assert every_account(fn, params, jnp.ones((1, 3))) == 3 * 4


# Places × weights, in order.
RESNET18 = (
    112 * 112 * 49 * 3 * 64  # stem
    + 4 * 56 * 56 * 9 * 64 * 64
    # Each later stage: channels double and places quarter, so that all three cost the same.
    # First convolution, three more, and the 1×1 of the shortcut:
    + 3 * 28 * 28 * (9 * 64 * 128 + 3 * 9 * 128 * 128 + 64 * 128)
    + 512 * 1000
)
RESNET50 = (
    112 * 112 * 49 * 3 * 64  # stem
    # Stage of width 64: first block with shortcut, two more.
    + 56 * 56 * (64 * 64 + 9 * 64 * 64 + 64 * 256 + 64 * 256)
    + 56 * 56 * 2 * (256 * 64 + 9 * 64 * 64 + 64 * 256)
    # Later stages, in units of the second (width 128 on 28×28), of 4, 6 and 3 blocks. The first
    # block's 1×1 runs before the stride, on four times the places.
    + 28 * 28 * 3 * (4 * 256 * 128 + 9 * 128 * 128 + 128 * 512 + 256 * 512)
    + 28 * 28 * (3 + 5 + 2) * (512 * 128 + 9 * 128 * 128 + 128 * 512)
    + 2048 * 1000
)
MOBILENET_V2 = (
    112 * 112 * (27 * 32 + 9 * 32 + 32 * 16)  # stem; depthwise and projection to 16
    + 112 * 112 * 16 * 96  # expansion before the stride
    + 56 * 56 * (96 * (9 + 24) + 144 * (24 + 9 + 24))  # 24 channels
    + 56 * 56 * 24 * 144
    + 28 * 28 * (144 * (9 + 32) + 2 * 192 * (32 + 9 + 32))  # 32 channels
    + 28 * 28 * 32 * 192
    + 14 * 14 * (192 * (9 + 64) + 3 * 384 * (64 + 9 + 64))  # 64 channels
    + 14 * 14 * (384 * (64 + 9 + 96) + 2 * 576 * (96 + 9 + 96))  # 96 channels
    + 14 * 14 * 96 * 576
    + 7 * 7 * (576 * (9 + 160) + 2 * 960 * (160 + 9 + 160))  # 160 channels
    + 7 * 7 * (960 * (160 + 9 + 320) + 320 * 1280)  # 320 channels; last
    + 1280 * 1000
)
EFFICIENTNET_LITE0 = (
    112 * 112 * (27 * 32 + 9 * 32 + 32 * 16)  # stem; depthwise and projection to 16
    + 112 * 112 * 16 * 96  # expansion before the stride
    + 56 * 56 * (96 * (9 + 24) + 144 * (24 + 9 + 24))  # 24 channels
    + 56 * 56 * 24 * 144
    + 28 * 28 * (144 * (25 + 40) + 240 * (40 + 25 + 40))  # 40 channels
    + 28 * 28 * 40 * 240
    + 14 * 14 * (240 * (9 + 80) + 2 * 480 * (80 + 9 + 80))  # 80 channels
    + 14 * 14 * (480 * (80 + 25 + 112) + 2 * 672 * (112 + 25 + 112))  # 112 channels
    + 14 * 14 * 112 * 672
    + 7 * 7 * (672 * (25 + 192) + 3 * 1152 * (192 + 25 + 192))  # 192 channels
    + 7 * 7 * (1152 * (192 + 9 + 320) + 320 * 1280)  # 320 channels; last
    + 1280 * 1000
)
VGG16 = (
    1024 * 9 * (3 * 64 + 64 * 64)
    + 256 * 9 * (64 * 128 + 128 * 128)
    + 64 * 9 * (128 * 256 + 2 * 256 * 256)
    + 16 * 9 * (256 * 512 + 2 * 512 * 512)
    + 4 * 9 * (3 * 512 * 512)
    + 512 * 512
    + 512 * 10
)
# Layer i of a dense block sees c + 12·i channels; over n layers n·c + 12·n·(n-1)/2.
DENSENET = (
    1024 * 27 * 24
    + 1024 * ((16 * 24 + 1440) * 48 + 16 * 9 * 48 * 12 + 216 * 108)
    + 256 * ((16 * 108 + 1440) * 48 + 16 * 9 * 48 * 12 + 300 * 150)
    + 64 * ((16 * 150 + 1440) * 48 + 16 * 9 * 48 * 12)
    + 342 * 10
)
DENSENET40 = (
    1024 * 27 * 24
    + 1024 * ((12 * 24 + 792) * 9 * 12 + 168 * 168)
    + 256 * ((12 * 168 + 792) * 9 * 12 + 312 * 312)
    + 64 * ((12 * 312 + 792) * 9 * 12)
    + 456 * 10
)


def cifar_resnet(n):
    # A 3×3 between equal widths costs 1024·9·16·16 = 2,359,296 in every stage; the first of the
    # second and of the third half of it. 6n convolutions, less two halves: 6n - 1. Stem
    # 1024·27·16, dense 640; the padding shortcut is free.
    return (6 * n - 1) * 2_359_296 + 1024 * 27 * 16 + 640


@pytest.mark.parametrize(
    ("name", "side", "num_classes", "macs", "published"),
    [
        ("resnet8", 32, 10, cifar_resnet(1), None),
        ("resnet20", 32, 10, cifar_resnet(3), 40.6e6),
        ("resnet32", 32, 10, cifar_resnet(5), 68.9e6),  # He et al. give 69 M, PyTorch zoos 68.9
        ("resnet56", 32, 10, cifar_resnet(9), 125.5e6),
        ("resnet18", 224, 1000, RESNET18, 1.81e9),
        ("resnet50", 224, 1000, RESNET50, 4.09e9),
        ("mobilenet_v2", 224, 1000, MOBILENET_V2, 300.8e6),
        ("efficientnet_lite0", 224, 1000, EFFICIENTNET_LITE0, None),
        ("vgg16_bn", 32, 10, VGG16, None),  # see test_vgg_as_published
        ("densenet", 32, 10, DENSENET, None),
        ("densenet40", 32, 10, DENSENET40, 282.92e6),
    ],
)
def test_named_networks(name, side, num_classes, macs, published):
    graph = graph_of(name, side, num_classes)
    found = cost.count(graph)
    assert found.macs == found.dense_macs == sum(row.macs for row in found.sites) == macs
    if published:
        # To the digits that were published.
        assert found.macs == pytest.approx(published, rel=3e-3)
    trained = [v for path, v in graph.parameters.items() if path.startswith("params/")]
    assert found.parameters == sum(leaf.size for leaf in trained)
    assert found.bytes == 4 * sum(leaf.size for leaf in graph.parameters.values())


def test_vgg_as_published():
    # The published 313.7 M count, with the MACs, one addition for each output of a convolution
    # (its bias): 1024·128 + 256·256 + 64·768 + 16·1536 + 4·1536 = 276,480.
    sites = graph_of("vgg16_bn", 32, 10).sites
    biases = sum(
        site.output_shape[1] * site.output_shape[2] * site.output_shape[3]
        for site in sites
        if site.kind == "conv"
    )
    assert biases == 276_480
    assert round((VGG16 + biases) / 1e6, 1) == 313.7
