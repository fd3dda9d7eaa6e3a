"""Law 1 on programs nobody made for us: masked equals shrunk, values and gradients."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

from hybrid_jax import core


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def dense(seed, *shape):
    return normal(seed, *shape) / np.sqrt(shape[-2])


def conv(x, kernel, stride=1, groups=1, dilation=1, layout=("NHWC", "HWIO", "NHWC")):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        rhs_dilation=(dilation, dilation),
        dimension_numbers=layout,
        feature_group_count=groups,
    )


def kernels(*shapes):
    return {
        f"k{i}": normal(i, *shape) / np.sqrt(np.prod(shape[:-1])) for i, shape in enumerate(shapes)
    }


IMAGES = normal(99, 2, 8, 8, 3)
NETS = {}


def net(params, *inputs):
    """Registers a bare function fn(params, *inputs) as a network to shrink."""

    def register(fn):
        NETS[fn.__name__] = (fn, params, inputs or (IMAGES,))
        return fn

    return register


@net(kernels((3, 3, 3, 8), (3, 3, 8, 8), (3, 3, 8, 8), (8, 5)))
def residual(p, x):
    x = jax.nn.relu(conv(x, p["k0"]))
    x = x + conv(jax.nn.relu(conv(x, p["k1"], dilation=2)), p["k2"])
    return x.mean((1, 2)) @ p["k3"]


@net(kernels((3, 3, 3, 6), (3, 3, 6, 4), (3, 3, 10, 8), (8, 5)))
def concatenated(p, x):
    a = jax.nn.silu(conv(x, p["k0"]))
    b = jax.nn.gelu(conv(a, p["k1"]))
    return conv(jnp.concatenate([a, b], -1), p["k2"], stride=2).mean((1, 2)) @ p["k3"]


@net(kernels((1, 1, 3, 8), (3, 3, 1, 16), (1, 1, 16, 6), (6, 5)))
def depthwise_with_multiplier(p, x):
    x = jax.nn.relu6(conv(x, p["k0"]))
    return conv(conv(x, p["k1"], groups=8), p["k2"]).mean((1, 2)) @ p["k3"]


@net(kernels((1, 1, 3, 8), (3, 3, 4, 12), (1, 1, 12, 6), (6, 5)))
def grouped(p, x):
    x = nn.hard_swish(conv(x, p["k0"]))
    return conv(jnp.tanh(conv(x, p["k1"], groups=2)), p["k2"]).mean((1, 2)) @ p["k3"]


@net(kernels((3, 3, 3, 8), (8, 4), (4, 8), (8, 5)))
def squeeze_and_excite(p, x):
    x = conv(x, p["k0"])
    gate = jax.nn.sigmoid(jax.nn.relu(x.mean((1, 2)) @ p["k1"]) @ p["k2"])
    return (x * gate[:, None, None, :]).mean((1, 2)) @ p["k3"]


@net(kernels((3, 3, 3, 6), (96, 10), (10, 5)))
def flatten_to_dense(p, x):
    x = nn.max_pool(jax.nn.relu(conv(x, p["k0"])), (2, 2), (2, 2))
    x = x.reshape(x.shape[0], -1)
    return jax.nn.elu(x @ p["k1"]) @ p["k2"]


@net(kernels((3, 3, 3, 8), (3, 3, 4, 6), (3, 3, 4, 6), (6, 5)))
def split_and_slice(p, x):
    a, b = jnp.split(conv(x, p["k0"]), 2, axis=-1)
    y = conv(a, p["k1"]) * jax.nn.sigmoid(conv(b, p["k2"]))
    return (y[:, ::2, 1:-1].mean((1, 2)) + y[..., ::1].max((1, 2))) @ p["k3"]


@net(kernels((1, 1, 3, 8), (3, 3, 4, 8), (8, 5)))
def channel_shuffle(p, x):
    x = jax.nn.relu(conv(x, p["k0"]))
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, 2, c // 2).swapaxes(3, 4).reshape(b, h, w, c)
    return conv(x, p["k1"], groups=2).mean((1, 2)) @ p["k2"]


@net(kernels((8, 3, 3, 3), (4, 8, 3, 3), (4, 5)), IMAGES.transpose(0, 3, 1, 2))
def channels_first(p, x):
    layout = ("NCHW", "OIHW", "NCHW")
    x = jax.nn.leaky_relu(conv(x, p["k0"], layout=layout))
    return jnp.einsum("bchw,cn->bn", conv(x, p["k1"], layout=layout), p["k2"])


@net(kernels((3, 3, 3, 4), (3, 3, 8, 6), (6, 5)))
def padded_shortcut(p, x):
    """Option A of He et al.: subsample, and pad the channels with zeros."""
    x = conv(x, p["k0"])
    short = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))
    return conv(short, p["k1"]).mean((1, 2)) @ p["k2"]


@net(kernels((1, 1, 3, 4), (3, 3, 4, 6), (6, 5)))
def upsampled(p, x):
    x = jnp.repeat(conv(x, p["k0"]), 2, axis=1)
    x = jnp.tile(x, (1, 1, 2, 1))
    return nn.max_pool(conv(x, p["k1"]), (2, 2), (2, 2)).mean((1, 2)) @ p["k2"]


@net(kernels((5, 3, 3, 3), (36, 5, 1, 1), (4, 36, 3, 3), (4, 5)), IMAGES.transpose(0, 3, 1, 2))
def space_to_depth_and_back(p, x):
    """As PyTorch stores it: PixelUnshuffle makes C·r·r channels of C, PixelShuffle C of C·r·r."""
    layout = ("NCHW", "OIHW", "NCHW")
    x = jax.nn.relu(conv(x, p["k0"], layout=layout))
    x = jax.nn.relu(conv(x, p["k1"], layout=layout))
    b, c, h, w = x.shape
    x = x.reshape(b, c // 4, 2, 2, h, w).transpose(0, 1, 4, 2, 5, 3)
    x = jnp.tanh(x.reshape(b, c // 4, 2 * h, 2 * w))
    x = x.reshape(b, c // 4, h, 2, w, 2).transpose(0, 1, 3, 5, 2, 4).reshape(b, c, h, w)
    return jnp.einsum("bchw,cn->bn", conv(x, p["k2"], layout=layout), p["k3"])


@net(kernels((3, 3, 3, 12), (6, 8), (4, 5)))
def maxout(p, x):
    x = conv(x, p["k0"]).mean((1, 2))
    x = x.reshape(-1, 6, 2).max(-1) @ p["k1"]
    return x.reshape(-1, 2, 4).max(1) @ p["k2"]


@net({"a": dense(0, 3, 8), "b": dense(1, 8, 6), "scale": normal(2, 1, 8), "out": dense(3, 6, 5)})
def two_pass_norms(p, x):
    """Normalized over the channels, then over groups of them and all places, means taken first."""
    x = x @ p["a"]
    centered = x - x.mean(-1, keepdims=True)
    scale = lax.rsqrt((centered**2).mean(-1, keepdims=True) + 1e-3) * p["scale"][None, None]
    x = x + centered * scale
    x = jax.nn.standardize(jax.nn.relu(x @ p["b"]).reshape(-1, 8, 8, 3, 2), (1, 2, 4), epsilon=1e-3)
    x = x - jnp.var(x, axis=3, keepdims=True)
    return x.reshape(-1, 8, 8, 6).mean((1, 2)) @ p["out"]


@net(kernels((3, 3, 3, 8), (7, 7, 2, 1), (8, 5)))
def gated_by_the_largest_channel(p, x):
    """A gate over places, from the mean, largest and least of all channels."""
    x = jnp.tanh(conv(x, p["k0"]))
    pooled = x.mean(-1, keepdims=True) - x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    gate = conv(jnp.concatenate(pooled, -1), p["k1"])
    return (x * jax.nn.sigmoid(jnp.tile(gate, (1, 1, 1, 8)))).mean((1, 2)) @ p["k2"]


BLUR = np.outer([1, 2, 1], [1, 2, 1]).reshape(3, 3, 1, 1).astype(np.float32) / 16


@net(kernels((3, 3, 3, 6), (1, 1, 6, 6), (6, 4), (16, 5)))
def constant_kernels(p, x):
    """Blurred twice by one constant, mixed by another, and cut into patches."""
    x = jax.nn.relu(conv(x, p["k0"]))
    x = conv(x, jnp.tile(BLUR, (1, 1, 1, 6)), stride=2, groups=6) @ p["k1"][0, 0]
    x = conv(x, jnp.concatenate([BLUR] * 6, -1), groups=6) @ jnp.linspace(-1, 1, 36).reshape(6, 6)
    layout = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated_patches(
        x @ p["k2"], (2, 2), (2, 2), "VALID", dimension_numbers=layout
    )
    return x.mean((1, 2)) @ p["k3"]


@net({"w": dense(0, 3, 3, 8), "out": dense(1, 8, 5)}, normal(3, 2, 6, 3))
def attention(p, x):
    """Products of two activations: the head's channels are contracted with each other."""
    q, k, v = (x @ w for w in p["w"])
    return (jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v).mean(1) @ p["out"]


@net({"first": dense(0, 3, 6), "layers": dense(1, 4, 6, 6), "out": dense(2, 6, 5)}, normal(3, 2, 3))
def scanned(p, x):
    x, sums = lax.scan(lambda c, w: (c + jnp.tanh(c @ w), c), x @ p["first"], p["layers"])
    return (x + sums.mean(0)) @ p["out"]


@net(
    {"a": dense(0, 3, 6), "b": dense(1, 6, 6), "c": dense(2, 6, 6), "out": dense(3, 6, 5)},
    normal(3, 2, 3),
)
def branched(p, x):
    x = jax.checkpoint(lambda w, x: jnp.sin(x @ w))(p["a"], x)
    which = (x.sum() > 0).astype(jnp.int32)
    x = lax.switch(which, [lambda x: x @ p["b"], lambda x: jax.nn.relu(x) @ p["c"]], x)
    return jax.jit(lambda x: x @ p["out"])(x)


@jax.custom_jvp
def doubled_gradient(x):
    return jax.nn.relu(x)


@doubled_gradient.defjvp
def _(primals, tangents):
    return doubled_gradient(*primals), 2 * tangents[0] * (primals[0] > 0).astype(jnp.float32)


@jax.custom_vjp
def scaled_sum(x, bias):
    return x + bias[None]


scaled_sum.defvjp(
    lambda x, bias: (x + bias[None], x), lambda x, ct: (ct * (1 + x * x), 3 * ct.sum(0))
)


@net({"a": dense(0, 3, 6), "bias": normal(1, 6), "out": dense(2, 6, 5)}, normal(3, 2, 3))
def custom_derivatives(p, x):
    return doubled_gradient(scaled_sum(x @ p["a"], p["bias"])) @ p["out"]


@net({"a": dense(0, 3, 6), "out": dense(2, 6, 5)}, normal(3, 4, 3), jax.random.key(5))
def dropout(p, x, key):
    """The mask is drawn in full and then sliced, so that the small network drops the same."""
    x = x @ p["a"]
    kept = jax.random.bernoulli(key, 0.5, x.shape)
    return jnp.where(kept, 2 * x, 0.0) @ p["out"]


@net({"a": dense(0, 3, 6), "scale": normal(4, 6), "out": dense(2, 6, 5)}, normal(3, 4, 3))
def closed_over_constants(p, x):
    shift = jnp.arange(6.0) * p["scale"] + normal(7, 6)
    return (x @ p["a"] * p["scale"][None] + shift[None]) @ p["out"]


class Normalized(nn.Module):
    """Every normalization, in one Linen module with dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(not train)(nn.Conv(8, (3, 3))(x)))
        x = nn.GroupNorm(2)(nn.Conv(8, (3, 3), use_bias=False)(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.LayerNorm()(nn.Conv(6, (3, 3))(x)))
        return nn.Dense(5)(nn.InstanceNorm()(nn.Conv(6, (1, 1))(x)).mean((1, 2)))


@functools.cache
def linen():
    module = Normalized()
    return module, module.init(jax.random.key(0), IMAGES)


def in_inference(variables, x):
    return linen()[0].apply(variables, x)


def in_training(variables, x, key):
    return linen()[0].apply(variables, x, True, rngs={"dropout": key}, mutable=["batch_stats"])[0]


class NnxBlock(nnx.Module):
    """A module of Flax's other interface."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def nnx_net():
    graphdef, state = nnx.split(NnxBlock(nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graphdef, state)(x), state


NETS["linen_inference"] = (in_inference, lambda: linen()[1], (IMAGES,))
NETS["linen_training"] = (in_training, lambda: linen()[1], (IMAGES, jax.random.key(1)))
NETS["nnx"] = (lambda state, x: nnx_net()[0](state, x), lambda: nnx_net()[1], (IMAGES,))


def half(graph, seed=0):
    rng = np.random.default_rng(seed)
    return {g.name: rng.permutation(g.size) < max(1, g.size // 2) for g in graph.groups}


def made(name):
    fn, params, inputs = NETS[name]
    params = params() if callable(params) else params
    return fn, params, inputs, core.trace(fn, params, *inputs)


def halved(name):
    """A network, its parameters and inputs, and what `shrink` makes of half of its channels."""
    fn, params, inputs, graph = made(name)
    masks = core.expand(half(graph), graph.groups, params)
    return fn, params, inputs, *core.shrink(fn, params, masks, *inputs)


@pytest.mark.parametrize("name", NETS)
def test_masked_equals_shrunk(name):
    fn, params, inputs, small_fn, small, certificate = halved(name)
    masked = core.mask_removed(params, certificate.kept)

    assert certificate.parameters[1] < certificate.parameters[0]
    assert certificate.difference < 1e-5

    def loss(f):
        return lambda p: (f(p, *inputs) ** 2).mean()

    large_gradient = core.slice_tree(jax.jit(jax.grad(loss(fn)))(masked), certificate.kept)
    small_gradient = jax.jit(jax.grad(loss(small_fn)))(small)
    for path, gradient in core.flatten_paths(large_gradient).items():
        np.testing.assert_allclose(
            gradient, core.flatten_paths(small_gradient)[path], rtol=1e-4, atol=1e-5, err_msg=path
        )


@pytest.mark.parametrize("name", NETS)
def test_the_graph_of_what_is_left_is_that_of_the_small_function(name):
    fn, params, inputs, graph = made(name)
    keep = half(graph)
    kept = core.keep_indices(keep, graph.groups, params)
    masks = core.expand(keep, graph.groups, params)
    chex.assert_trees_all_equal(kept, core.kept_indices(graph, masks))

    left = core.narrow_graph(graph, keep)
    small = core.slice_tree(params, kept)
    traced = core.trace(core.narrow(fn, params, kept), small, *inputs)
    assert left.parameters == traced.parameters
    assert left.macs == traced.macs
    assert left.sites == traced.sites
    # The groups that were there, without the units that left.
    for before, after in zip(graph.groups, left.groups, strict=True):
        assert (after.name, after.size) == (before.name, keep[before.name].sum())
        for old, new in zip(before.members, after.members, strict=True):
            assert (new.path, new.axis) == (old.path, old.axis)
            stays = kept[new.path][new.axis][new.index]
            np.testing.assert_array_equal(stays, old.index[keep[before.name]])


def test_removals_that_do_not_fit_a_graph_are_refused():
    graph = core.trace(*NETS["residual"][:2], IMAGES)
    name = graph.groups[0].name
    with pytest.raises(ValueError, match=r"keep\['k0'\] must keep a channel, got none"):
        core.narrow_graph(graph, {name: np.zeros(8, bool)})
    for narrowed in (core.narrow_graph, lambda g, keep: core.keep_indices(keep, g.groups, {})):
        with pytest.raises(ValueError, match="keep must be one of k0, k1, got 'k9'"):
            narrowed(graph, {"k9": np.ones(8, bool)})
    with pytest.raises(ValueError, match=r"keep\['k0'\] must be bool\[8\], got bool\[7\]"):
        core.narrow_graph(graph, {name: np.ones(7, bool)})


def test_the_small_function_takes_any_batch_and_all_transformations():
    _, _, (x,), small_fn, small, _ = halved("residual")
    one_by_one = jnp.stack([small_fn(small, image[None])[0] for image in x])
    np.testing.assert_allclose(jax.jit(small_fn)(small, x), one_by_one, atol=1e-5)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), small)
    both = jax.jit(jax.vmap(small_fn, in_axes=(0, None)))(stacked, x)
    np.testing.assert_allclose(both[0], one_by_one, atol=1e-5)
    exported = jax.export.export(jax.jit(small_fn))(small, x)
    np.testing.assert_allclose(exported.call(small, x), one_by_one, atol=1e-5)


@pytest.mark.parametrize("name", ["flatten_to_dense", "split_and_slice", "two_pass_norms"])
def test_export_with_a_symbolic_batch(name):
    _, _, (x,), small_fn, small, _ = halved(name)
    watched = core.at_sites(small_fn, lambda site, x, kernel, apply: (apply(x, kernel), None))
    batch = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 8, 8, 3"), x.dtype)
    exported = jax.export.export(jax.jit(lambda p, x: watched(p, x)[0]))(small, batch)
    three = jnp.concatenate([x, x[:1]])
    np.testing.assert_allclose(exported.call(small, three), small_fn(small, three), atol=1e-5)


def test_groups_of_a_residual_stream_worked_out_by_hand():
    fn, params, inputs = NETS["residual"]
    graph = core.trace(fn, params, *inputs)
    members = {g.name: {(m.path, m.axis) for m in g.members} for g in graph.groups}
    # k0 makes the stream, k2 adds to it, k1 and the head read it; k1 makes what k2 reads.
    assert members == {
        "k0": {("k0", 3), ("k2", 3), ("k1", 2), ("k3", 0)},
        "k1": {("k1", 3), ("k2", 2)},
    }
    reasons = {(path, axis): reason for path, axis, reason in graph.frozen}
    assert reasons["k0", 2] == "is tied to an axis of the input or of fixed length"
    assert reasons["k3", 1] == "is an output of the function"
    assert reasons["k1", 0] == "is a spatial axis of a convolution"


def test_flattened_channels_keep_all_their_places():
    fn, params, inputs = NETS["flatten_to_dense"]
    [first, _] = core.trace(fn, params, *inputs).groups
    places = next(m for m in first.members if m.path == "k1")
    # 4 x 4 places, channels last: unit u is at u, u + 6, u + 12, ….
    assert places.index.tolist() == [[u + 6 * place for place in range(16)] for u in range(6)]


def test_a_depthwise_channel_leaves_with_all_its_outputs():
    fn, params, inputs = NETS["depthwise_with_multiplier"]
    graph = core.trace(fn, params, *inputs)
    first = next(g for g in graph.groups if g.name == "k0")
    assert next(m for m in first.members if m.path == "k1").index.tolist() == [
        [2 * u, 2 * u + 1] for u in range(8)
    ]


def test_frozen_channels_say_why():
    """A cumulative sum over channels cannot lose one; picking one out alone needs it."""
    z_scale = jnp.arange(6.0)[None]

    def fn(p, x):
        y, z = x @ p["a"], x @ p["b"]
        return (jnp.cumsum(y, axis=1) * y[:, :1]) @ p["out"] + jnp.sum(jnp.exp(z) * z_scale)

    params = {"a": dense(0, 3, 6), "b": dense(1, 3, 6), "out": dense(2, 6, 5)}
    graph = core.trace(fn, params, normal(3, 4, 3))
    frozen = {(path, axis): reason for path, axis, reason in graph.frozen}
    assert graph.groups == ()
    assert frozen["a", 1] == "is mixed along by a scan or sort"
    # What exp(0) = 1 adds is each channel's own.
    assert frozen["b", 1] == "is reduced over where a masked channel counts"


def test_training_goes_on_from_sliced_optimizer_state():
    fn, params, (x,), small_fn, _, certificate = halved("residual")
    masked, target = core.mask_removed(params, certificate.kept), normal(8, 2, 5)
    tx = optax.sgd(1e-2, momentum=0.9)

    def steps(f, p, state, hold):
        @jax.jit
        def step(p, state):
            gradient = jax.grad(lambda p: ((f(p, x) - target) ** 2).mean())(p)
            updates, state = tx.update(hold(gradient), state, p)
            return optax.apply_updates(p, updates), state

        for _ in range(10):
            p, state = step(p, state)
        return p, state

    hold = functools.partial(core.mask_removed, kept=certificate.kept)
    masked, state = steps(fn, masked, tx.init(masked), hold)
    small = core.slice_tree(masked, certificate.kept)
    small_state = core.slice_state(tx, state, params, certificate.kept)
    masked, _ = steps(fn, masked, state, hold)
    small, _ = steps(small_fn, small, small_state, lambda gradient: gradient)
    expected = core.slice_tree(masked, certificate.kept)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(small)):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_unstructured_masks_remove_nothing():
    fn, params, (x,) = NETS["residual"]
    masks = {
        path: jnp.ones(leaf.shape, bool).at[..., 0].set(False) for path, leaf in params.items()
    }
    _, small, _ = core.shrink(fn, params, masks | {"k2": jnp.ones(params["k2"].shape, bool)}, x)
    # Channel 0 of the stream is also made by k2, whose mask keeps it.
    assert small["k0"].shape == params["k0"].shape
    assert small["k1"].shape == params["k1"].shape


def test_masks_of_another_network_are_refused():
    fn, params, (x,) = NETS["residual"]
    with pytest.raises(ValueError, match=r"masks must have shape .* at 'k0', got"):
        core.shrink(fn, params, params | {"k0": jnp.ones((1, 2), bool)}, x)
    with pytest.raises(ValueError, match="masks must have paths of params, got 'other'"):
        core.shrink(fn, params, {"other": jnp.ones(3, bool)}, x)


def test_a_function_that_uses_a_removed_channel_is_refused():
    fn, params, (x,), _, small, certificate = halved("residual")
    spread = core.narrow(lambda p, x: jnp.cumsum(conv(x, p["k0"]), -1), params, certificate.kept)
    with pytest.raises(ValueError, match="kept must keep 'k0' whole on axis 3"):
        spread(small, x)
    same = core.narrow(fn, params, certificate.kept)
    with pytest.raises(ValueError, match="params must have shape"):
        same(params, x)


def test_only_parameters_are_sliced_as_such():
    kept = {"w": (np.array([0, 2]),)}
    assert core.slice_tree({"w": jnp.arange(3)}, kept)["w"].tolist() == [0, 2]
    # Other things of that name are no parameters: a metric, an average under a name of its own.
    for tree in ({"metrics": {"w": jnp.arange(9)}}, {"w": jnp.arange(3), "count": jnp.int32(1)}):
        with pytest.raises(
            ValueError, match=r"must have the paths of parameters, got '.*' among: w"
        ):
            core.slice_tree(tree, kept)
    with pytest.raises(ValueError, match=r"tree must have the shape of 'w' there, got \(2,\)"):
        core.slice_tree({"w": jnp.arange(2)}, kept)


def test_an_optimizer_state_is_sliced_by_what_init_makes_of_parameters():
    kept, params = {"w": (np.arange(2), np.array([0, 2]))}, {"w": jnp.arange(6.0).reshape(2, 3)}
    # The rate has the name of a parameter, and nothing to do with it.
    tx = optax.inject_hyperparams(lambda w: optax.adam(w))(w=0.1)
    state = tx.init(params)
    small = core.slice_state(tx, state, params, kept)
    assert small.hyperparams["w"] == state.hyperparams["w"]
    assert small.inner_state[0].mu["w"].shape == (2, 2)
    with pytest.raises(ValueError, match="must have the paths of parameters, got 'v' among: w"):
        core.slice_state(tx, state, {"v": params["w"]}, kept)
    factored = optax.adafactor(0.1, min_dim_size_to_factor=2)
    with pytest.raises(ValueError, match=r"^state must have shape \(2, 3\) for 'w', got \("):
        core.slice_state(factored, factored.init(params), params, kept)
