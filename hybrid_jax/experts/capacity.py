"""Capacity: how many inputs of a batch an expert takes, and which."""

import fractions
import math
from typing import NamedTuple

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


class BestInputs(NamedTuple):
    """The inputs with the largest scores, for each expert, as many as its capacity.

    Attributes:
      indices: int32 `(E, C)`, best first; C is the capacity of the whole batch.
      taken: bool `(C,)`, whether a place is within the capacity of the inputs that count.
      held: bool `(B, E)`, whether an expert takes an input.
    """

    indices: jax.Array
    taken: jax.Array
    held: jax.Array


def best_inputs(
    scores: jax.Array, k: int, factor: float, weight: jax.Array | None = None
) -> BestInputs:
    """Chooses the inputs for the places of each expert: those of the largest scores.

    Ties go to the lowest index. NaN counts as the least, so that a bad input takes no other's
    place. Inputs of weight 0 take none, and the capacity is that of the others.

    Args:
      scores: float `(B, E)`; those of inputs that do not count may be anything.
      k: As of `capacity`.
      factor: As of `capacity`.
      weight: `(B,)`; None counts all.

    Example:
      >>> scores = jnp.array([[0.1, 0.5], [0.3, 0.5], [0.2, jnp.nan]])
      >>> best = best_inputs(scores, k=1, factor=1.0)  # ceil(3/2) = 2 places
      >>> best.indices.tolist(), best.held.tolist()
      ([[1, 2], [0, 1]], [[False, True], [True, True], [True, False]])
      >>> best_inputs(scores, 1, 1.0, jnp.array([1, 1, 0])).held.tolist()  # ceil(2/2) = 1 place
      [[False, True], [True, False], [False, False]]
    """
    batch, num_experts = scores.shape
    places = capacity(batch, num_experts, k, factor)
    # The capacity of each count of inputs, for how many count is known when it runs.
    table = [0, *(capacity(n, num_experts, k, factor) for n in range(1, batch + 1))]
    counts = core.selected(jnp.ones(batch, bool), weight)
    taken = jnp.arange(places) < jnp.array(table)[counts.sum()]
    ranked = jnp.where(jnp.isnan(scores) | ~counts[:, None], -jnp.inf, scores)
    _, indices = jax.lax.top_k(ranked.T, places)
    held = jax.vmap(lambda chosen: jnp.zeros(batch, bool).at[chosen].set(taken))(indices)
    return BestInputs(indices, taken, held.T & counts[:, None])
