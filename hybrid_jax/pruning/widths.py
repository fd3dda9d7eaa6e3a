"""Widths that pay: which numbers of channels make a network faster, by a table of latencies."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from hybrid_jax import core
from hybrid_jax.pruning.selection import keep_best


def paying_widths(
    table: Mapping[str, Mapping[int, float]], margin: float = 0.0
) -> dict[str, tuple[int, ...]]:
    """The widths of each group that are faster than every larger one.

    A kernel of 60 channels may take longer than one of 64: then 60 costs accuracy and buys
    nothing. `table` is {group name: {width: latency}}, as `deploy.width_latencies` measures it; a
    width must be faster than the fastest larger one by the fraction `margin`.

    Example:
      >>> paying_widths({'conv': {64: 1.0, 60: 1.1, 48: 0.9, 32: 0.6, 30: 0.6}})
      {'conv': (32, 48, 64)}
    """
    core.check_fraction("margin", margin)
    if not table:
        raise ValueError("table must hold the latencies of a group, got none")

    def paying(name, latencies):
        if not latencies:
            raise ValueError(f"table must hold a width of group {name!r}, got none")
        best, widths = float("inf"), []
        for width in sorted(latencies, reverse=True):
            core.check_integer(f"width of group {name!r}", width, 1)
            latency = core.check_positive(f"latency of {name!r} at {width}", latencies[width])
            if not widths or latency < (1 - margin) * best:
                widths.append(width)
            best = min(best, latency)
        return tuple(reversed(widths))

    return {name: paying(name, latencies) for name, latencies in table.items()}


def to_widths(
    keep: Mapping[str, jax.Array],
    scores: Mapping[str, jax.Array],
    widths: Mapping[str, Sequence[int]],
) -> dict[str, jax.Array]:
    """Moves each group to the nearest width that is allowed, of two as near to the wider one.

    `keep` is {group name: (n,) bool}, what `keep_channels` chose by `scores`, maybe traced; the
    best channels stay. Groups that `widths` leaves out stay as they are.
    """
    xp, moved = core.namespace(keep, scores), dict(keep)
    for name, allowed in widths.items():
        core.check_choice("group of widths", name, keep)
        size = len(keep[name])
        for width in allowed:
            core.check_integer(f"width of group {name!r}", width, 1, size)
        if not allowed:
            raise ValueError(f"widths must allow a width of group {name!r}, got none")
        falling = xp.asarray(sorted(allowed, reverse=True), np.int32)
        count = xp.asarray(keep[name]).sum(dtype=np.int32)
        width = falling[xp.argmin(abs(falling - count))]
        moved[name] = core.on_device(keep_best(xp.asarray(scores[name], np.float32), width))
    return moved
