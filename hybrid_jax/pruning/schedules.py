"""Schedules: pure functions from the step, maybe traced, to the sparsity at that step.

Their sparsities may be traced too, so that a sweep over them is one compilation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hybrid_jax import core
from hybrid_jax.pruning.selection import check_sparsity, is_traced

Schedule = Callable[[int | jax.Array], jax.Array]


def one_shot(sparsity: float | jax.Array, step: int = 0) -> Schedule:
    """Nothing is removed before `step`, all of `sparsity` from it on.

    Raises:
      ValueError: If `sparsity` is outside [0, 1] or `step` is negative.

    Example:
      >>> schedule = one_shot(0.5, step=10)
      >>> [float(schedule(step)) for step in (0, 9, 10)]
      [0.0, 0.0, 0.5]
    """
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

    Args:
      sparsity: s_f, the sparsity from `end` on, in [0, 1].
      begin: t_0, the first step that removes.
      end: t_1, after `begin`.
      initial: s_i in [0, `sparsity`].

    Raises:
      ValueError: If an argument lies outside these bounds.

    Example:
      >>> schedule = cubic(0.8, begin=0, end=100)
      >>> [round(float(schedule(step)), 3) for step in (0, 50, 100, 200)]  # 0.8 (1 − 0.5³) = 0.7
      [0.0, 0.7, 0.8, 0.8]
    """
    final = check_sparsity(sparsity)
    check_sparsity(initial, "initial", most=1.0 if is_traced(final) else final)
    core.check_integer("begin", begin, 0)
    core.check_integer("end", end, begin + 1)

    def schedule(now):
        done = (jnp.asarray(now, jnp.float32) - begin) / (end - begin)
        to, start = jnp.asarray(sparsity, jnp.float32), jnp.asarray(initial, jnp.float32)
        rising = to + (start - to) * (1.0 - jnp.clip(done, 0.0, 1.0)) ** 3
        return jnp.where(done < 0, 0.0, rising)

    return schedule
