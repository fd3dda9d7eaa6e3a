"""Which parameters are kernels, and how each lies in its parameter."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import core


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


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        over = {"params": 0, "batch_stats": 0}
        block = nn.vmap(
            Block, variable_axes=over, split_rngs={"params": True}, in_axes=0, axis_size=3
        )
        return block()(jnp.stack([x, x, x]), None)[0]


X, IMAGES = jnp.ones((4, 8)), jnp.ones((1, 6, 6, 4))
# {what it is: (module, input, {path of a kernel: (layers, taps, in, out)})}; there is no other.
MODULES = {
    "scan": (
        Scanned(),
        X,
        {"ScanBlock_0/Dense_0/kernel": (3, 1, 8, 8), "Dense_0/kernel": (1, 1, 8, 2)},
    ),
    "vmap": (Mapped(), X, {"VmapBlock_0/Dense_0/kernel": (3, 1, 8, 8)}),
    "attention": (
        nn.MultiHeadDotProductAttention(2),
        X[None],
        {f"{name}/kernel": (1, 1, 8, 8) for name in ("query", "key", "value", "out")},
    ),
    "conv": (nn.Conv(6, (3, 3)), IMAGES, {"kernel": (1, 9, 4, 6)}),
    "grouped": (nn.Conv(6, (3, 3), feature_group_count=2), IMAGES, {"kernel": (1, 9, 2, 6)}),
    "depthwise": (nn.Conv(4, (3, 3), feature_group_count=4), IMAGES, {"kernel": (1, 9, 1, 4)}),
    "transposed conv": (
        nn.ConvTranspose(6, (3, 3), transpose_kernel=True),
        IMAGES,
        {"kernel": (1, 9, 4, 6)},
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_kernels_of_modules(name):
    module, x, expected = MODULES[name]
    with jax.numpy_rank_promotion("allow"):
        variables = module.init(jax.random.key(0), x)
        found = core.trace(module.apply, variables, x).kernels
    assert {p.removeprefix("params/"): kernel.sizes for p, kernel in found.items()} == expected


def entries(*shape):
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)


# {how a dense kernel is used: (fn, parameters, its canonical form)}; the form is (L, 1, C, O).
W = entries(4, 6)
USES = {
    "itself": (lambda p, x: x @ p["w"], {"w": W}, W[None, None]),
    "transposed": (lambda p, x: x @ p["w"].T, {"w": W.T}, W[None, None]),
    "reshaped": (lambda p, x: x @ p["w"].reshape(4, 6), {"w": W.reshape(2, 2, 6)}, W[None, None]),
    "standardized": (
        lambda p, x: x @ ((p["w"] - p["w"].mean()) * p["gain"][None]),
        {"w": W, "gain": jnp.ones(6)},
        W[None, None],
    ),
    "in halves": (
        lambda p, x: x @ p["w"][:, :3] + x @ p["w"][:, 3:],
        {"w": W},
        jnp.stack([W[:, :3], W[:, 3:]])[:, None],
    ),
    "a stack by index": (
        lambda p, x: x @ p["w"][0] + x @ p["w"][1],
        {"w": jnp.stack([W, -W])},
        jnp.stack([W, -W])[:, None],
    ),
    "a scan of halves": (
        lambda p, x: jax.lax.scan(lambda x, w: (x, x @ w.T), x, p["w"])[1],
        {"w": W.reshape(4, 2, 3).transpose(1, 2, 0)},
        W.reshape(4, 2, 3).transpose(1, 0, 2)[:, None],
    ),
}


@pytest.mark.parametrize("name", USES)
def test_a_kernel_is_followed_from_its_parameter(name):
    fn, params, expected = USES[name]
    kernels = core.trace(fn, params, jnp.ones((2, 4))).kernels
    assert list(kernels) == ["w"]
    canonical = kernels["w"].canonical(params["w"])
    np.testing.assert_array_equal(canonical, expected)
    np.testing.assert_array_equal(kernels["w"].restore(canonical), params["w"])


def test_a_kernel_in_two_layouts_or_unequal_parts_has_no_one_form():
    for fn in (
        lambda p, x: x @ p["w"] @ p["w"].T,
        lambda p, x: x @ p["w"][:, :2] + (x @ p["w"][:, 2:])[:, :2],
    ):
        kernel = core.trace(fn, {"w": W}, jnp.ones((2, 4))).kernels["w"]
        assert kernel.layers(W).shape == (1, 24)
        with pytest.raises(ValueError, match=r"kernel 'w' must be one matrix .* leave it out"):
            kernel.canonical(W)


def test_what_is_a_kernel_in_part_or_scales_is_none():
    x = jnp.ones((2, 4))
    # A bias in the last row; a product that sums over nothing; a product of parameters.
    with_bias = core.trace(lambda p, x: x @ p["w"][:4] + p["w"][4:], {"w": entries(5, 6)}, x)
    scaled = core.trace(lambda p, x: jnp.einsum("bc,c->bc", x, p["g"]), {"g": jnp.ones(4)}, x)
    low_rank = core.trace(lambda p, x: x @ (p["w"] @ p["v"]), {"w": W, "v": W.T}, x)
    assert with_bias.kernels == scaled.kernels == low_rank.kernels == {}


@pytest.mark.parametrize("masked", ["product", "choice"])
def test_a_kernel_is_known_beside_a_stored_mask_of_its_shape(masked):
    # By name the mask comes first, and both have as many entries.
    params = {"m": jnp.array([[True, False], [True, True]]), "w": jnp.ones((2, 2))}

    def fn(params, x):
        m, w = params["m"], params["w"]
        return x @ (jnp.where(m, w, 0.0) if masked == "choice" else w * m.astype(w.dtype))

    graph = core.trace(fn, params, jnp.ones((1, 2)))
    assert [site.path for site in graph.sites] == ["w"]
    assert list(graph.kernels) == ["w"]
