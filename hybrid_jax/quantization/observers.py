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
from hybrid_jax.quantization import gradients
from hybrid_jax.quantization.grids import Grid, Range, extent

BINS = 2048
"""Bins of a histogram over [−radius, radius): at least a quarter of them lie below max |x|."""

_CLIPS = 100


class Observer(NamedTuple):
    """How a tensor's range is found.

    Attributes:
      init: x (any shape) -> state of what one batch shows: a NamedTuple with at least `low` and
        `high`, the least and greatest value, float32 ().
      merge: (state, state) -> state; the second is the later one. A state of zeros is neutral.
      value: (state, scheme, bits) -> `Range`, each end (); scheme is such as `grids.affine`.
    """

    init: Callable[[jax.Array], Any]
    merge: Callable[[Any, Any], Any]
    value: Callable[[Any, Callable[..., Grid], Any], Range]


class Seen(NamedTuple):
    """Least and greatest value, over `batches` batches; all float32 ()."""

    low: jax.Array
    high: jax.Array
    batches: jax.Array


class Histogram(NamedTuple):
    """Counts in `BINS` equal bins over [−2^exponent, 2^exponent), two of which meet at zero.

    The radius is a power of two, so that widening merges whole bins and loses nothing.

    Attributes:
      low: float32 (), the least value.
      high: float32 (), the greatest value.
      counts: float32 (BINS,), without exact zeros: these are on every grid.
      exponent: int32 ().
      total: float32 (), how many values, exact zeros included.
    """

    low: jax.Array
    high: jax.Array
    counts: jax.Array
    exponent: jax.Array
    total: jax.Array


def minmax() -> Observer:
    """All values ever seen: nothing is clipped.

    Example:
      >>> observer = minmax()
      >>> state = observer.init(jnp.array([1.0, 2.0]))
      >>> state = observer.merge(state, observer.init(jnp.array([-1.0])))
      >>> low, high = observer.value(state, None, 8)
      >>> print(low, high)
      -1.0 2.0
    """

    def merge(old, new):
        low, high = jnp.minimum(old.low, new.low), jnp.maximum(old.high, new.high)
        widest = Seen(low, high, old.batches + new.batches)
        return _unless_empty(old.batches, new.batches, old, new, widest)

    return Observer(_seen, merge, lambda state, scheme, bits: Range(state.low, state.high))


def moving_average(momentum: float = 0.9) -> Observer:
    """An exponential moving average of each batch's least and greatest value, from the first on.

    Args:
      momentum: Weight of what was seen before, in [0, 1].

    Source: Jacob et al., arXiv 1712.05877, section 3.1.

    Example:
      >>> observer = moving_average(0.75)
      >>> state = observer.merge(observer.init(jnp.array([4.0])), observer.init(jnp.array([8.0])))
      >>> print(observer.value(state, None, 8).high)
      5.0
    """
    momentum = core.check_fraction("momentum", momentum)

    def merge(old, new):
        mean = jax.tree.map(lambda a, b: momentum * a + (1 - momentum) * b, old, new)
        mean = mean._replace(batches=old.batches + new.batches)
        return _unless_empty(old.batches, new.batches, old, new, mean)

    return Observer(_seen, merge, lambda state, scheme, bits: Range(state.low, state.high))


def percentile(percent: float = 99.99) -> Observer:
    """Leaves out 100 − `percent` percent of the values at either end, to a histogram bin.

    Args:
      percent: In (50, 100]; 100 leaves out nothing.

    Raises:
      ValueError: If it is not.

    Source: Wu et al., Integer Quantization for Deep Learning Inference: Principles and Empirical
    Evaluation, arXiv 2004.09602, section 5.

    Example:
      >>> observer = percentile(99.0)
      >>> x = jnp.linspace(0.0, 1.0, 1000).at[0].set(50.0)
      >>> print(observer.value(observer.init(x), None, 8).high < 1.1)
      True
    """
    if not 50 < core.check_positive("percent", percent) <= 100:
        raise ValueError(f"percent must be in (50, 100], got {percent}")

    def value(state, scheme, bits):
        allowed = state.total * ((100 - percent) / 100)
        edges = _radius(state.exponent) * jnp.linspace(-1.0, 1.0, BINS + 1)
        kept_below = jnp.cumsum(state.counts) > allowed
        kept_above = jnp.cumsum(state.counts[::-1])[::-1] > allowed
        low = jnp.min(jnp.where(kept_below, edges[:-1], 0.0))
        high = jnp.max(jnp.where(kept_above, edges[1:], 0.0))
        return Range(jnp.maximum(low, state.low), jnp.minimum(high, state.high))

    return Observer(_histogram, _merge_histograms, value)


def mse() -> Observer:
    """The range with the least mean squared error of fake-quantization at the given bit-width.

    It is searched among 1/100, 2/100, …, 1 times the min-max range, on the histogram's mid-points.

    Source: Nagel et al., A White Paper on Neural Network Quantization, arXiv 2106.08295, section
    3.1.

    Example:
      >>> from hybrid_jax.quantization import grids
      >>> observer = mse()
      >>> x = jax.random.normal(jax.random.key(0), (10_000,))
      >>> span = observer.value(observer.init(x), grids.symmetric, 4)
      >>> bool(span.high < jnp.abs(x).max())
      True
    """

    def value(state, scheme, bits):
        middles = _radius(state.exponent) * jnp.linspace(-1 + 1 / BINS, 1 - 1 / BINS, BINS)
        widest = Range(jnp.minimum(state.low, 0.0), jnp.maximum(state.high, 0.0))

        def error(fraction):
            grid = scheme(Range(widest.low * fraction, widest.high * fraction), bits)
            return jnp.sum(state.counts * (gradients.fake_quant(middles, grid) - middles) ** 2)

        fractions = jnp.linspace(1.0, 1 / _CLIPS, _CLIPS)
        best = fractions[jnp.argmin(lax.map(error, fractions))]
        return Range(widest.low * best, widest.high * best)

    return Observer(_histogram, _merge_histograms, value)


METHODS = {"minmax": minmax, "ema": moving_average, "percentile": percentile, "mse": mse}


def observer(method: str | Observer) -> Observer:
    """The observer of that name ('minmax', 'ema', 'percentile', 'mse'), or the one given.

    Raises:
      ValueError: If there is none of that name; the message names the nearest.
    """
    if isinstance(method, Observer):
        return method
    return METHODS[core.check_choice("method", method, METHODS)]()


def _seen(x):
    return Seen(*extent(x), jnp.ones((), jnp.float32))


def _unless_empty(old_count, new_count, old, new, merged):
    # In a branch of `cond` that was not taken a site has seen nothing: its state is all zeros.
    later = jax.tree.map(partial(jnp.where, old_count == 0), new, merged)
    return jax.tree.map(partial(jnp.where, new_count == 0), old, later)


def _histogram(x):
    x = x.astype(jnp.float32).ravel()
    low, high = extent(x)
    reach = jnp.maximum(-low, high)
    # frexp: reach = m · 2^exponent with m < 1, so that every value lies inside.
    exponent = jnp.where(reach > 0, jnp.frexp(reach)[1], jnp.finfo(jnp.float32).minexp)
    bins = jnp.floor(x / _radius(exponent) * (BINS // 2)).astype(jnp.int32) + BINS // 2
    counts = jnp.zeros(BINS).at[jnp.clip(bins, 0, BINS - 1)].add((x != 0).astype(jnp.float32))
    return Histogram(low, high, counts, exponent, jnp.float32(x.size))


def _merge_histograms(old, new):
    exponent = jnp.maximum(old.exponent, new.exponent)

    def widened(histogram):
        # Arithmetic shift: bins −2 and −1 become −1, bins 0 and 1 become 0.
        shift = jnp.minimum(exponent - histogram.exponent, 31)
        bins = ((jnp.arange(BINS) - BINS // 2) >> shift) + BINS // 2
        return jnp.zeros(BINS).at[bins].add(histogram.counts)

    merged = Histogram(
        jnp.minimum(old.low, new.low),
        jnp.maximum(old.high, new.high),
        widened(old) + widened(new),
        exponent,
        old.total + new.total,
    )
    return _unless_empty(old.total, new.total, old, new, merged)


def _radius(exponent):
    return jnp.ldexp(jnp.float32(1.0), exponent)
