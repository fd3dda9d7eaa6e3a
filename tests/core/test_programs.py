"""Programs that once came out wrong, and random ones: masked equals shrunk, or it is frozen."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from hybrid_jax import core


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / np.sqrt(max(shape[-2:-1], default=1))


X = normal(0, 4, 3)
PARAMS = {"a": normal(1, 3, 6), "b": normal(2, 6, 5)}
COUNT = np.arange(6, dtype=np.float32)


def removed(fn, params, *inputs, share=0.5):
    """Shrinks to the last channels of every group."""
    graph = core.trace(fn, params, *inputs)
    keep = {g.name: np.arange(g.size) >= round(g.size * share) for g in graph.groups}
    masks = core.expand(keep, graph.groups, params)
    small_fn, small, certificate = core.shrink(fn, params, masks, *inputs)
    return graph, small_fn, small, core.mask_removed(params, certificate.kept), certificate


def reasons(graph):
    return {(path, axis): reason for path, axis, reason in graph.frozen}


@jax.custom_jvp
def counted(x):
    return x * COUNT[None] + jnp.asarray(COUNT)[None]


@counted.defjvp
def _(primals, tangents):
    return counted(*primals), 2 * tangents[0] * COUNT[None]


def while_scaled(x):
    return lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] / 2), (0, x))[1]


def convolved_by_both(x):
    """jax.vmap over kernels is a reshape that transposes."""
    kernels = jnp.stack([COUNT[None, :, None] * jnp.ones((1, 1, 6))] * 2)
    numbers = lax.conv_dimension_numbers((4, 1, 6), (1, 6, 6), ("NWC", "WIO", "NWC"))
    ys = jax.vmap(
        lambda k: lax.conv_general_dilated(x[:, None], k, (1,), "SAME", dimension_numbers=numbers)
    )(kernels)
    return ys.sum((0, 2)) / 100


MIDDLES = {
    "constants of a jit": jax.jit(lambda x: x * COUNT),
    "constants of a scan": lambda x: lax.scan(lambda c, _: (c * COUNT, None), x, None, length=2)[0],
    "constants of a branch": lambda x: lax.cond(x[0, 0] > 0, lambda y: y * COUNT, jnp.sin, x),
    "constants of a remat": jax.checkpoint(lambda x: jnp.sin(x * COUNT)),
    "constants of a derivative": lambda x: counted(jnp.sin(x)),
    "while": while_scaled,
    "vmapped convolution": convolved_by_both,
    "batch groups": lambda x: (
        lax.conv_general_dilated(
            x[:, :, None], jnp.ones((4, 6, 1)), (1,), "SAME", batch_group_count=4
        ).reshape(1, -1)[:, :1]
        * x
    ),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_masked_equals_shrunk(name):
    def fn(p, x):
        hidden = x @ p["a"]
        with jax.numpy_rank_promotion("allow"):
            y = MIDDLES[name](hidden)
        return (y + hidden if y.shape == hidden.shape else y) @ p["b"]

    graph, small_fn, small, masked, certificate = removed(fn, PARAMS, X)
    assert certificate.difference < 1e-5
    assert (name == "batch groups") == (not graph.groups), graph.frozen
    large = jax.jit(fn)(masked, X)
    np.testing.assert_allclose(jax.jit(small_fn)(small, X), large, atol=1e-5)


def test_a_vmapped_kernel_is_cut_with_the_channels_that_it_reads():
    def fn(p, x):
        numbers = lax.conv_dimension_numbers((4, 1, 6), (1, 6, 6), ("NWC", "WIO", "NWC"))
        ys = jax.vmap(
            lambda k: lax.conv_general_dilated(
                (x @ p["a"])[:, None], k, (1,), "SAME", dimension_numbers=numbers
            )
        )(p["k"])
        return ys.sum((0, 2)) @ p["b"]

    graph, *_, certificate = removed(fn, PARAMS | {"k": normal(3, 2, 1, 6, 6)}, X)
    assert certificate.difference < 1e-5
    members = {group.name: [(m.path, m.axis) for m in group.members] for group in graph.groups}
    assert members == {"a": [("a", 1), ("k", 2)], "k": [("b", 0), ("k", 3)]}


# What a masked channel holds is computed as the program does: with its rounding and its types.
SUMMED = {
    "rounded away from zero": lambda y: lax.round(y + 0.5),
    "rounded to even": lambda y: lax.round(y + 0.5, lax.RoundingMethod.TO_NEAREST_EVEN),
    "cast to integer": lambda y: (y + 1.5).astype(jnp.int32),
    "divided as integers": lambda y: lax.div(y.astype(jnp.int32) + 1, 2) * 2 - 1,
    "compared": lambda y: lax.select(y < 1, jnp.cbrt(y + 1), y),
    "with one number for all": lambda y: jnp.exp(y - y.max(-1, keepdims=True)),
}
NOT_FINITE = {
    "product": lambda y: y * jnp.log(jnp.abs(y)),
    "quotient": lambda y: y * (1 / y),
    "quotient of one number": lambda y: y * (1 / y) + y.mean(-1, keepdims=True),
}


@pytest.mark.parametrize("reduce", [jnp.sum, jnp.max, jnp.min])
@pytest.mark.parametrize("name", SUMMED)
def test_what_masked_channels_add_to_a_reduction_is_made_up_for(name, reduce):
    def fn(p, x):
        return reduce(SUMMED[name](x @ p["a"]), -1)

    graph, *_, certificate = removed(fn, PARAMS, X)
    assert [group.name for group in graph.groups] == ["a"]
    assert certificate.difference < 1e-5


@pytest.mark.parametrize("name", NOT_FINITE)
def test_a_sum_over_channels_is_frozen_where_a_masked_one_is_not_finite(name):
    graph = core.trace(lambda p, x: NOT_FINITE[name](x @ p["a"]).sum(-1), PARAMS, X)
    assert reasons(graph)["a", 1] == "is reduced over where a masked channel counts"


def test_a_masked_channel_that_the_program_knows_by_its_place_is_frozen():
    for own in (COUNT[None], np.stack([COUNT] * 4)):
        graph = core.trace(lambda p, x, own=own: (x @ p["a"] + own).sum(-1), PARAMS, X)
        assert reasons(graph)["a", 1] == "is reduced over where a masked channel counts"


def test_what_two_reduced_axes_add_is_not_made_up_for():
    def fn(p, x):
        outer = (x @ p["a"])[:, :, None] + (x @ p["b"])[:, None]
        return jnp.exp(outer).sum((1, 2))

    params = {"a": normal(1, 3, 6), "b": normal(2, 3, 5)}
    graph, *_, certificate = removed(fn, params, X)
    assert reasons(graph)["a", 1] == "is reduced over where a masked channel counts"
    assert certificate.difference == 0


def test_a_constant_that_two_layers_take_does_not_tie_them():
    params = {"a": normal(1, 3, 6), "b": normal(2, 6, 6), "c": normal(3, 6, 5)}

    def fn(p, x):
        return jnp.tanh((x @ p["a"] * COUNT) @ p["b"] * COUNT) @ p["c"]

    with jax.numpy_rank_promotion("allow"):
        graph, *_, certificate = removed(fn, params, X)
        assert len(graph.jaxpr.consts) == 1
    members = {group.name: [(m.path, m.axis) for m in group.members] for group in graph.groups}
    assert members == {"a": [("a", 1), ("b", 0)], "b": [("b", 1), ("c", 0)]}
    assert certificate.difference < 1e-5


def test_another_function_splits_channels_as_they_were_removed():
    """Of (2, 3) the network removes the 2; a function of its own would rather remove the 3."""

    def by_rows(p, x):
        return jnp.cumsum((x @ p["a"]).reshape(-1, 2, 3), -1).max(-1) @ p["b"]

    params = PARAMS | {"b": normal(2, 2, 5)}
    graph, _, small, masked, certificate = removed(by_rows, params, X)
    assert [(g.name, g.size) for g in graph.groups] == [("a", 2)]
    split = core.narrow(lambda p, x: (x @ p["a"]).reshape(-1, 2, 3), params, certificate.kept)
    expected = (X @ masked["a"]).reshape(-1, 2, 3)[:, 1:]
    np.testing.assert_allclose(split(small, X), expected, atol=1e-6)
    mixed = core.narrow(
        lambda p, x: (x @ p["a"]).reshape(-1, 3, 2).max(-1), params, certificate.kept
    )
    with pytest.raises(ValueError, match="a removed channel is coupled with one that stays"):
        mixed(small, X)


def test_the_certificate_compares_every_kind_of_output():
    def fn(p, x, key):
        y = x @ p["a"] @ p["b"]
        return y, y > 0, jnp.argmax(y, -1), lax.top_k(y, 2), jax.random.split(key)

    assert removed(fn, PARAMS, X, jax.random.key(0))[-1].difference < 1e-5

    def not_finite(p, x):
        return x @ p["a"] @ p["b"], jnp.log(-jnp.abs(x)), x / 0

    assert removed(not_finite, PARAMS, X)[-1].difference < 1e-5


@jax.custom_jvp
def own_sine(x):
    return jnp.sin(x)


@own_sine.defjvp
def _(primals, tangents):
    return own_sine(*primals), 2 * own_sine(*primals) * tangents[0]


@jax.custom_jvp
def product(w, x):
    return x @ w


@product.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return product(w, x), 3 * product(dw, x) + 3 * product(w, dx)


SMOOTH = {
    "relu": lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    "softplus": lambda p, x: jax.nn.softplus(x @ p["a"]) @ p["b"],
    "a rule that calls itself": lambda p, x: own_sine(x @ p["a"]) @ p["b"],
    "sites in a rule": lambda p, x: product(p["b"], jnp.sin(product(p["a"], x))),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_hessian_vector_products(name):
    fn = SMOOTH[name]
    _, small_fn, small, masked, certificate = removed(fn, PARAMS, X)
    same = core.at_sites(fn, lambda site, x, kernel, apply: (apply(x, kernel), None))
    direction = core.mask_removed(jax.tree.map(jnp.cos, PARAMS), certificate.kept)

    def product(f, p, v):
        return jax.jit(jax.jvp, static_argnums=0)(jax.grad(lambda p: (f(p) ** 2).sum()), (p,), (v,))

    expected = product(lambda p: fn(p, X), masked, direction)[1]
    again = product(lambda p: same(p, X)[0], masked, direction)[1]
    cut = functools.partial(core.slice_tree, kept=certificate.kept)
    found = product(lambda p: small_fn(p, X), small, cut(direction))[1]
    for path, value in expected.items():
        np.testing.assert_allclose(again[path], value, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[path], cut(expected)[path], rtol=1e-4, atol=1e-4)


def test_in_shard_map_with_a_sum_over_devices():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def centered(p, x):
        y = x @ p["a"]
        return jax.nn.relu(y - y.mean(0, keepdims=True)) @ p["b"]

    def centered_over_devices(p, x):
        y = x @ p["a"]
        return jax.nn.relu(y - lax.pmean(y.mean(0, keepdims=True), "data")) @ p["b"]

    _, small_fn, small, _, certificate = removed(centered, PARAMS, X)
    spread = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")))
    narrowed = core.narrow(centered_over_devices, PARAMS, certificate.kept)
    both = spread(narrowed, out_specs=P("data"))
    np.testing.assert_allclose(jax.jit(both)(small, X), small_fn(small, X), atol=1e-5)

    def loss(f):
        return jax.jit(jax.grad(lambda p: (f(p, X) ** 2).sum()))(small)

    for a, b in zip(jax.tree.leaves(loss(both)), jax.tree.leaves(loss(small_fn)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_functions_that_share_parameters():
    _, _, small, _, certificate = removed(SMOOTH["relu"], PARAMS, X)
    encode = core.narrow(lambda p, x: jax.nn.relu(x @ p["a"]).sum(-1), PARAMS, certificate.kept)
    np.testing.assert_allclose(encode(small, X), jax.nn.relu(X @ small["a"]).sum(-1), atol=1e-5)


def test_an_unused_parameter_is_frozen_under_jit_too():
    graph = core.trace(jax.jit(SMOOTH["relu"]), PARAMS | {"c": jnp.ones((4, 4))}, X)
    assert [group.name for group in graph.groups] == ["a"]
    assert reasons(graph)["c", 0] == "is used by no equation"


def test_the_small_function_follows_the_precision_of_its_parameters():
    _, small_fn, small, _, _ = removed(SMOOTH["relu"], PARAMS, X)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small)
    y = small_fn(half, X.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), small_fn(small, X), atol=0.1)


def test_every_channel_of_a_depthwise_convolution_can_leave():
    numbers = ("NWC", "WIO", "NWC")

    def fn(p, x):
        x = (x @ p["a"])[:, None]
        x = lax.conv_general_dilated(
            x, p["k"], (1,), "SAME", dimension_numbers=numbers, feature_group_count=6
        )
        return x[:, 0] @ p["b"]

    _, _, small, _, certificate = removed(fn, PARAMS | {"k": normal(3, 3, 1, 6)}, X, share=1.0)
    assert small["k"].shape == (3, 1, 0)
    assert certificate.difference == 0


def test_a_reshape_that_merges_channels_into_a_symbolic_axis():
    def fn(p, x):
        y = (x @ p["a"]).reshape(-1, 6) @ p["b"]
        return y, (x @ p["c"]).reshape(-1)

    params, x = PARAMS | {"c": normal(3, 3, 6)}, normal(4, 2, 4, 3)
    _, small_fn, small, _, _ = removed(fn, params, x)
    batch = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 4, 3"), x.dtype)
    exported = jax.export.export(jax.jit(small_fn))(small, batch)
    for a, b in zip(exported.call(small, x), small_fn(small, x), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    graph = core.trace(fn, params, batch)
    assert reasons(graph)["c", 1] == "is reshaped together with a symbolic dimension"


def test_a_transposed_convolution_multiplies_no_inserted_zeros():
    def fn(p, x):
        return lax.conv_transpose(x, p["k"], (2, 2), "SAME")

    graph = core.trace(fn, {"k": normal(0, 2, 2, 3, 4)}, normal(1, 5, 8, 8, 3))
    # Each of the 8 x 8 places is multiplied with a 2 x 2 x 3 x 4 kernel.
    assert graph.macs == graph.sites[0].macs == 8 * 8 * 2 * 2 * 3 * 4


def test_bad_input_says_what_and_where():
    with pytest.raises(TypeError, match="params must have arrays as leaves, got 'no' at 'b'"):
        core.trace(SMOOTH["relu"], PARAMS | {"b": "no"}, X)
    _, small_fn, small, _, _ = removed(SMOOTH["relu"], PARAMS, X)
    with pytest.raises(ValueError, match="params must have structure"):
        small_fn({"a": small["a"]}, X)
    with pytest.raises(ValueError, match="params must have shape"):
        small_fn(PARAMS, X)


# Random programs: a chain of blocks on (B, 4, 6), each with parameters of its own.
BLOCKS = {
    "dense": ({"w": (6, 6)}, lambda p, x: jnp.tanh(x @ p["w"])),
    "residual": ({"u": (6, 4), "v": (4, 6)}, lambda p, x: x + jax.nn.silu(x @ p["u"]) @ p["v"]),
    "tokens": ({"w": (4, 4)}, lambda p, x: x + jnp.einsum("btc,ts->bsc", x, p["w"])),
    "gate": (
        {"w": (6, 6)},
        lambda p, x: x * jax.nn.sigmoid(x.mean(1, keepdims=True) @ p["w"]),
    ),
    "attention": (
        {"q": (6, 2, 3), "k": (6, 2, 3), "v": (6, 2, 3), "o": (6, 6)},
        lambda p, x: _attention(p, x),
    ),
    "scan": (
        {"w": (6, 6)},
        lambda p, x: lax.scan(
            lambda c, t: (jnp.tanh(c @ p["w"] + t), c), x[:, 0], x.swapaxes(0, 1)
        )[1].swapaxes(0, 1),
    ),
    "halves": (
        {"w": (3, 3)},
        lambda p, x: jnp.concatenate([jax.nn.relu(x[..., :3] @ p["w"]), x[..., 3:]], -1),
    ),
    "shuffle": ({}, lambda p, x: x.reshape(*x.shape[:2], 2, 3).swapaxes(2, 3).reshape(x.shape)),
    "normalize": (
        {"s": (1, 1, 6)},
        lambda p, x: p["s"] * x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-3),
    ),
    "branch": (
        {"w": (6, 6)},
        lambda p, x: lax.cond(x[0, 0, 0] > 0, lambda y: y @ p["w"], jnp.sin, x),
    ),
    "mixed along": ({}, lambda p, x: jnp.cumsum(x, -1)),
    "regrouped": ({}, lambda p, x: jnp.tanh(x.reshape(-1, 8, 3)).reshape(x.shape)),
    "turned": ({}, lambda p, x: x.reshape(-1, 4, 3, 2).transpose(0, 2, 1, 3).reshape(-1, 4, 6)),
    "groups first": (
        {"w": (3, 3), "v": (6, 6)},
        lambda p, x: jnp.einsum("btgc,gh->bthc", (x @ p["v"]).reshape(-1, 4, 3, 2), p["w"]).reshape(
            x.shape
        ),
    ),
    "maxout": ({"w": (6, 12)}, lambda p, x: (x @ p["w"]).reshape(-1, 4, 6, 2).max(-1)),
    "repeated": ({"w": (12, 6)}, lambda p, x: jnp.repeat(x, 2, -1) @ p["w"]),
    "two passes": ({"s": (1, 1, 6)}, lambda p, x: x + _standardized(x, -1) * p["s"]),
    "groups in two passes": (
        {"w": (6, 6)},
        lambda p, x: _standardized((x @ p["w"]).reshape(-1, 4, 3, 2), (1, 3)).reshape(x.shape),
    ),
    "scanned norms": (
        {"w": (2, 6, 6)},
        lambda p, x: lax.scan(
            jax.checkpoint(lambda c, w: (c + _standardized(c, -1) @ w, None)), x, p["w"]
        )[0],
    ),
    "softmax": ({"w": (6, 6)}, lambda p, x: jax.nn.softmax(x, -1) @ p["w"]),
    "constants": (
        {"w": (6, 6)},
        lambda p, x: _smoothed(x @ p["w"]) @ jnp.cos(jnp.outer(*[COUNT] * 2)),
    ),
}


def _standardized(x, axes):
    centered = x - x.mean(axes, keepdims=True)
    return centered * lax.rsqrt((centered**2).mean(axes, keepdims=True) + 1e-3)


def _smoothed(x):
    numbers = ("NWC", "WIO", "NWC")
    kernel = jnp.tile(jnp.array([0.25, 0.5, 0.25])[:, None, None], (1, 1, x.shape[-1]))
    return lax.conv_general_dilated(
        x, kernel, (1,), "SAME", dimension_numbers=numbers, feature_group_count=x.shape[-1]
    )


def _attention(p, x):
    q, k, v = (jnp.einsum("btc,chd->bthd", x, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    return x + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape) @ p["o"]


@settings(max_examples=10, derandomize=True)
@given(
    names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_random_networks(names, seed):
    params = {"in": normal(seed, 3, 6), "out": normal(seed + 1, 6, 5)}
    for i, name in enumerate(names):
        params[f"{i}"] = {
            key: normal(seed + i + ord(key), *shape) for key, shape in BLOCKS[name][0].items()
        }

    def fn(p, x):
        x = x @ p["in"]
        for i, name in enumerate(names):
            x = BLOCKS[name][1](p[f"{i}"], x)
        return x.mean(1) @ p["out"]

    x = normal(seed + 2, 2, 4, 3)
    graph = core.trace(fn, params, x)
    rng = np.random.default_rng(seed)
    keep = {g.name: rng.random(g.size) < 0.6 for g in graph.groups}
    masks = core.expand(keep, graph.groups, params)
    small_fn, small, certificate = core.shrink(fn, params, masks, x)
    assert certificate.difference < 1e-5
    kept = sum(int(k.sum()) for k in keep.values())
    assert (certificate.parameters[0] == certificate.parameters[1]) == (
        kept == sum(g.size for g in graph.groups)
    )
    masked = core.mask_removed(params, certificate.kept)
    large = jax.jit(jax.grad(lambda p: (fn(p, x) ** 2).sum()))(masked)
    found = jax.jit(jax.grad(lambda p: (small_fn(p, x) ** 2).sum()))(small)
    expected = core.slice_tree(large, certificate.kept)
    for a, b in itertools.zip_longest(jax.tree.leaves(expected), jax.tree.leaves(found)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@settings(max_examples=8, derandomize=True)
@given(
    channels=st.integers(2, 5),
    ratio=st.sampled_from([2, 3]),
    order=st.sampled_from(["Crr", "rrC", "rCr"]),
    layout=st.sampled_from(["NHWC", "NCHW"]),
    seed=st.integers(0, 2**16),
)
def test_random_pixel_shuffles(channels, ratio, order, layout, seed):
    """A unit is a channel after the shuffle, with the ratio² before it that its places are."""
    after = layout.index("C")
    rows, columns = (i for i in range(3) if order[i] == "r")
    sizes = [channels if axis == "C" else ratio for axis in order]

    def convolved(x, kernel):
        numbers = (layout, "HWIO", layout)
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    def fn(p, x):
        x = jax.nn.relu(convolved(x, p["a"]))
        h, w = (x.shape[layout.index(axis)] for axis in "HW")
        x = x.reshape(*x.shape[:after], *sizes, *x.shape[after + 1 :])
        place = {axis: i if i < after else i + 2 for i, axis in enumerate(layout)}
        parts = {"N": [0], "C": [after + order.index("C")]}
        parts |= {"H": [place["H"], after + rows], "W": [place["W"], after + columns]}
        x = x.transpose([axis for name in layout for axis in parts[name]])
        long = {"N": -1, "H": h * ratio, "W": w * ratio, "C": channels}
        return convolved(jnp.tanh(x.reshape([long[name] for name in layout])), p["b"])

    params = {
        "a": normal(seed, 3, 3, 2, channels * ratio**2),
        "b": normal(seed + 1, 3, 3, channels, 2),
    }
    x = normal(seed + 2, *({"N": 2, "H": 4, "W": 3, "C": 2}[axis] for axis in layout))
    graph = core.trace(fn, params, x)
    [group] = graph.groups
    flat = np.moveaxis(np.arange(channels * ratio**2).reshape(sizes), order.index("C"), 0)
    assert {m.path: m.index.tolist() for m in group.members} == {
        "a": flat.reshape(channels, -1).tolist(),
        "b": np.arange(channels)[:, None].tolist(),
    }
    keep = np.random.default_rng(seed).random(channels) < 0.6
    masks = core.expand({group.name: keep}, graph.groups, params)
    assert core.shrink(fn, params, masks, x)[2].difference < 1e-5
