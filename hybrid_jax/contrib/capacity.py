"""Capacity: how many inputs of a batch an expert takes, and which."""

import fractions
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybrid_jax import core
from hybrid_jax.experts.routing import Routed, Routing, of_those_that_count, softmax_of


def capacity(batch: int, num_experts: int, k: int = 1, factor: float = 1.0) -> int:
    """ceil(factor · B · K / E), at most B: the places of each expert.

    With a factor of 1 and every place taken, each input has K experts on average. The factor is
    read as the decimal that it is written as, so that 1.1 of 10 is 11. Source: Fedus et al., Switch
    Transformers, arXiv 2101.03961, eq. 3 (there for K = 1).

    Example:
      >>> capacity(10, 4), capacity(10, 4, k=2, factor=1.2), capacity(10, 4, factor=4.0)
      (3, 6, 10)
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
    """Chooses the inputs for the places of each expert: those of the largest scores `(B, E)`.

    Ties go to the lowest index. NaN counts as the least, so that a bad input takes no other's
    place. Inputs of weight 0 take none, and the capacity is that of the others.

    Example:
      >>> scores = jnp.array([[0.1, 0.5], [0.3, 0.5], [0.2, jnp.nan]])
      >>> best = best_inputs(scores, k=1, factor=1.0)  # ceil(3/2) = 2 places
      >>> best.indices.tolist(), best.held.tolist()
      ([[1, 2], [0, 1]], [[False, True], [True, True], [True, False]])
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


def expert_choice(k: int, capacity_factor: float = 1.0, *, normalize: bool = True) -> Routing:
    """Each expert picks the inputs that the gate most gives it, as many as its `capacity`.

    The load is even by construction, at the price that an input may have several experts or none:
    then its weights and its output are zero, and it counts in `Aux.unrouted`. The choice depends on
    the whole batch, so it is one for training; at inference an input alone goes by `top_k`. An
    expert does not pick what has probability 0. Source: Zhou et al., Mixture-of-Experts with Expert
    Choice Routing, arXiv 2202.09368, whose capacity factor is `k * capacity_factor`.

    Args:
      k: K, from 1 to E: how many experts an input has on average, at a factor of 1.
      capacity_factor: Above 0.
      normalize: True: the softmax runs over the experts that picked the input, and the weights of
        an input with any sum to one. False: the softmax over all experts, as in the source.

    Example:
      >>> logits = jnp.array([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
      >>> expert_choice(1)(logits).weights
      Array([[1., 0.],
             [1., 0.],
             [0., 1.],
             [0., 1.]], dtype=float32)
    """
    core.check_integer("k", k, 1)
    core.check_positive("capacity_factor", capacity_factor)

    @of_those_that_count
    def route(logits, key, weight):
        del key
        # Ranked by logarithms, where small probabilities do not vanish and tie.
        scores = jax.nn.log_softmax(logits)
        held = best_inputs(scores, k, capacity_factor, weight).held
        kept = held & ~jnp.isneginf(scores)
        return Routed(softmax_of(logits, kept, normalize), logits)

    return route
