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

    The factor is read as the decimal that it is written as, so that 1.1 of 10 is 11. Source: Fedus
    et al., Switch Transformers, arXiv 2101.03961, eq. 3 (there for K = 1).
    """
    batch = core.check_integer("batch", batch, 1)
    num_experts = core.check_integer("num_experts", num_experts, 1)
    k = core.check_integer("k", k, 1, num_experts)
    factor = core.check_positive("capacity_factor", factor)
    return min(batch, math.ceil(fractions.Fraction(str(factor)) * batch * k / num_experts))


class BestInputs(NamedTuple):
    """Inputs of each expert `(E, C)`, best first; places taken `(C,)`; what is held `(B, E)`."""

    indices: jax.Array
    taken: jax.Array
    held: jax.Array


def best_inputs(
    scores: jax.Array, k: int, factor: float, weight: jax.Array | None = None
) -> BestInputs:
    """Those of largest scores `(B, E)` for each expert; of ties the lowest index, NaN least."""
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
    the whole batch; at inference an input alone goes by `top_k`. `k` is how many experts an input
    has on average, at a factor of 1. With `normalize` the softmax runs over the experts that picked
    the input, otherwise over all, as in the source: Zhou et al., Mixture-of-Experts with Expert
    Choice Routing, arXiv 2202.09368, whose capacity factor is `k * capacity_factor`.

    Example:
      >>> logits = jnp.array([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
      >>> expert_choice(1)(logits).weights[:, 0].tolist()
      [1.0, 1.0, 0.0, 0.0]
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
