import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax import quantization as q
from hybrid_jax.quantization import grids, schemes

SCHEMES = {name: scheme.grid for name, scheme in schemes.SCHEMES.items()}


def span(low, high):
    return q.Range(jnp.float32(low), jnp.float32(high))


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20),
    st.floats(-1e4, 1e4, width=32),
    st.floats(-1e4, 1e4, width=32),
    st.sampled_from(sorted(SCHEMES)),
    st.integers(2, 8),
    st.booleans(),
)
def test_idempotent_for_any_range(values, one, other, scheme, bits, rounded_up):
    grid = SCHEMES[scheme](span(min(one, other), max(one, other)), bits)
    grid = q.power_of_two(grid) if rounded_up else grid
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
        (0.0, 0.0, 2.0**-60, 0),  # always zero
        (0.0, -1e-4, 2.0**-60, 0),  # learned past zero
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
    # Signs have no zero: they are then half the least scale.
    np.testing.assert_allclose(q.fake_quant(x, grid)[:, 0], [0.0, 0.0], atol=2.0**-61)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("end", [1e-30, 0.0, -1e-4, -5.0])
def test_a_range_that_shrinks_past_zero_keeps_the_least_scale(scheme, end):
    grid = SCHEMES[scheme](span(-end, end), 8)
    assert float(grid.scale) == q.LEAST_SCALE
    largest = max(abs(float(n)) for n in grids.steps(grid)) * q.LEAST_SCALE
    assert np.all(np.abs(q.fake_quant(jnp.array([-3.0, 0.01, 1e30]), grid)) <= largest)


def test_bfloat16_keeps_its_dtype():
    x = jnp.array([0.3, 1.0], jnp.bfloat16)
    y = q.fake_quant(x, q.symmetric(span(-1.0, 1.0), 2))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32), [0.0, 1.0])
