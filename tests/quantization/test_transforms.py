"""Ranges under an optimizer."""

import hypothesis
import jax
import jax.numpy as jnp
import optax
from hypothesis import strategies as st

from hybrid_jax import quantization
from hybrid_jax.quantization import Range


@hypothesis.given(
    st.lists(st.tuples(st.floats(-1, 1, width=32), st.floats(-1, 1, width=32)), max_size=30),
    st.floats(2.0**-20, 2.0**10, width=32),
)
def test_low_stays_below_high_whatever_adam_is_told(gradients, width):
    params = {"w": Range(jnp.float32(-width), jnp.float32(0.0)), "kernel": jnp.float32(1.0)}
    tx = optax.chain(
        optax.scale_by_adam(), quantization.scale_by_width(), optax.scale_by_learning_rate(0.02)
    )
    state = tx.init(params)
    for low, high in gradients:
        own = {"w": Range(jnp.float32(low), jnp.float32(high)), "kernel": jnp.float32(low)}
        with jax.numpy_dtype_promotion("standard"):  # as Adam's bias correction needs it
            updates, state = tx.update(own, state, params)
        params = optax.apply_updates(params, updates)
        assert params["w"].low < params["w"].high


def test_other_parameters_pass():
    tx = quantization.scale_by_width()
    params = {"kernel": jnp.ones(3), "range": Range(jnp.zeros(2), jnp.array([2.0, 0.0]))}
    updates = {"kernel": jnp.ones(3), "range": Range(jnp.ones(2), -jnp.ones(2))}
    scaled, _ = tx.update(updates, tx.init(params), params)
    assert scaled["kernel"].tolist() == [1, 1, 1]
    assert scaled["range"].low.tolist() == [2, 0]
    assert scaled["range"].high.tolist() == [-2, 0]
