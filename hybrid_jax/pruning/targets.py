"""The sparsity that meets a target: MACs, parameters, bytes, or a latency that was measured."""

from collections.abc import Callable, Iterator, Sequence
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

    Where the cost does not rise with the sparsity this is the least sparsity that meets the
    target, found exactly by about 20 bisections. Counted costs behave so: MACs, parameters, and
    packed bytes of channels that `keep_channels` keeps, or of `uniform` and `global_` masks.

    A latency does not: a narrower network may be slower. What bisection returns still meets the
    target, but another sparsity may come closer to it. Either `paying_widths` makes it fall again,
    or `sparsities` names those to try, and each one is measured.

    Args:
      choose: `choose(sparsity) -> choice`, such as `keep_channels` or `masks` of given scores.
      cost: `cost(choice) -> number`, such as the MACs of `cost.count`.
      target: The most that the choice may cost, in the units of `cost`.
      most: Largest sparsity to look at, in [0, 1]; what the granularity allows.
      sparsities: Sparsities to try, each of them, instead of the bisection.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from hybrid_jax import core, cost
      >>> from hybrid_jax.pruning import group_scores, keep_channels, magnitude
      >>> fn = lambda params, x: jax.nn.relu(x @ params['a']) @ params['b']
      >>> params = {'a': jnp.arange(24.0).reshape(3, 8), 'b': jnp.ones((8, 2))}
      >>> graph = core.trace(fn, params, jnp.ones((1, 3)))  # 5 MACs for each of 8 hidden units
      >>> scores = group_scores(magnitude(graph.kernels, params), graph.groups)
      >>> found = to_target(
      ...     lambda sparsity: keep_channels(scores, sparsity),
      ...     lambda keep: cost.count(core.narrow_graph(graph, keep)).macs,
      ...     target=29)
      >>> found.cost, int(found.choice['a'].sum())
      (25, 5)
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


def _bisect(look: Callable[[float], Reached], target: float, high: int) -> Iterator[Reached]:
    """Looks at `high` steps, and from there on for the fewest that meet the target."""
    found = look(high / _STEPS)
    yield found
    if found.cost > target:
        return
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        found = look(middle / _STEPS)
        yield found
        low, high = (low, middle) if found.cost <= target else (middle, high)


def _finite(name: str, value: float) -> float:
    value = np.asarray(value)
    if value.ndim or value.dtype.kind not in "iuf" or not np.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    return value.item()
