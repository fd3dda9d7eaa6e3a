"""Latency against a reference in the same run: only such ratios carry over to another machine."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hybrid_jax import core


class Latency(NamedTuple):
    """Times in seconds of one call, and how they compare."""

    p50: float  # median of the function
    p95: float  # 95th percentile of the function
    reference_p50: float  # median of the reference
    reference_p95: float  # 95th percentile of the reference
    ratio: float  # median over the pairs of function time / reference time; below 1 is faster
    spread: tuple[float, float]  # quartiles (25 %, 75 %) of that ratio over the pairs
    quartiles: tuple[float, float] | None = None  # those of the function's time


def latency(
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    *inputs: Any,
    pairs: int = 50,
    warmup: int = 3,
    parts: int = 1,
) -> Latency:
    """Times `fn` and `reference` by turns, so that what else the machine does weighs on both.

    The order within a pair alternates. A call is timed straight after another of the same function,
    with its weights in the caches: after a dense reference, which had taken their place, a small
    network would be timed at reading them. Compilation is not timed; transfer of NumPy inputs is.

    Both are jitted and called with the same inputs, usually one image `(1, H, W, C)`, until their
    outputs are ready; `warmup` pairs go before the `pairs` that are timed. Where a call goes
    through as many `parts`, as through single images, times are those of one of them, in the mean.

    Example:
      >>> small, large = jax.jit(lambda x: x @ x), jax.jit(lambda x: x @ (x @ (x @ x)))
      >>> measured = latency(small, large, np.ones((64, 64), np.float32), pairs=5)
      >>> measured.ratio > 0
      True
    """
    core.check_integer("pairs", pairs, 1)
    core.check_integer("warmup", warmup, 1)
    core.check_integer("parts", parts, 1)
    for _ in range(warmup):
        core.seconds(fn, *inputs), core.seconds(reference, *inputs)
    times = np.empty((pairs, 2))
    for i in range(pairs):
        for j in (0, 1) if i % 2 else (1, 0):
            _, times[i, j] = (core.seconds((fn, reference)[j], *inputs) for _ in range(2))
    times /= parts
    p50, p95 = np.percentile(times, [50, 95], axis=0)
    low, ratio, high = np.percentile(times[:, 0] / times[:, 1], [25, 50, 75]).tolist()
    medians = map(float, (p50[0], p95[0], p50[1], p95[1]))
    quartiles = tuple(np.percentile(times[:, 0], [25, 75]).tolist())
    return Latency(*medians, ratio, (low, high), quartiles)


def width_latencies(
    fn: Callable[..., Any],
    params: Any,
    widths: Mapping[str, Sequence[int]],
    *inputs: Any,
    pairs: int = 50,
    warmup: int = 3,
) -> dict[str, dict[int, float]]:
    """Measures what each width of each group of channels does for the latency of the network.

    The network is really shrunk, one group at a time, compiled, and timed against the whole one in
    the same pairs. `pruning.paying_widths` reads off the widths that make it faster. `fn` is not
    jitted. `widths` is {name of a coupled group: widths to try}, the multiples of 8, say; each
    takes a compilation. The rest is for `latency`. The result is {group name: {width: time / time
    of the whole network}}, the whole width n with 1.0 included.
    """
    graph = core.trace(fn, params, *inputs)
    sizes = {group.name: group.size for group in graph.groups}
    for name, tried in widths.items():
        core.check_choice("group of widths", name, sizes)
        for width in tried:
            core.check_integer(f"width of group {name!r}", width, 1, sizes[name])
    whole = jax.jit(functools.partial(fn, params))

    def measure(name, width):
        keep = {name: np.arange(sizes[name]) < width}
        kept = core.keep_indices(keep, graph.groups, params)
        small = functools.partial(core.narrow(fn, params, kept), core.slice_tree(params, kept))
        return latency(jax.jit(small), whole, *inputs, pairs=pairs, warmup=warmup).ratio

    return {
        name: {sizes[name]: 1.0}
        | {width: measure(name, width) for width in tried if width != sizes[name]}
        for name, tried in widths.items()
    }
