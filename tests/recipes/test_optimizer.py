"""Optimizers of the recipes: values by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax.quantization import grids
from hybrid_jax.recipes import optimizer

RATE, DECAY, STEPS = 0.5, 0.25, 20  # of which 2 warm up: rates 0, 0.25, 0.5, …


def params():
    span = grids.Range(jnp.float32(-1.0), jnp.float32(3.0))
    return {
        "params": {"w": jnp.ones((1, 2)), "b": jnp.ones(2)},
        "ranges": {"w": {"activation": span}},
    }


def after(tx, gradients, steps):
    """Parameters after so many steps of these gradients."""
    own = params()
    opt_state = tx.init(own)
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        for _ in range(steps):
            updates, opt_state = jax.jit(tx.update)(gradients, opt_state, own)
            own = optax.apply_updates(own, updates)
    return own


def filled(value):
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), params())


def test_momentum_of_nesterov_by_hand():
    # Gradient 2: momentum 2, 3.8; Nesterov's direction 2 + 0.9 · momentum = 3.8, 5.42. The first
    # rate is 0, the second 0.25: 1 − 0.25 · 5.42 = −0.355, and of kernels 0.25 · 0.25 less.
    tx = optimizer.optimizer(RATE, DECAY, STEPS, direction="sgd")
    found = after(tx, filled(2.0), 2)
    np.testing.assert_allclose(found["params"]["b"], [-0.355] * 2, rtol=1e-5)
    np.testing.assert_allclose(found["params"]["w"], [[-0.4175] * 2], rtol=1e-5)


def test_ranges_move_as_adam_does_at_a_fiftieth_of_the_rate():
    # Adam's direction is 1, of a width of 4, at 0.25 · 0.02.
    found = after(optimizer.optimizer(RATE, 0.0, STEPS, direction="sgd"), filled(2.0), 2)
    span = found["ranges"]["w"]["activation"]
    np.testing.assert_allclose([span.low, span.high], [-1.02, 2.98], rtol=1e-5)
    # Of Adam itself at 0.25.
    found = after(optimizer.optimizer(RATE, 0.0, STEPS), filled(2.0), 2)
    span = found["ranges"]["w"]["activation"]
    np.testing.assert_allclose([span.low, span.high], [-2.0, 2.0], rtol=1e-5)


@pytest.mark.parametrize("name", optimizer.DIRECTIONS)
def test_flat_and_not_flat_are_one_and_a_later_start_has_the_later_rate(name):
    flat, plain = (
        after(optimizer.optimizer(RATE, DECAY, STEPS, flat=flat, direction=name), filled(2.0), 3)
        for flat in (True, False)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), flat, plain)
    last = optimizer.optimizer(RATE, DECAY, STEPS, first=STEPS, direction=name)
    jax.tree.map(np.testing.assert_array_equal, after(last, filled(2.0), 1), params())


def test_a_direction_of_the_users_own(monkeypatch):
    monkeypatch.setitem(optimizer.DIRECTIONS, "sign", optax.scale_by_sign)
    found = after(optimizer.optimizer(RATE, 0.0, STEPS, direction="sign"), filled(2.0), 2)
    np.testing.assert_allclose(found["params"]["b"], [0.75] * 2, rtol=1e-5)
