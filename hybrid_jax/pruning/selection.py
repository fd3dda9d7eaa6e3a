"""Exact counts: how many units a sparsity removes, and which are kept."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core


def check_sparsity(
    sparsity: float | jax.Array, name: str = "sparsity", most: float = 1.0
) -> float | jax.Array:
    """Returns `sparsity` as a float if it lies in [0, `most`], as it is if it is traced."""
    if np.ndim(sparsity):
        raise ValueError(f"{name} must be one number, got shape {np.shape(sparsity)}")
    if core.is_traced(sparsity):
        return sparsity
    # NumPy holds the value where a comparison of jax arrays would be traced, inside `jit`.
    value = np.asarray(sparsity).item() if hasattr(sparsity, "dtype") else sparsity
    value = core.check_fraction(name, value)
    if value > most + 1e-6:
        raise ValueError(f"{name} must be in [0, {most:g}], got {value:g}")
    return value


def removed_count(sparsity: float | jax.Array, n: int | jax.Array) -> int | jax.Array:
    """floor(sparsity · n + ½): how many of `n` units a sparsity removes.

    Sparsity is read to six decimals, which float32 holds, and the rest is integer arithmetic: a
    Python 0.9 and a traced float32 0.9 mean the same count, compiled or not, however large `n`.
    Traced, what lies outside [0, 1] counts as the nearer end of it, and NaN as 0.

    `n` is below 2³¹; the result is () int32 if an argument is traced.
    """
    if core.is_traced((sparsity, n)):
        return _traced_count(sparsity, n)
    millionths = round(np.float32(1e6) * np.float32(sparsity))
    return (millionths * int(n) + 500_000) // 1_000_000


@jax.jit
def _traced_count(sparsity, n):
    fraction = jnp.clip(jnp.nan_to_num(jnp.asarray(sparsity, jnp.float32)), 0, 1)
    millionths = jnp.round(jnp.float32(1e6) * fraction).astype(jnp.int32)
    # millionths · n / 10⁶ does not fit 32 bits: split n at 10⁶ and the millionths at 10³.
    n = jnp.asarray(n, jnp.int32)
    whole, rest = n // 1_000_000, n % 1_000_000
    high, low = millionths // 1000, millionths % 1000
    carried, left = high * rest // 1000, high * rest % 1000
    return millionths * whole + carried + (left * 1000 + low * rest + 500_000) // 1_000_000


def keep_best(scores: jax.Array, kept: int | jax.Array) -> jax.Array:
    """Marks the `kept`, one or (..., 1), highest of the last axis; of equals the lower index."""
    return (_keep_known if isinstance(scores, np.ndarray) else _keep_traced)(scores, kept)


def _keep_known(scores, kept):
    n = scores.shape[-1]
    place = np.broadcast_to(np.minimum(n - kept, n - 1), (*scores.shape[:-1], 1))
    threshold = np.take_along_axis(np.partition(scores, np.unique(place), -1), place, -1)
    above, tied = scores > threshold, scores == threshold
    room = kept - _count(above)
    return above | (tied & (np.cumsum(tied, axis=-1, dtype=np.int32) <= room))


@jax.jit
def _keep_traced(scores, kept):
    kept = jnp.asarray(kept, jnp.int32)
    ordered = _ordered_integers(scores)
    index = jax.lax.broadcasted_iota(jnp.uint32, ordered.shape, ordered.ndim - 1)
    # Found by bisection, a pass for each bit: a fourth of the time that a sort takes on a CPU.
    threshold = _largest(lambda x: _count(ordered >= x) >= kept, ordered.shape, 32)
    above, tied = ordered > threshold, ordered == threshold
    room = kept - _count(above)
    end = _largest(
        lambda x: _count(tied & (index < x)) <= room, ordered.shape, scores.shape[-1].bit_length()
    )
    return above | (tied & (index < end))


def rankable(scores: jax.Array) -> jax.Array:
    """float32 scores that are finite: NaN and −∞ rank lowest, ∞ highest, equals by index."""
    lowest = np.finfo(np.float32).min
    return scores.__array_namespace__().nan_to_num(scores.astype(np.float32), nan=lowest)


def _compiled_unless_known(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f(scores, *rest)`, compiled unless the scores are NumPy's."""
    compiled = jax.jit(f, static_argnames="multiple")

    @functools.wraps(f)
    def run(scores, *rest, **options):
        known = isinstance(scores, np.ndarray)
        return (f if known else compiled)(scores, *rest, **options)

    return run


@_compiled_unless_known
def in_steps(scores: jax.Array, multiple: int) -> jax.Array:
    """Gives each unit of (rows, n) the mean score of its step of `multiple`, best units first."""
    xp, n = scores.__array_namespace__(), scores.shape[-1]
    order = xp.argsort(-scores, axis=-1, stable=True)
    falling = xp.take_along_axis(scores, order, axis=-1)
    steps = xp.pad(falling, ((0, 0), (0, -n % multiple))).reshape(len(scores), -1, multiple)
    sizes = np.diff(np.arange(0, n, multiple), append=n).astype(scores.dtype)
    # One after the other, so that the sum is the same to the bit wherever it is computed.
    means = sum(steps[:, :, i] for i in range(multiple)) / sizes[None]
    # Rounding must not lift a later step of equal scores above an earlier one.
    means = (np.minimum.accumulate if xp is np else jax.lax.cummin)(means, axis=1)
    rank = xp.argsort(order, axis=-1)
    return xp.take_along_axis(means, rank // multiple, axis=-1)


@_compiled_unless_known
def whole_steps(scores: jax.Array, kept: jax.Array, multiple: int) -> jax.Array:
    """Rounds the count that each row (rows, n) keeps to whole steps, half a step up: its best."""
    xp, count = kept.__array_namespace__(), _count(kept)
    whole = count // multiple * multiple
    step = xp.minimum(multiple, scores.shape[-1] - whole)
    return keep_best(scores, whole + xp.where(2 * (count - whole) >= step, step, 0))


def _count(marked: jax.Array) -> jax.Array:
    return marked.sum(axis=-1, keepdims=True, dtype=np.int32)


def _largest(holds: Callable[[jax.Array], jax.Array], shape: tuple[int, ...], bits: int):
    """(..., 1) uint32, for each row of `shape` the largest of `bits` bits up to which `holds`."""

    def settle(i, x):
        candidate = x | (jnp.uint32(1) << jnp.uint32(bits - 1 - i))
        return jnp.where(holds(candidate), candidate, x)

    return jax.lax.fori_loop(0, bits, settle, jnp.zeros((*shape[:-1], 1), jnp.uint32))


def _ordered_integers(x: jax.Array) -> jax.Array:
    """uint32 in the order of the floats `x`."""
    x = jnp.where(x == 0, 0.0, x.astype(jnp.float32))  # -0.0 equals 0.0
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))
