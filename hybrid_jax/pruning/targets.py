"""The sparsity that meets a target: MACs, parameters, bytes, or a latency that was measured."""

import bisect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from hybrid_jax.pruning.selection import check_sparsity

# Sparsities are read to six decimals: there are no others to look at.
_STEPS = 1_000_000


class Reached(NamedTuple):
    """What a search for a target found: the choice, the sparsity it was made for, and its cost."""

    choice: Any
    sparsity: float
    cost: float


def to_target(
    choose: Callable[[float], Any],
    cost: Callable[[Any], float],
    target: float,
    most: float = 1.0,
    sparsities: Sequence[float] | None = None,
) -> Reached:
    """Finds the choice with the largest cost that is not above `target`.

    Where the cost does not rise with the sparsity this is the least sparsity that meets the target,
    found exactly by about 20 bisections: MACs, parameters, and bytes behave so. A latency does not;
    then another sparsity may come closer. Either `paying_widths` makes it fall again, or each of
    `sparsities` is tried. `choose(sparsity) -> choice` is such as `keep_channels` of given scores,
    `cost(choice) -> number` such as the MACs of `cost.count`, `most` the largest sparsity to look
    at.
    """
    target = _finite("target", target)
    check_sparsity(most, "most")

    def look(sparsity):
        choice = choose(sparsity)
        return Reached(choice, sparsity, _finite(f"cost at sparsity {sparsity:g}", cost(choice)))

    best = look(0.0)
    if target > best.cost:
        raise ValueError(
            f"target must be at most {best.cost}, the cost of removing nothing, got {target}"
        )
    if target == best.cost:
        return best
    if sparsities is None:
        tried = _bisect(look, target, round(most * _STEPS))
    else:
        tries = [check_sparsity(s, "sparsities", most) for s in sparsities]
        tried = map(look, sorted(tries, reverse=True))
    for found in tried:
        if best.cost > target:
            best = min(best, found, key=lambda reached: reached.cost)
        elif best.cost <= found.cost <= target:
            best = found
    if best.cost > target:
        raise ValueError(
            f"target must be at least {best.cost}, the least that can be met "
            f"(at sparsity {best.sparsity:g}), got {target}"
        )
    return best


def _bisect(look: Callable[[float], Reached], target: float, high: int) -> list[Reached]:
    """Looks at `high` steps, and from there on for the fewest that meet the target."""
    seen = []

    def meets(steps):
        seen.append(look(steps / _STEPS))
        return seen[-1].cost <= target

    if meets(high):
        bisect.bisect_left(range(high), True, 1, key=meets)
    return seen


def _finite(name: str, value: float) -> float:
    value = np.asarray(value)
    if value.ndim or value.dtype.kind not in "iuf" or not np.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    return value.item()
