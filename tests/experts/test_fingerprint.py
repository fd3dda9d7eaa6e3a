"""A gate knows the experts that it was fitted to."""

import jax
import jax.numpy as jnp
import pytest

from hybrid_jax import experts

STACK = {"w": jnp.ones((2, 3)), "bits": jnp.array([4, 8])}


def test_any_changed_bit_changes_it():
    own = experts.fingerprint(STACK)
    assert own == experts.fingerprint(jax.tree.map(jnp.copy, STACK))
    smallest = STACK["w"].at[1, 2].add(2.0**-23)
    for other in (
        STACK | {"w": smallest},
        STACK | {"w": STACK["w"].reshape(3, 2)},
        STACK | {"w": STACK["w"].astype(jnp.bfloat16)},
        {"v": STACK["w"], "bits": STACK["bits"]},
        {"w": STACK["w"]},
    ):
        assert experts.fingerprint(other) != own


def test_a_gate_of_other_experts_is_refused():
    fitted_to = experts.fingerprint(STACK)
    experts.check_fitted(fitted_to, STACK)
    with pytest.raises(ValueError, match=rf"experts \w+, got {fitted_to}: fit it again"):
        experts.check_fitted(fitted_to, STACK | {"bits": jnp.array([8, 8])})
