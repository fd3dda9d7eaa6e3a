"""Exact counts: how many units a sparsity removes, and which are kept."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core


def check_sparsity(
    sparsity: float | jax.Array, name: str = "sparsity", most: float = 1.0
) -> float | jax.Array:
    """Returns `sparsity` as a float if it lies in [0, `most`], as it is if it is traced.

    Raises:
      ValueError: If a concrete `sparsity` lies outside.

    Example:
      >>> check_sparsity(0.8, most=0.5)
      Traceback (most recent call last):
      ...
      ValueError: sparsity must be in [0, 0.5], got 0.8
    """
    if is_traced(sparsity):
        return sparsity
    # NumPy holds the value where a comparison of jax arrays would be traced, inside `jit`.
    value = np.asarray(sparsity).item() if hasattr(sparsity, "dtype") else sparsity
    value = core.check_fraction(name, value)
    if value > most + 1e-6:
        raise ValueError(f"{name} must be in [0, {most:g}], got {value:g}")
    return value


def is_traced(tree: object) -> bool:
    """Whether a leaf's values are unknown because `jit`, `vmap` or `grad` is tracing."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


@jax.jit
def removed_count(sparsity: float | jax.Array, n: int | jax.Array) -> jax.Array:
    """floor(sparsity · n + ½): how many of `n` units a sparsity removes.

    Sparsity is read to six decimals, which float32 holds, and the rest is integer arithmetic: a
    Python 0.9 and a traced float32 0.9 mean the same count, compiled or not, however large `n`.

    Args:
      sparsity: () fraction in [0, 1], maybe traced.
      n: () number of units, below 2³¹.

    Returns:
      () int32.

    Example:
      >>> [int(removed_count(0.9, n)) for n in (4, 5, 25_000_000)]
      [4, 5, 22500000]
    """
    millionths = jnp.round(jnp.float32(1e6) * jnp.asarray(sparsity, jnp.float32)).astype(jnp.int32)
    # millionths · n / 10⁶ does not fit 32 bits: split n at 10⁶ and the millionths at 10³.
    n = jnp.asarray(n, jnp.int32)
    whole, rest = n // 1_000_000, n % 1_000_000
    high, low = millionths // 1000, millionths % 1000
    carried, left = high * rest // 1000, high * rest % 1000
    return millionths * whole + carried + (left * 1000 + low * rest + 500_000) // 1_000_000


@jax.jit
def keep_best(scores: jax.Array, kept: int | jax.Array) -> jax.Array:
    """Marks the `kept` highest of the last axis; of equal scores the lower index is kept.

    Args:
      scores: (..., n) floats.
      kept: () integer in [0, n], maybe traced.

    Returns:
      (..., n) bool with exactly `kept` True in each row.

    Example:
      >>> import jax.numpy as jnp
      >>> keep_best(jnp.array([1.0, 2.0, 1.0, 0.0]), 2)
      Array([ True,  True, False, False], dtype=bool)
    """
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


def _count(marked: jax.Array) -> jax.Array:
    return jnp.sum(marked, axis=-1, keepdims=True, dtype=jnp.int32)


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
