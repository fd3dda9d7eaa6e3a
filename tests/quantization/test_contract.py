"""Law 4 over every scheme, granularity, bit-width and way to round the scale."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hybrid_jax import quantization as q
from hybrid_jax.quantization import observers
from hybrid_jax.quantization.schemes import SCHEMES

# Written out by hand: signed narrow is ±(2^(b−1) − 1), unsigned is 0 to 2^b − 1.
BOUNDS = {
    "symmetric": {
        2: (-1, 1), 3: (-3, 3), 4: (-7, 7), 5: (-15, 15), 6: (-31, 31), 7: (-63, 63),
        8: (-127, 127),
    },
    "affine": {
        1: (0, 1), 2: (0, 3), 3: (0, 7), 4: (0, 15), 5: (0, 31), 6: (0, 63), 7: (0, 127),
        8: (0, 255),
    },
    "binary": {1: (0, 1)},
    "e4m3": {8: (-448, 448)},
    "e5m2": {8: (-57344, 57344)},
}  # fmt: skip
# Of a kernel (6, 10, 4): one range, one for each channel, one for each 5 along its second axis.
SHAPES = {"tensor": (), "channel": (1, 1, 4), "group": (6, 2, 4)}
CASES = [(scheme, bits) for scheme, table in BOUNDS.items() for bits in table]


def nearest(scheme, v):
    """Rounding of steps from zero, as NumPy has it; floats as if they had no largest one."""
    if scheme == "binary":
        return np.floor(v) + 0.5
    if scheme in ("symmetric", "affine"):
        return np.round(v)
    # What overflows is brought into range by a power of two, which moves no mantissa.
    code = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[scheme]
    shift = np.where(np.abs(v) > BOUNDS[scheme][8][1] / 4, np.float32(1 / 16), np.float32(1))
    return (v * shift).astype(code).astype(np.float32) / shift


def kernel_and_grid(scheme, bits, shape, rounded_up):
    x = jax.random.normal(jax.random.key(bits), (6, 10, 4)).at[0, 0].set(0.0)
    quantizer = q.Quantizer(bits, scheme, learning="fixed", power_of_two=rounded_up)
    watch = q.minmax()
    low, high = observers.conclude(watch, observers.observe(watch, x, shape), shape, None, bits)
    # Narrower than the values, so that some are clipped.
    return x, quantizer.grid(q.Range(0.6 * low, 0.7 * high))


def repeated(value, shape, n=5):
    return np.repeat(np.asarray(value), n, 1) if shape == SHAPES["group"] else np.asarray(value)


@pytest.mark.parametrize("rounded_up", [False, True], ids=["scale", "power_of_two"])
@pytest.mark.parametrize("granularity", SHAPES)
@pytest.mark.parametrize(("scheme", "bits"), CASES)
def test_contract(scheme, bits, granularity, rounded_up):
    shape = SHAPES[granularity]
    x, grid = kernel_and_grid(scheme, bits, shape, rounded_up)
    assert grid.scale.shape == shape
    assert (float(grid.low), float(grid.high)) == BOUNDS[scheme][bits]
    once, stored = q.fake_quant(x, grid), q.quantize(x, grid)
    # Idempotent, and what is stored gives back the same to the bit.
    np.testing.assert_array_equal(q.fake_quant(once, grid), once)
    np.testing.assert_array_equal(q.quantize(once, grid), stored)
    np.testing.assert_array_equal(q.dequantize(stored, grid), once)
    # There are no more values than the bits can tell apart.
    numbers = np.asarray(stored, np.float32)
    low, high = BOUNDS[scheme][bits]
    assert low <= numbers.min()
    assert numbers.max() <= high
    assert len(np.unique(numbers)) <= 2**bits
    # The values are the nearest ones, clipped, and zero is one of them but for signs.
    scale, zero_point = (repeated(a, shape) for a in (grid.scale, grid.zero_point))
    v = np.asarray(x) / scale
    n, p = (np.float32(end - zero_point) for end in (low, high))
    np.testing.assert_array_equal(once, np.clip(nearest(scheme, v), n, p) * scale)
    zero = scale / 2 if scheme == "binary" else np.float32(0)
    np.testing.assert_array_equal(once[0, 0], np.broadcast_to(zero, x.shape)[0, 0])
    if rounded_up:
        assert np.all(np.frexp(scale)[0] == 0.5)
        _, plain = kernel_and_grid(scheme, bits, shape, False)
        ratio = np.asarray(grid.scale / plain.scale)
        assert np.all(ratio >= 1)
        assert np.all(ratio < 2)
        np.testing.assert_array_equal(grid.zero_point, plain.zero_point)


@pytest.mark.parametrize("rounded_up", [False, True], ids=["scale", "power_of_two"])
@pytest.mark.parametrize("granularity", SHAPES)
@pytest.mark.parametrize(("scheme", "bits"), CASES)
def test_gradients_are_the_formulas(scheme, bits, granularity, rounded_up):
    shape = SHAPES[granularity]
    x, grid = kernel_and_grid(scheme, bits, shape, rounded_up)
    weights = jax.random.normal(jax.random.key(9), x.shape)
    scale, zero_point = (repeated(a, shape) for a in (grid.scale, grid.zero_point))
    v = np.asarray(x) / scale
    n, p = (np.float32(end - zero_point) for end in BOUNDS[scheme][bits])
    rounded = nearest(scheme, v)

    straight = jax.grad(lambda x: jnp.sum(weights * q.fake_quant(x, grid)))(x)
    np.testing.assert_array_equal(straight, np.where((n <= rounded) & (rounded <= p), weights, 0))

    count = 60
    by_x, by_scale = jax.grad(
        lambda x, scale: jnp.sum(weights * q.lsq(x, grid._replace(scale=scale), count)), (0, 1)
    )(x, grid.scale)
    inside = (n < v) & (v < p)
    np.testing.assert_array_equal(by_x, np.where(inside, weights, 0))
    slope = np.where(inside, np.clip(rounded, n, p) - v, np.where(v <= n, n, p))
    each = np.asarray(weights) * slope / np.sqrt(count * np.maximum(p, -n))
    if shape == ():
        expected = each.sum()
    elif shape == (1, 1, 4):
        expected = each.sum((0, 1), keepdims=True)
    else:
        expected = each.reshape(6, 2, 5, 4).sum(2)
    np.testing.assert_allclose(by_scale, expected, rtol=2e-4, atol=2e-4 * p.max())


def test_every_scheme_is_in_the_truth_table():
    assert set(BOUNDS) == set(SCHEMES)
    for scheme, table in BOUNDS.items():
        assert tuple(table) == tuple(SCHEMES[scheme].bits)


@pytest.mark.parametrize("granularity", SHAPES)
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_experts_of_different_bits_equal_separate_calls(scheme, granularity):
    """One compilation serves all bits, as a value and as a row for each expert."""
    shape, widths = SHAPES[granularity], list(BOUNDS[scheme])
    x = jax.random.normal(jax.random.key(0), (len(widths), 6, 10, 4))
    quantizer = q.Quantizer(8, scheme, learning="fixed")

    def one(x, bits):
        return q.fake_quant(x, quantizer.grid(quantizer.range_of(x, shape), bits))

    together, alone = jax.jit(jax.vmap(one))(x, jnp.array(widths)), jax.jit(one)
    for i, bits in enumerate(widths):
        np.testing.assert_array_equal(together[i], alone(x[i], jnp.int32(bits)))
        fixed = q.fake_quant(x[i], quantizer.grid(quantizer.range_of(x[i], shape), bits))
        np.testing.assert_array_equal(together[i], fixed)
    assert alone._cache_size() == 1


@pytest.mark.parametrize("scheme", ["e4m3", "e5m2"])
def test_floats_round_as_the_conversion_does(scheme):
    """All values of the code, all middles between two (ties to even), and random ones."""
    code = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[scheme]
    values = np.arange(256, dtype=np.uint8).view(code).astype(np.float32)
    values = np.unique(values[np.isfinite(values)])
    largest = BOUNDS[scheme][8][1]
    between = (values[1:] + values[:-1]) / 2
    rng = np.random.default_rng(0)
    spread = np.float32(rng.normal(size=2000) * 2.0 ** rng.uniform(-20, 8, 2000))
    v = np.concatenate([values, between, np.clip(spread, -largest, largest)])
    grid = SCHEMES[scheme].grid(q.Range(jnp.float32(-largest), jnp.float32(largest)), 8)
    assert float(grid.scale) == 1.0
    expected = v.astype(code)
    np.testing.assert_array_equal(q.fake_quant(jnp.asarray(v), grid), expected.astype(np.float32))
    jitted = jax.jit(q.fake_quant)(jnp.asarray(v), grid)
    np.testing.assert_array_equal(jitted, expected.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(q.quantize(jnp.asarray(v), grid)), expected)


def test_binary_by_hand():
    # Range ±1.5: values ±1.5. Zero counts as positive. The gradient passes up to twice as far.
    grid = q.binary(q.Range(jnp.float32(-1.5), jnp.float32(1.5)))
    x = jnp.array([-4.0, -2.9, -1e-30, 0.0, 0.2, 2.9, 3.1])
    np.testing.assert_array_equal(q.fake_quant(x, grid), [-1.5, -1.5, -1.5, 1.5, 1.5, 1.5, 1.5])
    np.testing.assert_array_equal(q.quantize(x, grid).astype(jnp.uint8), [0, 0, 0, 1, 1, 1, 1])
    gradient = jax.grad(lambda x: q.fake_quant(x, grid).sum())(x)
    np.testing.assert_array_equal(gradient, [0, 1, 1, 1, 1, 1, 0])


def test_power_of_two_by_hand():
    # 0.25 is one already; 0.26 becomes 0.5; 3 becomes 4.
    scales = jnp.array([0.25, 0.26, 3.0])
    grid = q.symmetric(q.Range(-7 * scales, 7 * scales), 4)
    np.testing.assert_allclose(grid.scale, scales, rtol=1e-6)
    grid = grid._replace(scale=scales)
    np.testing.assert_array_equal(q.power_of_two(grid).scale, [0.25, 0.5, 4.0])
    passed = jax.jacrev(lambda s: q.power_of_two(grid._replace(scale=s)).scale)(scales)
    np.testing.assert_array_equal(passed, np.eye(3))


@pytest.mark.parametrize(("scheme", "bits"), [c for c in CASES if c[1] in (1, 3, 8)])
def test_stochastic_rounding_is_unbiased(scheme, bits):
    draws = 4000
    grid = SCHEMES[scheme].grid(q.Range(jnp.float32(-1.0), jnp.float32(1.0)), bits)
    n, p = (float(end) for end in q.grids.steps(grid))
    v = np.linspace(n, p, 23, dtype=np.float32)
    if bits == 8 and scheme in ("e4m3", "e5m2"):
        v = np.float32([n, -20.3, -1.1, -2e-3, 0.0, 3e-6, 0.7, 17.0, p])
    x = jnp.asarray(v) * grid.scale
    keys = jax.random.split(jax.random.key(0), draws)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: q.fake_quant(x, grid, key)))(keys))
    steps = drawn / np.asarray(grid.scale)
    for i in range(len(v)):
        two = np.unique(steps[:, i])
        assert len(two) <= 2
        width = two[-1] - two[0]
        # Five standard deviations of the mean of draws from two values, width/2 at the most.
        assert abs(steps[:, i].mean() - v[i]) <= 5 * width / 2 / np.sqrt(draws) + 1e-4 * abs(v[i])
    if scheme != "binary":
        assert not np.any(drawn[:, v == 0])
    assert any(len(np.unique(column)) == 2 for column in steps.T)
    # Its gradient is that of the numbers drawn.
    slope = jax.grad(lambda x: q.fake_quant(x, grid, keys[0]).sum())(x)
    np.testing.assert_array_equal(slope[1:-1], np.ones(len(v) - 2))
