import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layouts import flax_kernels

from hybrid_jax import contrib, pruning

# x (3) -> hidden (2) -> outputs (2), no biases in the way of the arithmetic.
FIRST = jnp.array([[1.0, -2.0], [0.0, 2.0], [3.0, 0.5]])
SECOND = jnp.array([[-1.0, 4.0], [2.0, 1.0]])
NET = {
    "Dense_0": {"kernel": FIRST, "bias": jnp.array([9.0, 9.0])},
    "Dense_1": {"kernel": SECOND, "bias": jnp.array([9.0, 9.0])},
}
# criterion(kernels, params)
ALONE = {
    "magnitude": pruning.magnitude,
    "squared": functools.partial(pruning.magnitude, p=2),
    "random": functools.partial(pruning.random, key=jax.random.key(0)),
    "lamp": pruning.lamp,
    "geometric_median": pruning.geometric_median,
}
# criterion(kernels, params, statistics)
WITH_STATISTICS = {
    "taylor": pruning.taylor,
    "snip": pruning.snip,
    "grasp": pruning.grasp,
    "fisher": pruning.fisher,
    "movement": pruning.movement,
    "synflow": contrib.synflow,
    "wanda": pruning.wanda,
    "chip": pruning.chip,
}
ALL = ALONE | {name: lambda k, p, c=c: c(k, p, p) for name, c in WITH_STATISTICS.items()}


NET_KERNELS = flax_kernels(NET)


def check(scores, first, second):
    np.testing.assert_allclose(scores["Dense_0"]["kernel"], first, rtol=1e-6)
    np.testing.assert_allclose(scores["Dense_1"]["kernel"], second, rtol=1e-6)
    assert scores["Dense_0"]["bias"] == optax.MaskedNode()


def test_magnitude():
    check(pruning.magnitude(NET_KERNELS, NET), [[1, 2], [0, 2], [3, 0.5]], [[1, 4], [2, 1]])
    check(pruning.magnitude(NET_KERNELS, NET, p=2), [[1, 4], [0, 4], [9, 0.25]], [[1, 16], [4, 1]])


def linear_loss(params):
    # dL/dw = x_i · (row sums of the second kernel)_j = x_i · (3, 3) in the first layer,
    # and (x W1)_i in the second, x W1 = (1 + 3·3, −2 + 2·2 + 3·0.5) = (10, 3.5).
    x = jnp.array([[1.0, 2.0, 3.0]])
    return jnp.sum(x @ params["Dense_0"]["kernel"] @ params["Dense_1"]["kernel"])


def test_taylor():
    scores = pruning.taylor(NET_KERNELS, NET, jax.grad(linear_loss)(NET))
    check(scores, [[3, 6], [0, 12], [27, 4.5]], [[10, 40], [7, 3.5]])


def test_snip_is_the_share_of_the_whole_network():
    # The scores of taylor add up to 52.5 in the first layer and 60.5 in the second.
    scores = pruning.snip(NET_KERNELS, NET, jax.grad(linear_loss)(NET))
    first = np.array([[3, 6], [0, 12], [27, 4.5]])
    check(scores, first / 113, np.array([[10, 40], [7, 3.5]]) / 113)
    tenfold = jax.grad(lambda p: 10 * linear_loss(p))(NET)
    jax.tree.map(np.testing.assert_allclose, pruning.snip(NET_KERNELS, NET, tenfold), scores)


def test_snip_of_no_sensitivity_is_zero():
    check(pruning.snip(NET_KERNELS, NET, jax.tree.map(jnp.zeros_like, NET)), 0, 0)


def test_grasp():
    def loss(params):  # ½ (a b)²
        return 0.5 * jnp.sum(params["a"] @ params["b"]) ** 2

    # g = (a b², a² b), H = [[b², 2 a b], [2 a b, a²]]. At a = 1, b = 2: g = (4, 2),
    # H g = (4·4 + 4·2, 4·4 + 1·2) = (24, 18).
    params = {"a": jnp.full((1, 1), 1.0), "b": jnp.full((1, 1), 2.0)}
    product = pruning.hessian_gradient(flax_kernels(params), loss, params)
    assert (product["a"].item(), product["b"].item()) == (24.0, 18.0)
    scores = pruning.grasp(flax_kernels(params), params, product)
    assert (scores["a"].item(), scores["b"].item()) == (24.0, 36.0)


def test_the_gradients_of_biases_are_no_flow():
    # ½ (w + c)²: H is all ones, g = (4, 4), and over the kernel alone H g = 4.
    params = {"w": jnp.full((1, 1), 1.0), "bias": jnp.full((1,), 3.0)}
    product = pruning.hessian_gradient(
        {"w": flax_kernels(params)["w"]},
        lambda p: 0.5 * jnp.sum(p["w"] + p["bias"][None]) ** 2,
        params,
    )
    assert product["w"].item() == 4.0


def test_movement_adds_up_over_steps():
    params = {"w": jnp.array([[1.0, -2.0, 0.5]]), "bias": jnp.ones(3)}
    gradients = {"w": jnp.array([[-1.0, -2.0, 0.0]]), "bias": jnp.ones(3)}
    moved = jax.tree.map(jnp.zeros_like, params)
    for _ in range(2):
        moved = pruning.accumulate_movement(moved, params, gradients)
        params = jax.tree.map(lambda w, g: w - 0.5 * g, params, gradients)
    # −w g: 1, −4, 0 at w = (1, −2, 0.5), then 1.5, −2, 0 at w = (1.5, −1, 0.5).
    np.testing.assert_array_equal(
        pruning.movement(flax_kernels(params), params, moved)["w"], [[2.5, -6.0, 0.0]]
    )
    # What grew stays although what shrank is larger than the one that did not move.
    assert pruning.masks(pruning.movement(flax_kernels(params), params, moved), 1 / 3)[
        "w"
    ].tolist() == [[True, False, True]]
    assert pruning.movement(flax_kernels(params), params, moved)["bias"] == optax.MaskedNode()


def test_movement_accumulates_in_the_precision_given():
    params = {"w": jnp.ones((1, 2), jnp.bfloat16), "step": jnp.ones((), jnp.int32)}
    start = {"w": jnp.full((1, 2), 256.0), "step": optax.MaskedNode()}
    moved = pruning.accumulate_movement(start, params, params)
    assert moved["w"].tolist() == [[255.0, 255.0]]
    assert moved["w"].dtype == jnp.float32
    assert moved["step"] == optax.MaskedNode()


def test_fisher_is_half_of_the_mean_square_per_example():
    def loss(params, x):
        return jnp.sum(x[None] @ params["Dense_0"]["kernel"]) + jnp.sum(params["Dense_1"]["kernel"])

    # Per example the gradient is x_i: squares 1, 4, 0 and 9, 0, 4, their means 5, 2, 2.
    squared = pruning.mean_squared_gradients(loss, NET, jnp.array([[1.0, 2.0, 0], [3.0, 0, 2.0]]))
    first = [[0.5 * 5 * 1, 0.5 * 5 * 4], [0, 0.5 * 2 * 4], [0.5 * 2 * 9, 0.5 * 2 * 0.25]]
    check(pruning.fisher(NET_KERNELS, NET, squared), first, [[0.5, 8], [2, 0.5]])


def test_lamp():
    # Second layer: squares 1, 16, 4, 1; of the two equal ones the first is above.
    first = [[1 / 18, 4 / 13], [0, 4 / 17], [9 / 9, 0.25 / 18.25]]
    # First layer in falling order: 9, 4, 4, 1, 0.25, 0 with totals 9, 13, 17, 18, 18.25, 18.25.
    check(pruning.lamp(NET_KERNELS, NET), first, [[1 / 21, 1], [4 / 20, 1 / 22]])


def test_geometric_median():
    # Filters of the first layer: (1, 0, 3) and (−2, 2, 0.5), apart by (3, −2, 2.5);
    # ‖·‖ = √(9 + 4 + 6.25). Each weight gets its square over that. Second: (−3 ,1)·: √10.
    d, e = 19.25**0.5, (5.0**2 + 1) ** 0.5
    check(
        pruning.geometric_median(NET_KERNELS, NET),
        [[9 / d, 9 / d], [4 / d, 4 / d], [6.25 / d, 6.25 / d]],
        [[25 / e, 25 / e], [1 / e, 1 / e]],
    )


def test_geometric_median_sums_to_the_distances_of_convolution_filters(key):
    kernel = jax.random.normal(key, (3, 3, 2, 5))
    filters = np.asarray(kernel).reshape(-1, 5).T
    expected = np.linalg.norm(filters[:, None] - filters[None], axis=-1).sum(axis=1)
    scores = pruning.geometric_median(flax_kernels({"k": kernel}), {"k": kernel})["k"]
    np.testing.assert_allclose(scores.sum((0, 1, 2)), expected, rtol=1e-5)


def test_equal_filters_have_no_distance():
    params = {"kernel": jnp.ones((3, 4))}
    scores = pruning.geometric_median(flax_kernels(params), params)
    np.testing.assert_array_equal(scores["kernel"], jnp.zeros((3, 4)))


def test_batchnorm_scale():
    params = {"kernel": FIRST, "norm": {"scale": jnp.array([-3.0, 1.0]), "bias": jnp.ones(2)}}
    scores = pruning.batchnorm_scale(params)
    np.testing.assert_array_equal(scores["norm"]["scale"], [3.0, 1.0])
    assert scores["kernel"] == scores["norm"]["bias"] == optax.MaskedNode()


def test_batchnorm_scale_names_a_wrong_pattern():
    with pytest.raises(ValueError, match="rule 'gamma' must match"):
        pruning.batchnorm_scale({"scale": jnp.ones(2)}, pattern="gamma")
    with pytest.raises(ValueError, match=r"floating vectors only, got float32\[2, 2\] at 'kernel'"):
        pruning.batchnorm_scale({"kernel": SECOND}, pattern="kernel")


@pytest.mark.parametrize("criterion", ALL.values(), ids=ALL)
def test_kernels_alone_are_scored(criterion):
    params = {
        "kernel": jnp.ones((2, 2), jnp.bfloat16),
        "bias": jnp.ones(2),
        "scalar": jnp.ones(()),
        "table": jnp.ones((2, 2), jnp.int32),
        "stacked variances": jnp.ones((3, 2)),
        "left out": optax.MaskedNode(),
    }
    kernels = {"kernel": flax_kernels(params)["kernel"]}
    scores = criterion(kernels, params)
    assert scores["kernel"].dtype == jnp.float32
    others = [scores[name] for name in params if name != "kernel"]
    assert others == [optax.MaskedNode()] * 5


@pytest.mark.parametrize("criterion", ALL.values(), ids=ALL)
def test_nothing_to_prune_is_an_error(criterion):
    params = {"bias": jnp.ones(3), "step": jnp.ones((), jnp.int32)}
    with pytest.raises(ValueError, match="kernels must hold a kernel to prune, got none"):
        criterion({}, params)
    with pytest.raises(ValueError, match="hold kernel 'Dense_0/kernel' to prune, got only: bias, "):
        criterion(NET_KERNELS, params)
    with pytest.raises(ValueError, match=r"must have shape \(3, 2\) at 'Dense_0/kernel', got \(2,"):
        criterion(NET_KERNELS, NET | {"Dense_0": NET["Dense_1"]})


@pytest.mark.parametrize("criterion", ALL.values(), ids=ALL)
def test_a_stack_of_experts_is_vmapped(criterion, key):
    stack = {"kernel": jax.random.normal(key, (3, 4, 5)), "bias": jnp.ones((3, 5))}
    one = jax.tree.map(lambda leaf: leaf[1], stack)
    criterion = functools.partial(criterion, flax_kernels(one))
    stacked, alone = jax.vmap(criterion)(stack)["kernel"], criterion(one)["kernel"]
    np.testing.assert_allclose(stacked[1], alone, rtol=1e-5)


@pytest.mark.parametrize("criterion", ALL.values(), ids=ALL)
def test_compiled_eager_and_abstract_agree(criterion):
    criterion = functools.partial(criterion, NET_KERNELS)
    eager, compiled = criterion(NET), jax.jit(criterion)(NET)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), eager, compiled)
    shapes = jax.eval_shape(criterion, NET)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), eager) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )


@pytest.mark.parametrize("name", [name for name in ALL if name != "random"])
def test_of_equal_weights_the_first_are_kept(name):
    params = {"kernel": jnp.ones((2, 4))}
    masks = pruning.masks(ALL[name](flax_kernels(params), params), 0.5)
    assert masks["kernel"].tolist() == [[True] * 4, [False] * 4]


@pytest.mark.parametrize("criterion", WITH_STATISTICS.values(), ids=WITH_STATISTICS)
def test_statistics_that_are_not_finite_reach_masks(criterion):
    broken = {**NET, "Dense_1": {**NET["Dense_1"], "kernel": SECOND.at[0, 1].set(jnp.nan)}}
    with pytest.raises(ValueError, match=r"scores must be finite, got .* NaN .* at 'Dense_"):
        pruning.masks(criterion(NET_KERNELS, NET, broken), 0.5)


@pytest.mark.parametrize("criterion", WITH_STATISTICS.values(), ids=WITH_STATISTICS)
def test_statistics_of_another_structure_are_named(criterion):
    with pytest.raises(ValueError, match=r"\w+ must have the paths of params, got 'Dense_1/bias'"):
        criterion(NET_KERNELS, NET, {**NET, "Dense_1": {"kernel": SECOND}})
    with pytest.raises(ValueError, match=r"must have shape \(3, 2\) at 'Dense_0/kernel', got \(2,"):
        criterion(NET_KERNELS, NET, {**NET, "Dense_0": NET["Dense_1"]})


@pytest.mark.parametrize("criterion", WITH_STATISTICS.values(), ids=WITH_STATISTICS)
def test_where_there_is_no_statistic_there_is_no_score(criterion):
    statistics = {**NET, "Dense_1": {"kernel": optax.MaskedNode(), "bias": optax.MaskedNode()}}
    scores = criterion(NET_KERNELS, NET, statistics)
    assert scores["Dense_1"]["kernel"] == optax.MaskedNode()
    assert scores["Dense_0"]["kernel"].shape == (3, 2)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="p must be an integer in"):
        pruning.magnitude(NET_KERNELS, NET, p=3)
    with pytest.raises(ValueError, match="examples must hold at least one example"):
        pruning.mean_squared_gradients(lambda p, x: jnp.sum(p["w"] * x), {"w": FIRST}, FIRST[:0])
    with pytest.raises(ValueError, match="accumulated must have the paths of params"):
        pruning.accumulate_movement({}, NET, NET)
    with pytest.raises(ValueError, match="gradients must have the paths of params"):
        pruning.accumulate_movement(NET, NET, {})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_mean_over_examples_is_of_float32(dtype):
    params, examples = {"w": jnp.ones((1, 1), dtype)}, jnp.ones((4096, 1, 1), dtype)
    squared = pruning.mean_squared_gradients(lambda p, x: jnp.sum(p["w"] * x), params, examples)
    # Of 4096 ones; in bfloat16 a sum of ones stops at 256, in float16 at 2048.
    assert squared["w"].tolist() == [[1.0]]
