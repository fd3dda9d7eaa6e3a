"""Schedules of bit-widths for quantization-aware training: functions of the step, maybe traced."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax import core
from hybrid_jax.quantization import grids


def annealing(bits: Any, stages: Sequence[tuple[int, int]]) -> Callable[[int | jax.Array], Any]:
    """Lowers the bit-widths of a model stage by stage: step -> bits for a q_fn of `fake_quantized`.

    `bits` is a pytree of int32 arrays, such as `Spec.bits()` gives, maybe one row for each expert;
    `stages` are (until, least) pairs of rising steps: before step `until`, nothing has fewer bits
    than `least`, and after the last the bits are as given. A single stage of 32 bits is a delay:
    the float model trains first. What has more bits than a stage keeps them, so sites of different
    bits, and those that are off, share one schedule, and no stage recompiles.

    While a site is off its range does not learn: where weights move much before they are quantized,
    calibrate when the delay ends. LSQ at 8 bits wants steps a tenth of those at 4 (section 3 of its
    paper): an optimizer that divides by the size of the gradient, such as Adam, serves all stages.

    Example:
      >>> schedule = annealing(jnp.int32([4, 8, 32]), [(100, 32), (200, 8)])
      >>> [schedule(step).tolist() for step in (0, 100, 200)]
      [[32, 32, 32], [8, 8, 32], [4, 8, 32]]
    """
    previous = -1
    for until, least in stages:
        previous = core.check_integer("step of a stage", until, previous + 1)
        grids.check_bits(
            "bits of a stage", core.check_integer("bits of a stage", least), range(1, 9)
        )

    def schedule(step):
        least = jnp.int32(1)
        for until, bits_then in reversed(stages):
            least = jnp.where(jnp.asarray(step) < until, jnp.int32(bits_then), least)
        return jax.tree.map(lambda wanted: jnp.maximum(wanted, least), bits)

    return schedule
