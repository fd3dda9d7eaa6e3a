"""Observers: from the values that a tensor takes, batch by batch, to its range.

An observer is three pure functions. What one batch shows and what many have shown are the same kind
of state, so that streaming is `state = merge(state, init(x))`. States are float32, except that a
histogram's exponent is an int32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_jax import core
from hybrid_jax.quantization import gradients, grids, histograms
from hybrid_jax.quantization.grids import Grid, Range, extent
from hybrid_jax.quantization.histograms import BINS, histogram, middles, radius

_CLIPS = 100


class Observer(NamedTuple):
    """How a tensor's range is found."""

    # x (any shape) -> state of what one batch shows: a NamedTuple with at least `low` and `high`,
    # the least and greatest value, float32 (); its last field counts what was seen
    init: Callable[[jax.Array], Any]
    # (state, state) -> state; the second is the later one. A state of zeros is neutral
    merge: Callable[[Any, Any], Any]
    # (state, scheme, bits) -> `Range`, each end (); scheme is such as `schemes.affine`
    value: Callable[[Any, Callable[..., Grid], Any], Range]


class Seen(NamedTuple):
    """Least and greatest value, of a moving average their means, and how many; all float32 ()."""

    low: jax.Array
    high: jax.Array
    total: jax.Array


class Magnitude(NamedTuple):
    """Least and greatest value, the sum of |x| and how many values; all float32 ()."""

    low: jax.Array
    high: jax.Array
    sum: jax.Array
    total: jax.Array


def minmax() -> Observer:
    """All values ever seen: nothing is clipped."""

    def merge(old, new):
        low, high = jnp.minimum(old.low, new.low), jnp.maximum(old.high, new.high)
        return Seen(low, high, old.total + new.total)

    return Observer(_seen, _neutral(merge), _ends)


def moving_average(momentum: float = 0.9) -> Observer:
    """An exponential moving average of each batch's least and greatest value, from the first on.

    A batch of r times as many values as the first one counts as r batches: what was seen before
    then has the weight momentum^r, with `momentum` in [0, 1]. The state counts the values of the
    first. Source: Jacob et al., arXiv 1712.05877, section 3.1.
    """
    momentum = core.check_fraction("momentum", momentum)

    def merge(old, new):
        before = momentum ** (new.total / jnp.maximum(old.total, 1.0))
        low, high = (before * a + (1 - before) * b for a, b in zip(old[:2], new[:2]))
        return Seen(low, high, old.total)

    return Observer(_seen, _neutral(merge), _ends)


def percentile(percent: float = 99.99) -> Observer:
    """Leaves out 100 − `percent` percent of the values at either end, to a histogram bin.

    `percent` is in (50, 100]. Source: Wu et al., Integer Quantization for Deep Learning Inference:
    Principles and Empirical Evaluation, arXiv 2004.09602, section 5.
    """
    if not 50 < core.check_positive("percent", percent) <= 100:
        raise ValueError(f"percent must be in (50, 100], got {percent}")

    def value(state, scheme, bits):
        allowed = state.total * ((100 - percent) / 100)
        edges = radius(state.exponent) * jnp.linspace(-1.0, 1.0, BINS + 1, dtype=jnp.float32)
        kept_below = jnp.cumsum(state.counts) > allowed
        kept_above = jnp.cumsum(state.counts[::-1])[::-1] > allowed
        low = jnp.min(jnp.where(kept_below, edges[:-1], 0.0))
        high = jnp.max(jnp.where(kept_above, edges[1:], 0.0))
        return Range(jnp.maximum(low, state.low), jnp.minimum(high, state.high))

    return Observer(histogram, _neutral(histograms.merge), value)


def mse() -> Observer:
    """The range with the least mean squared error of fake-quantization at the given bit-width.

    It is searched among 1/100, 2/100, …, 1 times the min-max range, on the histogram's mid-points.

    Source: Nagel et al., A White Paper on Neural Network Quantization, arXiv 2106.08295, section
    3.1.
    """

    def error(counts, values, grid):
        return jnp.sum(counts * (gradients.fake_quant(values, grid) - values) ** 2)

    return Observer(histogram, _neutral(histograms.merge), partial(_least, error))


def entropy() -> Observer:
    """The range that loses the least information: the least Kullback-Leibler divergence KL(P‖Q).

    P is the histogram with what lies beyond the grid's ends in its outermost bins. Q is the
    histogram between the ends, its counts spread evenly over the occupied bins that share a value
    of the grid. It is searched as `mse` does; where Q is 0 but P is not, it counts as 10⁻⁷.

    Source: S. Migacz, 8-bit Inference with TensorRT, GPU Technology Conference 2017, with the grid
    at hand in place of 128 levels.
    """
    return Observer(histogram, _neutral(histograms.merge), partial(_least, _divergence))


def mean_abs() -> Observer:
    """From −a to a, where a is the mean of |x|: for signs, the range of least squared error.

    Source: Rastegari et al., XNOR-Net, arXiv 1603.05279, equation 6.
    """

    def init(x):
        x = x.astype(jnp.float32)
        return Magnitude(*extent(x), jnp.sum(jnp.abs(x)), jnp.float32(x.size))

    def merge(old, new):
        low, high = jnp.minimum(old.low, new.low), jnp.maximum(old.high, new.high)
        return Magnitude(low, high, old.sum + new.sum, old.total + new.total)

    def value(state, scheme, bits):
        mean = state.sum / jnp.maximum(state.total, 1.0)
        return Range(-mean, mean)

    return Observer(init, _neutral(merge), value)


def ternary() -> Observer:
    """From −a to a for the grid {−a, 0, a}, which is the symmetric one at 2 bits.

    With Δ = 0.7 · mean |x|, a is the mean of |x| where |x| > Δ, to a histogram bin. The grid then
    rounds at a / 2, which for this a has no larger squared error than to round at Δ, and is close
    to it: 0.61 and 0.56 standard deviations of a normal distribution.

    Source: Li et al., Ternary Weight Networks, arXiv 1605.04711, section 2.
    """

    def value(state, scheme, bits):
        magnitudes = jnp.abs(middles(state.exponent))
        mean = jnp.sum(state.counts * magnitudes) / jnp.maximum(state.total, 1.0)
        above = jnp.where(magnitudes > 0.7 * mean, state.counts, 0.0)
        scale = jnp.sum(above * magnitudes) / jnp.maximum(jnp.sum(above), 1.0)
        return Range(-scale, scale)

    return Observer(histogram, _neutral(histograms.merge), value)


METHODS: dict[str, Callable[[], Observer]] = {
    "minmax": minmax,
    "ema": moving_average,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
    "mean_abs": mean_abs,
    "ternary": ternary,
}
"""What finds ranges, by name, open to users: `METHODS['mine'] = f`."""

OF_FEW_BITS = ("mean_abs", "ternary")
"""Those for kernels of two and of three values alone."""


def of_any_bits() -> list[str]:
    """Names of those for kernels and activations at every bit-width."""
    return [name for name in METHODS if name not in OF_FEW_BITS]


def observer(method: str | Observer) -> Observer:
    """The observer of that name in `METHODS`, or the one given."""
    if isinstance(method, Observer):
        return method
    return METHODS[core.check_choice("method", method, METHODS)]()


def observe(watch: Observer, x: jax.Array, shape: tuple[int, ...]) -> Any:
    """States of an array, with an axis that has one for each entry of a range of that shape."""
    return jax.vmap(watch.init)(grids.blocks(x, shape))


def conclude(
    watch: Observer, states: Any, shape: tuple[int, ...], scheme: Callable[..., Grid], bits: Any
) -> Range:
    """The range of that shape from such states, float32."""
    span = jax.vmap(lambda state: watch.value(state, scheme, bits))(states)
    return jax.tree.map(lambda end: end.reshape(shape).astype(jnp.float32), span)


def _seen(x):
    return Seen(*extent(x), jnp.float32(x.size))


def _ends(state, scheme, bits):
    return Range(state.low, state.high)


def _neutral(merge):
    """The merge that leaves a state as it is where the other has seen nothing."""

    # In a branch of `cond` that was not taken a site has seen nothing: its state is all zeros.
    def merged(old, new):
        later = jax.tree.map(partial(jnp.where, old[-1] == 0), new, merge(old, new))
        return jax.tree.map(partial(jnp.where, new[-1] == 0), old, later)

    return merged


def _least(loss, state, scheme, bits):
    """The range of least loss(counts, middles of bins, grid) in 1/100, 2/100, …, 1 of all."""
    values = middles(state.exponent)
    widest = Range(jnp.minimum(state.low, 0.0), jnp.maximum(state.high, 0.0))

    def at(fraction):
        grid = scheme(Range(widest.low * fraction, widest.high * fraction), bits)
        return loss(state.counts, values, grid)

    fractions = jnp.linspace(1.0, 1 / _CLIPS, _CLIPS, dtype=jnp.float32)
    best = fractions[jnp.argmin(lax.map(at, fractions))]
    return Range(widest.low * best, widest.high * best)


def _divergence(counts, values, grid):
    lowest, highest = (end * grid.scale for end in grids.steps(grid))
    half_bin = (values[1] - values[0]) / 2
    inside = (values > lowest - half_bin) & (values < highest + half_bin)
    first, last = jnp.argmax(inside), BINS - 1 - jnp.argmax(inside[::-1])
    p = jnp.zeros(BINS, jnp.float32).at[jnp.clip(jnp.arange(BINS), first, last)].add(counts)
    # Bins in a row are rounded to the same value or to a greater one: number the values.
    rounded = grids.rounded(values, grid)
    value = jnp.cumsum(jnp.diff(rounded, prepend=rounded[:1]) > 0)
    kept, occupied = jnp.where(inside, counts, 0.0), inside & (counts > 0)
    together = jnp.zeros(BINS, jnp.float32).at[value].add(kept)
    sharing = jnp.zeros(BINS, jnp.float32).at[value].add(occupied.astype(jnp.float32))
    q = jnp.where(occupied, (together / jnp.maximum(sharing, 1.0))[value], 0.0)
    p, q = (mass / jnp.maximum(jnp.sum(mass), 1.0) for mass in (p, q))
    return jnp.sum(jnp.where(p > 0, p * jnp.log(p / jnp.maximum(q, 1e-7)), 0.0))
