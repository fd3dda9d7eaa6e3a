"""Capacity: how many inputs of a batch an expert takes, and which."""

import fractions
import math

import jax
import jax.numpy as jnp

from hybrid_jax import core


def capacity(batch: int, num_experts: int, k: int = 1, factor: float = 1.0) -> int:
    """ceil(factor · B · K / E), at most B: the places of each expert.

    With a factor of 1 and every place taken, each input has K experts on average. The factor is
    read as the decimal that it is written as, so that 1.1 of 10 is 11. Source: Fedus et al., Switch
    Transformers, arXiv 2101.03961, eq. 3 (there for K = 1).

    Args:
      batch: B, at least 1.
      num_experts: E, at least 1.
      k: K, from 1 to E.
      factor: The capacity factor, above 0.

    Raises:
      ValueError: If one of them is out of its range: there is no capacity of 0.

    Example:
      >>> capacity(10, 4), capacity(10, 4, k=2, factor=1.2), capacity(10, 4, factor=4.0)
      (3, 6, 10)
      >>> capacity(10, 4, factor=0)
      Traceback (most recent call last):
      ...
      ValueError: capacity_factor must be a finite number above 0, got 0
    """
    batch = core.check_integer("batch", batch, 1)
    num_experts = core.check_integer("num_experts", num_experts, 1)
    k = core.check_integer("k", k, 1, num_experts)
    factor = core.check_positive("capacity_factor", factor)
    return min(batch, math.ceil(fractions.Fraction(str(factor)) * batch * k / num_experts))


def best_inputs(scores: jax.Array, places: int) -> tuple[jax.Array, jax.Array]:
    """The inputs with the largest scores, for each expert.

    Ties go to the lowest index. NaN counts as the least, so that a bad input takes no other's
    place.

    Args:
      scores: float `(B, E)`.
      places: C, from 1 to B.

    Returns:
      Their indices, int32 `(E, C)`, best first, and whether each is among them, bool `(B, E)`.

    Example:
      >>> indices, held = best_inputs(jnp.array([[0.1, 0.5], [0.3, 0.5], [0.2, jnp.nan]]), 2)
      >>> indices.tolist()
      [[1, 2], [0, 1]]
      >>> held.tolist()
      [[False, True], [True, True], [True, False]]
    """
    ranked = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    _, indices = jax.lax.top_k(ranked.T, places)
    held = jax.vmap(lambda chosen: jnp.zeros(len(scores), bool).at[chosen].set(True))(indices)
    return indices, held.T
