import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import contrib, core, models, pruning

# x (3) -> relu(hidden (2)) -> outputs (2)
NET = {
    "first": jnp.array([[1.0, -2.0], [0.0, 2.0], [3.0, 0.5]]),
    "bias": jnp.zeros(2),
    "second": jnp.array([[-1.0, 4.0], [2.0, 1.0]]),
}
EXAMPLES = jnp.array([[1.0, 2.0, 0.0], [3.0, 0.0, 2.0]])
STATISTICS = {"norms": pruning.activation_norms, "independence": pruning.channel_independence}


def two_layers(params, x):
    return jax.nn.relu(x @ params["first"] + params["bias"][None]) @ params["second"]


def conv(spec, **options):
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return lambda params, x: jax.lax.conv_general_dilated(
        x, params["k"], dimension_numbers=spec, **options
    )


NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
# name: (function, shape of the kernel, shape of the input, axis of the output that holds O)
LAYOUTS = {
    "dense": (lambda p, x: x @ p["k"], (3, 4), (2, 3), -1),
    "stored transposed": (lambda p, x: x @ p["k"].T, (4, 3), (2, 3), -1),
    "reshaped": (lambda p, x: x @ p["k"].reshape(3, 4), (3, 2, 2), (2, 3), -1),
    "same, strided": (conv(NHWC, window_strides=(2, 1)), (3, 3, 2, 4), (2, 5, 4, 2), -1),
    "channels first": (conv(NCHW, padding="VALID"), (4, 2, 3, 2), (2, 2, 5, 6), 1),
    "grouped": (conv(NHWC, feature_group_count=2), (3, 2, 3, 4), (2, 4, 5, 6), -1),
    "depthwise": (conv(NHWC, feature_group_count=3), (3, 3, 1, 3), (2, 4, 4, 3), -1),
    "dilated": (conv(NHWC, rhs_dilation=(2, 2)), (2, 2, 2, 3), (2, 5, 5, 2), -1),
}


def nuclear_changes(maps):
    """(O,) of maps (O, P), from the definition."""
    whole = np.linalg.svd(maps, compute_uv=False).sum()
    without = [np.where(np.arange(len(maps))[:, None] == o, 0, maps) for o in range(len(maps))]
    return np.array([whole - np.linalg.svd(m, compute_uv=False).sum() for m in without])


def test_wanda():
    # Columns of the inputs: (1, 3), (2, 0), (0, 2). The hidden units are (1, −2 + 4 = 2) and
    # (3 + 6 = 9, −6 + 1 = −5 -> 0): columns (1, 9) and (2, 0).
    norms = pruning.activation_norms(two_layers, NET, [(EXAMPLES[:1],), (EXAMPLES[1:],)])
    np.testing.assert_allclose(norms["first"], np.sqrt([[10, 10], [4, 4], [4, 4]]), rtol=1e-6)
    np.testing.assert_allclose(norms["second"], [[82**0.5] * 2, [2, 2]], rtol=1e-6)
    assert norms["bias"] == optax.MaskedNode()
    kernels = core.trace(two_layers, NET, EXAMPLES).kernels
    scores = pruning.wanda(kernels, NET, norms)
    ten = 10**0.5
    np.testing.assert_allclose(scores["first"], [[ten, 2 * ten], [0, 4], [6, 1]], rtol=1e-6)
    np.testing.assert_allclose(scores["second"], [[82**0.5, 4 * 82**0.5], [4, 2]], rtol=1e-6)


def test_chip():
    # A pointwise convolution that copies its input, of two positions. Rows (3, 0), (0, 4) are
    # orthogonal: singular values 3, 4, and without a row the other's. Rows (1, 0), (2, 0) are
    # parallel: one value √5, and without a row 2 or 1. Each filter has two weights to share.
    images = jnp.array([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 2.0], [0.0, 0.0]]])[:, None]
    params = {"k": jnp.eye(2)[None, None]}
    independence = pruning.channel_independence(conv(NHWC), params, [(images,)])
    a, b = (3 + 5**0.5 - 2) / 2, (4 + 5**0.5 - 1) / 2
    kernels = core.trace(conv(NHWC), params, images).kernels
    scores = pruning.chip(kernels, params, independence)["k"]
    np.testing.assert_allclose(scores, [[[[a / 2, b / 2], [a / 2, b / 2]]]], rtol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_weight_has_the_norm_of_all_it_meets_in_any_layout(name, key):
    fn, kernel, shape, _ = LAYOUTS[name]
    params, x = {"k": jax.random.normal(key, kernel)}, jax.random.normal(key, shape)
    norms = pruning.activation_norms(fn, params, [(x[:1],), (x[1:],)])
    # What a weight meets is the derivative of the outputs.
    met = np.asarray(jax.jacobian(fn)(params, x)["k"])
    expected = np.sqrt(np.square(met).reshape(-1, *kernel).sum(axis=0))
    np.testing.assert_allclose(norms["k"], expected, rtol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_filter_has_the_independence_of_its_map_in_any_layout(name, key):
    fn, kernel, shape, axis = LAYOUTS[name]
    params, x = {"k": jax.random.normal(key, kernel)}, jax.random.normal(key, shape)
    got = pruning.channel_independence(fn, params, [(x,)])["k"]
    maps = np.moveaxis(np.asarray(fn(params, x)), axis, 1)
    maps = maps.reshape(*maps.shape[:2], -1)
    expected = np.mean([nuclear_changes(m) for m in maps], axis=0)
    # Written into the outputs' derivative, the score of filter o comes out at its own weights.
    own = {
        "stored transposed": lambda k: k.sum(1),
        "reshaped": lambda k: k.sum(0).reshape(-1),
        "channels first": lambda k: k.sum((1, 2, 3)),
    }.get(name, lambda k: k.reshape(-1, k.shape[-1]).sum(0))
    np.testing.assert_allclose(own(np.asarray(got)), expected, rtol=1e-4, atol=1e-5)


def test_uses_of_one_kernel_add_up(key):
    def twice(params, x):
        return jnp.tanh(x @ params["k"]) @ params["k"]

    def looped(params, x):
        body = lambda x, k: (jnp.tanh(x @ k), None)  # noqa: E731
        return jax.lax.scan(body, x, params["k"])[0]

    x, k = jax.random.normal(key, (4, 3)), jax.random.normal(key, (3, 3))
    hidden = jnp.tanh(x @ k)
    expected = np.sqrt(np.square(x).sum(0) + np.square(hidden).sum(0))
    norms = pruning.activation_norms(twice, {"k": k}, [(x,)])["k"]
    np.testing.assert_allclose(norms, np.tile(expected[:, None], 3), rtol=1e-5)
    # A stack of kernels in a loop: each has its own.
    stack = pruning.activation_norms(looped, {"k": jnp.stack([k, k])}, [(x,)])["k"]
    for row, seen in zip(stack, (x, hidden), strict=True):
        expected = np.sqrt(np.square(seen).sum(0))
        np.testing.assert_allclose(row, np.tile(expected[:, None], 3), rtol=1e-5)


@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
def test_a_stack_of_experts_is_vmapped(statistic):
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), NET)
    stacked = jax.vmap(lambda params: statistic(two_layers, params, [(EXAMPLES,)]))(stack)
    alone = statistic(two_layers, jax.tree.map(lambda leaf: leaf[1], stack), [(EXAMPLES,)])
    for name in ("first", "second"):
        np.testing.assert_allclose(stacked[name][1], alone[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
def test_inputs_that_are_not_finite_reach_masks(statistic):
    broken = statistic(two_layers, NET, [(EXAMPLES.at[0, 0].set(jnp.nan),)])
    kernels = core.trace(two_layers, NET, EXAMPLES).kernels
    with pytest.raises(ValueError, match="scores must be finite"):
        pruning.masks(pruning.wanda(kernels, NET, broken), 0.5)


@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
def test_dead_inputs_give_zeros(statistic):
    found = statistic(two_layers, NET, [(jnp.zeros((2, 3)),)])
    assert not np.any(found["first"])
    assert not np.any(found["second"])


@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
def test_what_cannot_be_seen_is_named(statistic):
    def in_while(params, x):
        step = lambda carry: (carry[0] + 1, carry[1] @ params["k"])  # noqa: E731
        return jax.lax.while_loop(lambda carry: carry[0] < 2, step, (0, x))[1]

    @jax.custom_jvp
    def product(x, k):
        return x @ k

    product.defjvp(lambda primals, tangents: (product(*primals), product(*primals)))
    params, x = {"k": jnp.ones((3, 3))}, jnp.ones((2, 3))
    with pytest.raises(ValueError, match="'k' outside `while`"):
        statistic(in_while, params, [(x,)])
    with pytest.raises(ValueError, match="'k' outside a function with a derivative rule"):
        statistic(lambda params, x: product(x, params["k"]), params, [(x,)])
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        statistic(two_layers, NET, [])
    with pytest.raises(TypeError, match="batches must yield tuples of inputs, got ArrayImpl"):
        statistic(two_layers, NET, [EXAMPLES])


@pytest.mark.parametrize("name", models.names())
def test_statistics_of_every_model_have_the_shapes_of_its_kernels(name, small_model):
    fn, _, params, images = small_model(name)
    kernels = {site.path for site in core.trace(fn, params, images).sites}
    found = {
        key: jax.eval_shape(lambda p, s=statistic: s(fn, p, [(images,)]), params)
        for key, statistic in STATISTICS.items()
    }
    found["flow"] = jax.eval_shape(functools.partial(contrib.synaptic_flow, fn), params, images)
    for key, tree in found.items():
        for path, leaf in core.flatten_paths(tree).items():
            if key == "flow" or path in kernels:
                assert leaf.shape == core.flatten_paths(params)[path].shape, (key, path)
            else:
                assert core.is_masked_node(leaf), (key, path)


def test_readers_of_a_channel_add_the_same_to_all_of_its_group(key):
    def two_convs(params, x):
        hidden = jax.nn.relu(conv(NHWC)({"k": params["a"]}, x))
        return conv(NHWC)({"k": params["b"]}, hidden)

    params = {"a": jax.random.normal(key, (3, 3, 2, 5)), "b": jax.random.normal(key, (3, 3, 5, 2))}
    params["a"] = params["a"].at[..., 4].set(0.0)
    x = jax.random.normal(key, (4, 6, 6, 2))
    graph = core.trace(two_convs, params, x)
    scores = pruning.chip(
        graph.kernels, params, pruning.channel_independence(two_convs, params, [(x,)])
    )
    groups = graph.groups
    reduced = pruning.group_scores(scores, groups, "sum", normalize="none")["a"]
    added = reduced - scores["a"].sum((0, 1, 2))
    np.testing.assert_allclose(added, np.full(5, added[0]), rtol=1e-5)
    # The map that is zero adds nothing to the others.
    assert pruning.keep_channels({"a": reduced}, 0.2)["a"].tolist() == [True] * 4 + [False]


def test_informed_criteria_lose_less_accuracy_than_random_on_real_images(digits):
    fn, params = digits.fn, digits.params
    images, labels = digits.images[:1024], digits.labels[:1024]
    kernels = core.trace(fn, params, images[:1]).kernels

    @jax.jit
    def taylor(images, labels):
        def loss(params):
            logits = fn(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return pruning.taylor(kernels, params, jax.grad(loss)(params))

    # Over batches, because of all images at once a trained network's gradient is near zero.
    by_batch = [taylor(images[i : i + 64], labels[i : i + 64]) for i in range(0, 1024, 64)]
    sensitivity = jax.tree.map(lambda *scores: sum(scores), *by_batch)
    norms = pruning.activation_norms(fn, params, [(images[:512],), (images[512:],)])
    informed = [
        pruning.magnitude(kernels, params),
        sensitivity,
        pruning.wanda(kernels, params, norms),
    ]
    controls = [pruning.random(kernels, params, jax.random.key(seed)) for seed in range(3)]
    predict = jax.jit(fn)

    def accuracy(scores):
        masks = pruning.masks(scores, 0.6, allocation=pruning.global_())
        logits = predict(pruning.apply_masks(params, masks), digits.held_out_images)
        return float((logits.argmax(-1) == digits.held_out_labels).mean())

    assert min(map(accuracy, informed)) > max(map(accuracy, controls))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_sums_over_examples_are_of_float32(dtype):
    # 2048 times (3, 4): √(2048 · 9) and √(2048 · 16); maps 3 and 4, of norm 5 − 4 and 5 − 3.
    params, images = (
        {"w": jnp.eye(2, dtype=dtype)},
        jnp.tile(jnp.array([[3.0, 4.0]], dtype), (2048, 1)),
    )

    def fn(params, x):
        return x @ params["w"]

    norms = pruning.activation_norms(fn, params, [(images,)])["w"]
    np.testing.assert_allclose(norms[:, 0], [18432**0.5, 32768**0.5], rtol=1e-6)
    independence = pruning.channel_independence(fn, params, [(images,)])["w"]
    np.testing.assert_allclose(independence.sum(0), [1.0, 2.0], rtol=1e-5)


@pytest.mark.parametrize("name", STATISTICS)
def test_how_examples_are_divided_into_batches_makes_no_difference(name, key):
    images = jax.random.normal(key, (9, 3)) * jnp.arange(1.0, 10)[:, None]

    def of(*sizes):
        parts = np.split(images, np.cumsum(sizes)[:-1])
        return STATISTICS[name](two_layers, NET, [(part,) for part in parts])["first"]

    whole = of(9)
    for sizes in ((3, 3, 3), (8, 1), (4, 5)):
        np.testing.assert_allclose(of(*sizes), whole, rtol=1e-5)
    with pytest.raises(ValueError, match="every batch must hold an example, got none in batch 1"):
        STATISTICS[name](two_layers, NET, [(images[:0],)])
