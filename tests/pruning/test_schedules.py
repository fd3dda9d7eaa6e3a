import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import pruning


def test_cubic_is_the_papers_formula():
    schedule = pruning.cubic(0.9, begin=10, end=30, initial=0.1)
    # 0.9 − 0.8 (1 − (t − 10)/20)³: at 15 0.9 − 0.8 · 27/64, at 20 0.9 − 0.8/8.
    expected = {0: 0.0, 9: 0.0, 10: 0.1, 15: 0.5625, 20: 0.8, 30: 0.9, 1000: 0.9}
    got = jax.jit(jax.vmap(schedule))(jnp.array(list(expected)))
    np.testing.assert_allclose(got, list(expected.values()), atol=1e-6)
    assert got.dtype == jnp.float32


def test_cubic_never_falls():
    values = jax.vmap(pruning.cubic(0.8, begin=3, end=40))(jnp.arange(60))
    assert (jnp.diff(values) >= 0).all()


def test_one_shot_steps_up():
    schedule = jax.jit(pruning.one_shot(0.75, step=3))
    assert [float(schedule(step)) for step in (0, 2, 3, 4)] == [0.0, 0.0, 0.75, 0.75]


def test_a_schedule_ends_exactly_at_its_sparsity():
    assert pruning.cubic(0.9, 0, 7)(7) == jnp.float32(0.9)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got 1.3"):
        pruning.one_shot(1.3)
    with pytest.raises(ValueError, match="step must be an integer of at least 0, got -1"):
        pruning.one_shot(0.5, -1)
    with pytest.raises(ValueError, match="end must be an integer of at least 6, got 5"):
        pruning.cubic(0.5, 5, 5)
    with pytest.raises(ValueError, match=r"initial must be in \[0, 0.5\], got 0.6"):
        pruning.cubic(0.5, 0, 5, initial=0.6)
