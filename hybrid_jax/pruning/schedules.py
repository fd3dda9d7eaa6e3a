"""Schedules: pure functions from the step, maybe traced, to the sparsity at that step.

Their sparsities may be traced too, so that a sweep over them is one compilation. Any other
function from a step to a sparsity is a schedule as well.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from hybrid_jax import core
from hybrid_jax.pruning.selection import check_sparsity

Schedule = Callable[[int | jax.Array], jax.Array]


def one_shot(sparsity: float | jax.Array, step: int = 0) -> Schedule:
    """Nothing is removed before `step`, all of `sparsity` from it on."""
    check_sparsity(sparsity)
    core.check_integer("step", step, 0)
    return lambda now: jnp.where(jnp.asarray(now) < step, 0.0, jnp.asarray(sparsity, jnp.float32))


def cubic(
    sparsity: float | jax.Array,
    begin: int,
    end: int,
    initial: float | jax.Array = 0.0,
) -> Schedule:
    """Rises from `initial` at `begin` to `sparsity` at `end`, fast first; 0 before `begin`.

    s_t = s_f + (s_i − s_f)(1 − (t − t_0) / (t_1 − t_0))³, M. Zhu and S. Gupta, To prune, or not
    to prune (arXiv 1710.01878).

    Example:
      >>> schedule = cubic(0.8, begin=0, end=100)
      >>> [round(float(schedule(step)), 3) for step in (0, 50, 100, 200)]  # 0.8 (1 − 0.5³) = 0.7
      [0.0, 0.7, 0.8, 0.8]
    """
    final = check_sparsity(sparsity)
    check_sparsity(initial, "initial", most=1.0 if core.is_traced(final) else final)
    _check_span(begin, end)
    start, to = (jnp.asarray(s, jnp.float32) for s in (initial, sparsity))
    rising = optax.polynomial_schedule(start, to, 3, end - begin)
    schedule = optax.join_schedules([optax.constant_schedule(jnp.float32(0.0)), rising], [begin])
    return lambda now: schedule(jnp.asarray(now))


def exponential(sparsity: float | jax.Array, begin: int, end: int) -> Schedule:
    """Every step removes the same fraction of what remains, from `begin` to `end`.

    s_t = 1 − (1 − s_f)^((t − t_0) / (t_1 − t_0)); a sparsity of 1 is reached at the first step. H.
    Tanaka, D. Kunin, D. Yamins, S. Ganguli, Pruning neural networks without any data by iteratively
    conserving synaptic flow (arXiv 2006.05467), who prune so in 100 steps before training.
    """
    check_sparsity(sparsity)
    _check_span(begin, end)

    # Not optax's, which is constant where nothing is to be left and takes no traced rate.
    def schedule(now):
        final = jnp.asarray(sparsity, jnp.float32)
        done = (jnp.asarray(now, jnp.float32) - begin) / (end - begin)
        # 1 − (1 − s_f) is not s_f in floating point.
        return jnp.where(done < 1, 1.0 - (1.0 - final) ** jnp.clip(done, 0.0, 1.0), final)

    return schedule


def iterative(fraction: float | jax.Array, every: int, rounds: int) -> Schedule:
    """At each `every`-th step `fraction` p of what remains is removed, `rounds` times.

    s_k = 1 − (1 − p)^k after k rounds, as lottery tickets are found: J. Frankle and M. Carbin, The
    Lottery Ticket Hypothesis (arXiv 1803.03635).
    """
    check_sparsity(fraction, "fraction")
    core.check_integer("every", every, 1)
    core.check_integer("rounds", rounds, 1)

    def schedule(now):
        done = jnp.clip(jnp.asarray(now) // every, 0, rounds).astype(jnp.float32)
        return 1.0 - (1.0 - jnp.asarray(fraction, jnp.float32)) ** done

    return schedule


def cyclic(schedule: Schedule, period: int, cycles: int) -> Schedule:
    """Repeats `schedule` from its step 0, `cycles` times; the last cycle goes on for good.

    In `prune_by_schedule` weights that a falling sparsity lets back in start at zero. Of `one_shot`
    it is AC/DC, `cyclic(one_shot(0.9, dense_steps), dense_steps + sparse_steps, cycles)`: A. Peste
    et al., Alternating Compressed/DeCompressed Training (arXiv 2106.12379). Of `cubic` it is S.
    Srinivas et al., Cyclical Pruning for Sparse Neural Networks (arXiv 2202.01290).
    """
    core.check_integer("period", period, 1)
    core.check_integer("cycles", cycles, 1)

    def repeated(now):
        now = jnp.asarray(now)
        return schedule(now - period * jnp.clip(now // period, 0, cycles - 1))

    return repeated


def _in_rounds(sparsity: float | jax.Array, steps: int) -> Schedule:
    rounds = min(steps, 5)
    return iterative(1 - (1 - sparsity) ** (1 / rounds), steps // rounds, rounds)


def _in_cycles(sparsity: float | jax.Array, steps: int) -> Schedule:
    period = steps // min(steps, 3)
    return cyclic(cubic(sparsity, 0, max(period // 2, 1)), period, min(steps, 3))


SCHEDULES: dict[str, Callable[[float | jax.Array, int], Schedule]] = {
    "one_shot": one_shot,
    "cubic": lambda sparsity, steps: cubic(sparsity, 0, steps),
    "exponential": lambda sparsity, steps: exponential(sparsity, 0, steps),
    "iterative": _in_rounds,
    "cyclic": _in_cycles,
}
"""Every schedule by name, of a sparsity and the steps, at least 1, after which it is reached."""


def _check_span(begin: int, end: int) -> None:
    core.check_integer("begin", begin, 0)
    core.check_integer("end", end, begin + 1)
