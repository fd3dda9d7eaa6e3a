import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax import quantization as q

# Written out by hand: signed narrow is ±(2^(b−1) − 1), unsigned is 0 to 2^b − 1.
BOUNDS = {
    2: ((-1, 1), (0, 3)),
    3: ((-3, 3), (0, 7)),
    4: ((-7, 7), (0, 15)),
    5: ((-15, 15), (0, 31)),
    6: ((-31, 31), (0, 63)),
    7: ((-63, 63), (0, 127)),
    8: ((-127, 127), (0, 255)),
}
SCHEMES = {"symmetric": q.symmetric, "affine": q.affine}


def span(low, high):
    return q.Range(jnp.float32(low), jnp.float32(high))


@pytest.mark.parametrize("bits", BOUNDS)
@pytest.mark.parametrize("traced", [False, True])
def test_integer_bounds(bits, traced):
    for scheme, expected in zip((q.symmetric, q.affine), BOUNDS[bits], strict=True):
        make = jax.jit(scheme) if traced else scheme
        grid = make(span(-1.0, 1.0), jnp.int32(bits) if traced else bits)
        assert (int(grid.low), int(grid.high)) == expected


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(), (1, 1, 4), (3, 1, 4)], ids=["tensor", "channel", "group"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_contract(scheme, shape, bits):
    """Law 4: idempotent, representable, integers give back the same, zero stays zero."""
    x = jax.random.normal(jax.random.key(bits), (3, 5, 4)).at[0, 0].set(0.0)
    axes = tuple(i for i, n in enumerate(shape) if n == 1)
    grid = SCHEMES[scheme](q.extent(x, axes if shape else None), bits)
    assert grid.scale.shape == shape
    once = q.fake_quant(x, grid)
    integers = q.quantize(x, grid)
    np.testing.assert_array_equal(q.fake_quant(once, grid), once)
    np.testing.assert_array_equal(q.dequantize(integers, grid), once)
    np.testing.assert_array_equal(q.quantize(once, grid), integers)
    low, high = BOUNDS[bits][scheme == "affine"]
    assert integers.dtype == jnp.int32
    assert low <= integers.min()
    assert integers.max() <= high
    assert len(np.unique(integers)) <= high - low + 1
    assert not np.any(once[0, 0])
    # Nothing within the range is off by more than half a step; at the ends of the affine grid,
    # whose zero point is rounded, by half a step more.
    error = np.abs(once - x) / np.asarray(grid.scale)
    assert error.max() <= (0.5 if scheme == "symmetric" else 1) + 1e-4


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20),
    st.floats(-1e4, 1e4, width=32),
    st.floats(-1e4, 1e4, width=32),
    st.sampled_from(sorted(SCHEMES)),
    st.integers(2, 8),
)
@settings(deadline=None)
def test_idempotent_for_any_range(values, one, other, scheme, bits):
    grid = SCHEMES[scheme](span(min(one, other), max(one, other)), bits)
    x = jnp.array(values, jnp.float32)
    once = q.fake_quant(x, grid)
    np.testing.assert_array_equal(q.fake_quant(once, grid), once)
    np.testing.assert_array_equal(q.dequantize(q.quantize(x, grid), grid), once)
    assert np.all(np.isfinite(once))


def test_rounds_half_to_even_with_an_odd_zero_point():
    # Range [−1, 14] at 4 bits: scale 1, zero point 1. Halves go to the even number of steps from
    # zero, whatever the zero point: 0.5 → 0, 1.5 → 2, 2.5 → 2, −0.5 → 0.
    grid = q.affine(span(-1.0, 14.0), 4)
    assert (float(grid.scale), int(grid.zero_point)) == (1.0, 1)
    x = jnp.array([0.5, 1.5, 2.5, -0.5])
    np.testing.assert_array_equal(q.fake_quant(x, grid), [0.0, 2.0, 2.0, 0.0])
    np.testing.assert_array_equal(q.quantize(x, grid), [1, 3, 3, 1])


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [
        (0.0, 25.5, 0.1, 0),  # no negative value: unsigned
        (3.0, 25.5, 0.1, 0),  # widened to hold zero
        (-5.1, 20.4, 0.1, 51),  # 5.1 / 0.1
        (-25.5, -1.0, 0.1, 255),  # no positive value
        (0.0, 0.0, 1.0, 0),  # always zero
    ],
)
def test_affine_by_hand(low, high, scale, zero_point):
    grid = q.affine(span(low, high), 8)
    np.testing.assert_allclose(grid.scale, scale, rtol=1e-6)
    assert int(grid.zero_point) == zero_point


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("high", [0.0, 1e-45, 1e-38])
def test_dead_channel_is_finite(scheme, high):
    grid = SCHEMES[scheme](q.Range(jnp.zeros((1, 2)), jnp.array([[high, 1.0]])), 8)
    x = jnp.array([[0.0, 0.5], [0.0, 1.0]])
    value, gradient = jax.value_and_grad(lambda x: q.fake_quant(x, grid).sum())(x)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(q.fake_quant(x, grid)[:, 0], [0.0, 0.0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_of_different_bits_equal_separate_calls(scheme):
    x = jax.random.normal(jax.random.key(0), (7, 5, 3))
    bits = jnp.arange(2, 9)

    def one(x, bits):
        return q.fake_quant(x, SCHEMES[scheme](q.extent(x, (0,)), bits))

    together = jax.vmap(one)(x, bits)
    for i in range(7):
        np.testing.assert_array_equal(together[i], one(x[i], i + 2))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_compilation_for_all_bits(scheme):
    f = jax.jit(lambda x, bits: q.fake_quant(x, SCHEMES[scheme](q.extent(x), bits)))
    x = jnp.linspace(-1.0, 1.0, 50)
    distinct = [len(np.unique(f(x, jnp.int32(bits)))) for bits in range(2, 6)]
    assert distinct == sorted(set(distinct))
    assert f._cache_size() == 1


def test_bfloat16_keeps_its_dtype():
    x = jnp.array([0.3, 1.0], jnp.bfloat16)
    y = q.fake_quant(x, q.symmetric(span(-1.0, 1.0), 2))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32), [0.0, 1.0])
