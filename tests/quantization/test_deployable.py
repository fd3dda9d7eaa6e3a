"""Specifications of which every tensor is rounded as a device stores it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import core
from hybrid_jax import quantization as q

STEPS_OF_1 = q.Range(jnp.float32(0), jnp.float32(255))
STEPS_OF_TENTH = q.Range(jnp.float32(0), jnp.float32(25.5))


def residual(params, x):
    return x @ params["w"] + x


PARAMS, X = {"w": jnp.array([[0.7, 0.0], [0.0, 0.7]])}, jnp.array([[1.2, 2.0]])
RANGES = {
    "w": {"activation": STEPS_OF_1},
    "w/add/0": {"activation": STEPS_OF_1},
    "input/add/1": {"activation": STEPS_OF_TENTH},
}


def spec_of(fn, params, x, **options):
    graph = core.trace(fn, params, x)
    return q.spec(graph, weight_bits=32, first_last_bits=2, deployable=True, **options)


def test_what_meets_in_a_sum_is_rounded():
    spec = spec_of(residual, PARAMS, X)
    assert [(own.name, own.shares) for own in spec.joins] == [
        ("w/add/0", None),
        ("input/add/1", "w"),
    ]
    # x → [1, 2], both at the site and in the sum; [0.7, 1.4] → [1, 1]; [1, 1] + [1, 2] = [2, 3].
    y = q.fake_quantized(residual, spec)(PARAMS, RANGES, X)
    np.testing.assert_array_equal(y, [[2, 3]])


def test_a_tensor_of_fewer_bits_at_its_site_has_its_own_range_in_the_sum():
    spec = spec_of(residual, PARAMS, X, rules=[("w", {"activation": 4, "weight": 32})])
    # At the site in steps of 255 / 15 = 17: 0. In the sum in steps of 0.1.
    q_fn = q.fake_quantized(residual, spec)
    np.testing.assert_allclose(q_fn(PARAMS, RANGES, X), [[1.2, 2.0]], rtol=1e-6)
    bits = {"w": {"weight": 32, "activation": jnp.int32(8)}}
    np.testing.assert_array_equal(q_fn(PARAMS, RANGES, X, bits=bits), [[2, 3]])


def test_a_tensor_that_two_sites_take_has_one_range():
    def fn(params, x):
        return (x @ params["a"]) @ params["b"] - x @ params["c"]

    params = dict.fromkeys("abc", PARAMS["w"])
    spec = spec_of(fn, params, X)
    assert [site.shares for site in spec.sites] == [None, None, "a"]
    wide = {name: {"activation": STEPS_OF_1} for name in (*"ab", "b/add/0", "c/add/1")}
    ranges = wide | {"c": {"activation": STEPS_OF_TENTH}}
    # x → [1, 2] for a and for c. a: [0.7, 1.4] → [1, 1]; b: [0.7, 0.7] → [1, 1]; c: [1, 1].
    np.testing.assert_array_equal(q.fake_quantized(fn, spec)(params, ranges, X), [[0, 0]])
    apart = spec_of(fn, params, X, rules=[("c", {"weight": 32, "activation": 4})])
    assert apart["c"].shares is None


def test_sites_of_another_grid_share_nothing():
    for own in (q.Quantizer(8, "symmetric"), q.Quantizer(8, "affine", learning="dynamic")):
        spec = spec_of(residual, PARAMS, X, rules=[("w", {"activation": own})])
        assert spec["input/add/1"].shares is None


def test_ranges_are_calibrated(digits):
    graph = core.trace(digits.fn, digits.params, digits.images[:2])
    spec = q.spec(graph, deployable=True)
    images = digits.images[:128]
    ranges = q.calibrate(digits.fn, digits.params, [(images[:64],), (images[64:],)], spec)
    assert list(ranges) == [own.name for own in (*spec.sites, *spec.joins)]

    def extent(join, x):
        return x, (x.min(), x.max())

    def plain(site, x, kernel, apply):
        return apply(x, kernel), None

    seen = core.at_sites(digits.fn, plain, extent)(digits.params, images)[1]
    assert len(seen) == 3  # two operands and a mean
    for name, ends in seen.items():
        np.testing.assert_allclose(ranges[name]["activation"], ends, rtol=1e-5)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), digits.params)
    stacked = q.calibrate(digits.fn, stack, [(images,)], spec, "mse", stacked=True)
    assert stacked[spec.joins[0].name]["activation"].high.shape == (2,)


def test_joins_learn_and_nothing_else_changes(digits):
    graph = core.trace(digits.fn, digits.params, digits.images[:2])
    floats, whole = q.spec(graph), q.spec(graph, deployable=True)
    assert dataclasses.replace(whole, joins=(), biases=False) == floats
    images = digits.images[:64]
    ranges = q.calibrate(digits.fn, digits.params, [(images,)], whole)
    # Ranges that cut off half, so that LSQ has a gradient towards more.
    halved = ranges | {
        own.name: jax.tree.map(lambda end: end / 2, ranges[own.name]) for own in whole.joins
    }

    def loss(ranges):
        q_fn = q.fake_quantized(digits.fn, whole)
        return jnp.square(q_fn(digits.params, ranges, images)).mean()

    gradients = jax.jit(jax.grad(loss))(halved)
    for own in whole.joins:
        if own.shares is None:
            assert gradients[own.name]["activation"].high != 0
    only = {site.name: ranges[site.name] for site in whole.sites}
    with pytest.raises(ValueError, match=r"ranges must have \['.*add/0'\]\['activation'\], got "):
        q.fake_quantized(digits.fn, whole)(digits.params, only, images)
    narrower = dataclasses.replace(whole, joins=whole.joins[1:])
    with pytest.raises(ValueError, match=r"spec must cover every site, got none for '.*add/0'"):
        q.fake_quantized(digits.fn, narrower)(digits.params, ranges, images)


def test_bits_that_are_learned_round_joins_too():
    spec = spec_of(residual, PARAMS, X)
    channels = jax.tree.map(lambda end: jnp.full((1, 2), end), STEPS_OF_1)
    ranges = RANGES | {"w": {"activation": STEPS_OF_1, "weight": channels}}
    bits = {"w": {"weight": 8.0, "activation": 8.0}}
    # Weights of 0.7 in steps of 255 / 127 become 0: what is left is x → [1, 2].
    y = q.fractional(residual, spec)(PARAMS, ranges, bits, X)
    np.testing.assert_array_equal(y, [[1, 2]])


def test_sites_that_are_hidden_and_steps_that_return_nothing():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(
        lambda x, w: (product(x, w), (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g)
    )

    def fn(params, x):
        jax.debug.callback(lambda: None)
        return product(x, params["a"]) + x @ params["b"]

    params = dict.fromkeys("ab", PARAMS["w"])
    spec = spec_of(fn, params, X)
    assert [site.shares for site in spec.sites] == [None, None]
    ranges = q.calibrate(fn, params, [(X,)], spec)
    assert {own.name for own in spec.joins} < set(ranges)
    y = q.fake_quantized(fn, spec)(params, ranges, X)
    np.testing.assert_allclose(y, fn(params, X), atol=0.03)


def affine(params, x):
    return x @ params["w"] * params["scale"] + params["bias"]


# Of 8 bits: steps of 1 (inputs) times 1/2 (kernel) times the scales 4, −1, 0.
AFFINE = {
    "w": jnp.eye(3),
    "scale": jnp.array([[4.0, -1.0, 0.0]]),
    "bias": jnp.array([[3.1, 0.7, 0.3]]),
}
HALVES = {"w": {"activation": STEPS_OF_1, "weight": q.Range(*jnp.float32([[-1], [1]]) * 63.5)}}


def biases(spec, ranges, bits=None):
    nothing = jnp.zeros((1, 3))
    return q.fake_quantized(affine, spec)(AFFINE, ranges, nothing, bits=bits)[0]


def of_bits(weight, activation=8):
    graph = core.trace(affine, AFFINE, jnp.zeros((1, 3)))
    rule = {"weight": q.Quantizer(weight), "activation": activation}
    return q.spec(graph, [("w", rule)], deployable=True)


def per_tensor(ranges):
    return {"w": ranges["w"] | {"weight": q.Range(*(end[0] for end in ranges["w"]["weight"]))}}


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ((8, 8), [4, 0.5, 0.3]),
        # At 3 bits the kernel's step is 63.5 / 3, in 16ths of which its bias is rounded: 1.3229167.
        ((3, 8), [4 * 1.3229167, 1.3229167, 0.3]),
        ((8, 4), [0, 0, 0.3]),  # steps of 17 · 2 and 17 / 2
        ((32, 8), [3.1, 0.7, 0.3]),
        ((8, 32), [3.1, 0.7, 0.3]),
    ],
)
def test_biases_are_rounded_to_steps_of_the_sums(bits, expected):
    ranges = per_tensor(HALVES)
    np.testing.assert_allclose(biases(of_bits(*bits), ranges), expected, rtol=1e-6)
    widths = {"w": dict(zip(("weight", "activation"), map(jnp.int32, bits)))}
    traced = jax.jit(lambda widths: biases(of_bits(8), ranges, widths))(widths)
    np.testing.assert_allclose(traced, expected, rtol=1e-6)
    floats = dataclasses.replace(of_bits(*bits), biases=False)
    np.testing.assert_allclose(biases(floats, ranges), [3.1, 0.7, 0.3], rtol=1e-6)


def test_the_biases_of_channels_and_of_signs():
    graph = core.trace(affine, AFFINE, jnp.zeros((1, 3)))
    ends = jnp.array([[63.5, 127.0, 127.0]])  # steps of 1/2 and 1
    ranges = {"w": {"activation": STEPS_OF_1, "weight": q.Range(-ends, ends)}}
    spec = q.spec(graph, deployable=True)
    np.testing.assert_allclose(biases(spec, ranges), [4, 1, 0.3], rtol=1e-6)
    signs = q.Quantizer(1, "binary", per_channel=True, learning="fixed")
    spec = q.spec(graph, [("w", {"weight": signs})], deployable=True)
    ends = jnp.full((1, 3), 32.0)  # −32 and 32 are stored as they are
    ranges = {"w": {"activation": STEPS_OF_1, "weight": q.Range(-ends, ends)}}
    np.testing.assert_allclose(biases(spec, ranges), [4, 1, 0.3], rtol=1e-6)


def test_the_gradient_of_a_rounded_bias_is_that_of_the_bias():
    def loss(params, spec):
        q_fn = q.fake_quantized(affine, spec)
        return q_fn(params, per_tensor(HALVES), X3).sum()

    X3 = jnp.array([[1.0, 2.0, 3.0]])
    whole = of_bits(8)
    got = jax.grad(loss)(AFFINE, whole)
    expected = jax.grad(loss)(AFFINE, dataclasses.replace(whole, biases=False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)


def test_without_known_steps_biases_stay():
    graph = core.trace(affine, AFFINE, jnp.zeros((1, 3)))
    for rule in (
        {"weight": q.Quantizer(4, per_channel=True, learning="dynamic")},
        {"activation": q.Quantizer(8, "affine", learning="dynamic")},
        {"weight": q.Quantizer(4, per_channel=True, group=3)},
    ):
        spec = q.spec(graph, [("w", rule)], deployable=True)
        ranges = q.calibrate(affine, AFFINE, [(jnp.ones((2, 3)),)], spec)
        np.testing.assert_array_equal(biases(spec, ranges), AFFINE["bias"][0])


def test_the_bias_after_a_join_is_rounded_to_what_its_one_weight_leaves():
    def fn(params, x):
        total = x + x * x  # of steps of 1, each
        return jax.nn.relu((x + 1.0) * 254.0), total

    graph = core.trace(fn, {"w": jnp.ones(())}, jnp.ones((1, 2)))
    names = [join.name for join in graph.joins]
    ranges = {name: {"activation": STEPS_OF_1} for name in names}
    spec = q.spec(graph, deployable=True)
    # 254 in steps of 1 · 254 / 127 = 2; with steps of a tenth, 1.3 · 254 = 330.2 in 0.2.
    y, _ = q.fake_quantized(fn, spec)({"w": jnp.ones(())}, ranges, jnp.array([[3.2, 0.0]]))
    np.testing.assert_array_equal(y, [[4 * 254, 254]])
