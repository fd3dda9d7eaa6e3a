import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import experts

GATES = [experts.gate_cnn, experts.gate_linear]


@pytest.mark.parametrize("make", GATES)
@pytest.mark.parametrize("shape", [(2, 32, 32, 3), (1, 8, 8, 1), (3, 28, 20, 3), (1, 5, 5, 1)])
def test_any_image_size(make, shape, key):
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    logits, _ = jax.eval_shape(make(4).init_with_output, key, images)
    assert logits.shape == (shape[0], 4)


@pytest.mark.parametrize("make", GATES)
def test_sees_the_image_averaged_down(make, key):
    # 16x16 at size 8: each 2x2 block counts by its mean alone.
    gate = make(3, size=8)
    small = jax.random.normal(key, (2, 8, 8, 1))
    large = small.repeat(2, 1).repeat(2, 2)
    ripple = jnp.tile(jnp.array([[1.0, -1.0], [-1.0, 1.0]])[None, :, :, None], (2, 8, 8, 1))
    apply = jax.jit(gate.apply)
    params = jax.jit(gate.init)(key, large)
    want = apply(params, small)
    np.testing.assert_allclose(apply(params, large), want, atol=1e-5)
    np.testing.assert_allclose(apply(params, large + ripple), want, atol=1e-5)
    assert float(jnp.abs(want[0] - want[1]).max()) > 1e-3


@pytest.mark.parametrize("make", GATES)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="num_experts must be an integer of at least 1, got 0"):
        make(0)
    with pytest.raises(ValueError, match="size must be an integer of at least 1, got 0"):
        make(2, size=0)


def test_bad_features():
    with pytest.raises(ValueError, match="features must be an integer of at least 1, got 0"):
        experts.gate_cnn(2, features=(8, 0))
