import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import pruning

# x (3) -> hidden (2) -> outputs (2), no biases in the way of the arithmetic.
FIRST = jnp.array([[1.0, -2.0], [0.0, 2.0], [3.0, 0.5]])
SECOND = jnp.array([[-1.0, 4.0], [2.0, 1.0]])
NET = {
    "Dense_0": {"kernel": FIRST, "bias": jnp.array([9.0, 9.0])},
    "Dense_1": {"kernel": SECOND, "bias": jnp.array([9.0, 9.0])},
}
ALL = {
    "magnitude": lambda p: pruning.magnitude(p),
    "squared": lambda p: pruning.magnitude(p, p=2),
    "random": lambda p: pruning.random(p, jax.random.key(0)),
    "taylor": lambda p: pruning.taylor(p, p),
    "fisher": lambda p: pruning.fisher(p, p),
    "lamp": pruning.lamp,
    "geometric_median": pruning.geometric_median,
}


def check(scores, first, second):
    np.testing.assert_allclose(scores["Dense_0"]["kernel"], first, rtol=1e-6)
    np.testing.assert_allclose(scores["Dense_1"]["kernel"], second, rtol=1e-6)
    assert scores["Dense_0"]["bias"] == optax.MaskedNode()


def test_magnitude():
    check(pruning.magnitude(NET), [[1, 2], [0, 2], [3, 0.5]], [[1, 4], [2, 1]])
    check(pruning.magnitude(NET, p=2), [[1, 4], [0, 4], [9, 0.25]], [[1, 16], [4, 1]])


def test_taylor():
    def loss(params):
        # dL/dw = x_i · (row sums of the second kernel)_j = x_i · (3, 3) in the first layer,
        # and (x W1)_i in the second, x W1 = (1 + 3·3, −2 + 2·2 + 3·0.5) = (10, 3.5).
        x = jnp.array([[1.0, 2.0, 3.0]])
        return jnp.sum(x @ params["Dense_0"]["kernel"] @ params["Dense_1"]["kernel"])

    scores = pruning.taylor(NET, jax.grad(loss)(NET))
    check(scores, [[3, 6], [0, 12], [27, 4.5]], [[10, 40], [7, 3.5]])


def test_fisher_is_half_of_the_mean_square_per_example():
    def loss(params, x):
        return jnp.sum(x[None] @ params["Dense_0"]["kernel"]) + jnp.sum(params["Dense_1"]["kernel"])

    # Per example the gradient is x_i: squares 1, 4, 0 and 9, 0, 4, their means 5, 2, 2.
    squared = pruning.mean_squared_gradients(loss, NET, jnp.array([[1.0, 2.0, 0], [3.0, 0, 2.0]]))
    first = [[0.5 * 5 * 1, 0.5 * 5 * 4], [0, 0.5 * 2 * 4], [0.5 * 2 * 9, 0.5 * 2 * 0.25]]
    check(pruning.fisher(NET, squared), first, [[0.5, 8], [2, 0.5]])


def test_lamp():
    # Second layer: squares 1, 16, 4, 1; of the two equal ones the first is above.
    first = [[1 / 18, 4 / 13], [0, 4 / 17], [9 / 9, 0.25 / 18.25]]
    # First layer in falling order: 9, 4, 4, 1, 0.25, 0 with totals 9, 13, 17, 18, 18.25, 18.25.
    check(pruning.lamp(NET), first, [[1 / 21, 1], [4 / 20, 1 / 22]])


def test_geometric_median():
    # Filters of the first layer: (1, 0, 3) and (−2, 2, 0.5), apart by (3, −2, 2.5);
    # ‖·‖ = √(9 + 4 + 6.25). Each weight gets its square over that. Second: (−3 ,1)·: √10.
    d, e = 19.25**0.5, (5.0**2 + 1) ** 0.5
    check(
        pruning.geometric_median(NET),
        [[9 / d, 9 / d], [4 / d, 4 / d], [6.25 / d, 6.25 / d]],
        [[25 / e, 25 / e], [1 / e, 1 / e]],
    )


def test_geometric_median_sums_to_the_distances_of_convolution_filters(key):
    kernel = jax.random.normal(key, (3, 3, 2, 5))
    filters = np.asarray(kernel).reshape(-1, 5).T
    expected = np.linalg.norm(filters[:, None] - filters[None], axis=-1).sum(axis=1)
    scores = pruning.geometric_median({"kernel": kernel})["kernel"]
    np.testing.assert_allclose(scores.sum((0, 1, 2)), expected, rtol=1e-5)


def test_equal_filters_have_no_distance():
    scores = pruning.geometric_median({"kernel": jnp.ones((3, 4))})
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


def test_random_is_its_key():
    a, b = (pruning.random(NET, jax.random.key(seed)) for seed in (1, 2))
    again = pruning.random(NET, jax.random.key(1))
    kernel = "Dense_0"
    np.testing.assert_array_equal(a[kernel]["kernel"], again[kernel]["kernel"])
    assert not np.any(a[kernel]["kernel"] == b[kernel]["kernel"])


@pytest.mark.parametrize("criterion", ALL.values(), ids=ALL)
def test_only_floating_leaves_of_rank_two_are_scored(criterion):
    params = {
        "kernel": jnp.ones((2, 2), jnp.bfloat16),
        "bias": jnp.ones(2),
        "scalar": jnp.ones(()),
        "table": jnp.ones((2, 2), jnp.int32),
        "left out": optax.MaskedNode(),
    }
    scores = criterion(params)
    assert scores["kernel"].dtype == jnp.float32
    others = [scores[name] for name in ("bias", "scalar", "table", "left out")]
    assert others == [optax.MaskedNode()] * 4


@pytest.mark.parametrize("criterion", ALL.values(), ids=ALL)
def test_nothing_to_prune_is_an_error(criterion):
    with pytest.raises(ValueError, match="rank 2 or more to prune, got only: bias, step"):
        criterion({"bias": jnp.ones(3), "step": jnp.ones((), jnp.int32)})


@pytest.mark.parametrize("criterion", ALL.values(), ids=ALL)
def test_a_stack_of_experts_is_vmapped(criterion, key):
    stack = {"kernel": jax.random.normal(key, (3, 4, 5)), "bias": jnp.ones((3, 5))}
    stacked = jax.vmap(criterion)(stack)["kernel"]
    alone = criterion(jax.tree.map(lambda leaf: leaf[1], stack))["kernel"]
    np.testing.assert_allclose(stacked[1], alone, rtol=1e-5)


def test_gradients_of_another_structure_are_named():
    with pytest.raises(ValueError, match="gradients must have float32"):
        pruning.taylor(NET, {**NET, "Dense_1": {"kernel": SECOND}})
    with pytest.raises(ValueError, match="p must be an integer in"):
        pruning.magnitude(NET, p=3)
