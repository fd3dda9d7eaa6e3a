"""Histograms whose bins widen by powers of two, so that they stream over batches without loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybrid_jax.quantization.grids import extent

BINS = 2048
"""Bins of a histogram over [−radius, radius): at least a quarter of them lie below max |x|."""


class Histogram(NamedTuple):
    """Counts in `BINS` equal bins over [−2^exponent, 2^exponent), two of which meet at zero.

    The radius is a power of two, so that widening merges whole bins and loses nothing.
    """

    low: jax.Array  # float32 (), the least value
    high: jax.Array  # float32 (), the greatest value
    counts: jax.Array  # float32 (BINS,), without exact zeros: these are on every grid
    exponent: jax.Array  # int32 ()
    total: jax.Array  # float32 (), how many values, exact zeros included


def histogram(x: jax.Array) -> Histogram:
    """The histogram of all values of an array."""
    x = x.astype(jnp.float32).ravel()
    low, high = extent(x)
    reach = jnp.maximum(-low, high)
    # frexp: reach = m · 2^exponent with m < 1, so that every value lies inside.
    exponent = jnp.where(reach > 0, jnp.frexp(reach)[1], jnp.finfo(jnp.float32).minexp)
    bins = jnp.floor(x / radius(exponent) * (BINS // 2)).astype(jnp.int32) + BINS // 2
    # Counted in integers, for a float32 stops at 2^24.
    ones = (x != 0).astype(jnp.int32)
    counts = jnp.zeros(BINS, jnp.int32).at[jnp.clip(bins, 0, BINS - 1)].add(ones)
    return Histogram(low, high, counts.astype(jnp.float32), exponent, jnp.float32(x.size))


def merge(old: Histogram, new: Histogram) -> Histogram:
    """The histogram of the values of both."""
    exponent = jnp.maximum(old.exponent, new.exponent)

    def widened(histogram):
        # Arithmetic shift: bins −2 and −1 become −1, bins 0 and 1 become 0.
        shift = jnp.minimum(exponent - histogram.exponent, 31)
        bins = ((jnp.arange(BINS) - BINS // 2) >> shift) + BINS // 2
        return jnp.zeros(BINS).at[bins].add(histogram.counts)

    return Histogram(
        jnp.minimum(old.low, new.low),
        jnp.maximum(old.high, new.high),
        widened(old) + widened(new),
        exponent,
        old.total + new.total,
    )


def middles(exponent: jax.Array) -> jax.Array:
    """(BINS,) values in the middle of each bin."""
    return radius(exponent) * jnp.linspace(-1 + 1 / BINS, 1 - 1 / BINS, BINS, dtype=jnp.float32)


def radius(exponent: jax.Array) -> jax.Array:
    """2^exponent, the end of the last bin."""
    return jnp.ldexp(jnp.float32(1.0), exponent)
