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


def values(schedule, steps):
    return jax.jit(jax.vmap(schedule))(jnp.array(steps))


def test_exponential_removes_the_same_fraction_at_every_step():
    # Density 0.01^(t/4) from step 2 on: 1, 0.316, 0.1, 0.0316, 0.01.
    got = values(pruning.exponential(0.99, 2, 6), [0, 2, 3, 4, 5, 6, 99])
    expected = [0.0, 0.0, 0.683772, 0.9, 0.968377, 0.99, 0.99]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert got.dtype == jnp.float32


def test_iterative_removes_a_fraction_of_what_remains():
    # 0.2, then 0.2 + 0.2 · 0.8, then 0.36 + 0.2 · 0.64, and no more.
    got = values(pruning.iterative(0.2, every=5, rounds=3), [0, 4, 5, 10, 14, 15, 20, 10**6])
    expected = [0.0, 0.0, 0.2, 0.36, 0.36, 0.488, 0.488, 0.488]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    # 96.5 % after 15 rounds of 20 %, the last ticket in many figures of arXiv 1803.03635.
    assert abs(pruning.iterative(0.2, 1, 15)(15) - 0.9648) < 1e-4


def test_iterative_of_everything_and_of_nothing():
    assert values(pruning.iterative(1.0, 1, 2), [0, 1, 2]).tolist() == [0.0, 1.0, 1.0]
    assert values(pruning.iterative(0.0, 1, 2), [0, 1, 2]).tolist() == [0.0, 0.0, 0.0]


def test_ac_dc_alternates_and_ends_compressed():
    schedule = pruning.cyclic(pruning.one_shot(0.75, step=2), period=3, cycles=2)
    assert values(schedule, range(9)).tolist() == [0, 0, 0.75] * 2 + [0.75] * 3


def test_cyclical_pruning_restarts_and_ends_at_its_sparsity():
    one = pruning.cubic(0.8, 0, 3)
    got = values(pruning.cyclic(one, period=4, cycles=2), range(12))
    cycle = values(one, range(8))
    np.testing.assert_array_equal(got, jnp.concatenate([cycle[:4], cycle]))


SCHEDULES = {
    "one_shot": lambda s: pruning.one_shot(s, 3),
    "cubic": lambda s: pruning.cubic(s, 0, 7),
    "exponential": lambda s: pruning.exponential(s, 1, 7),
    "iterative": lambda s: pruning.iterative(s, 7, 1),
    "cyclic": lambda s: pruning.cyclic(pruning.cubic(s, 0, 3), 4, 2),
}


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_contract(make):
    steps = range(10)
    for sparsity in (0.0, 0.9, 1.0):
        got = values(make(sparsity), steps)
        assert got[0] == 0.0
        assert ((got >= 0) & (got <= 1)).all()
        np.testing.assert_allclose(got[-1], sparsity, rtol=1e-7)
        # As a Python step, and with a traced sparsity.
        assert [float(make(sparsity)(step)) for step in steps] == pytest.approx(got.tolist())
    swept = jax.jit(jax.vmap(lambda s: jax.vmap(make(s))(jnp.arange(10))))(jnp.array([0.0, 0.9]))
    np.testing.assert_allclose(swept[1], values(make(0.9), steps), rtol=1e-6)


@pytest.mark.parametrize("name", ["one_shot", "cubic", "exponential", "cyclic"])
def test_a_schedule_ends_exactly_at_its_sparsity(name):
    assert SCHEDULES[name](0.9)(7) == jnp.float32(0.9)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got 1.3"):
        pruning.one_shot(1.3)
    with pytest.raises(ValueError, match="step must be an integer of at least 0, got -1"):
        pruning.one_shot(0.5, -1)
    with pytest.raises(ValueError, match="end must be an integer of at least 6, got 5"):
        pruning.cubic(0.5, 5, 5)
    with pytest.raises(ValueError, match=r"initial must be in \[0, 0.5\], got 0.6"):
        pruning.cubic(0.5, 0, 5, initial=0.6)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got -0.1"):
        pruning.exponential(-0.1, 0, 5)
    with pytest.raises(ValueError, match="end must be an integer of at least 1, got 0"):
        pruning.exponential(0.5, 0, 0)
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], got 2"):
        pruning.iterative(2, 1, 1)
    with pytest.raises(ValueError, match="every must be an integer of at least 1, got 0"):
        pruning.iterative(0.5, 0, 1)
    with pytest.raises(ValueError, match="rounds must be an integer of at least 1, got 0"):
        pruning.iterative(0.5, 1, 0)
    with pytest.raises(ValueError, match="period must be an integer of at least 1, got 0"):
        pruning.cyclic(pruning.one_shot(0.5), 0, 1)
    with pytest.raises(ValueError, match="cycles must be an integer of at least 1, got 0"):
        pruning.cyclic(pruning.one_shot(0.5), 1, 0)
