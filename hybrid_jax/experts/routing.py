"""Routings: pure functions from gate logits `(B, E)` to the weight `(B, E)` of each expert.

A routing is `routing(logits, key=None, weight=None) -> Routed`. NaN in an input's gate logits gives
NaN weights for that input, and so a NaN output: it is never routed in silence. Ties go to the
lowest index. A routing that goes by costs is `cost_aware`, in `budget`.

`weight` `(B,)` says which inputs count: one of weight 0, as padding has, takes no expert and no
place of one, whatever its logits are. The others are routed as they would be without it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybrid_jax import core
from hybrid_jax.experts.capacity import best_inputs


class Routed(NamedTuple):
    """What a routing decided.

    Attributes:
      weights: float `(B, E)`, zero where an expert was not chosen.
      scores: float `(B, E)`, the logits that it went by (with their noise, if any).
    """

    weights: jax.Array
    scores: jax.Array


Routing = Callable[[jax.Array, jax.Array | None, jax.Array | None], Routed]


def _of_those_that_count(route: Routing) -> Routing:
    """`route`, whose other inputs have no weight, nor a gradient where their logits are NaN."""

    @functools.wraps(route)
    def counting(logits, key=None, weight=None):
        routed = route(core.selected(logits, weight), key, weight)
        return Routed(core.selected(routed.weights, weight), routed.scores)

    return counting


def soft(temperature: float = 1.0) -> Routing:
    """Every expert, weighted by the softmax of the logits (Jacobs et al. 1991).

    Args:
      temperature: Divides the logits; above 0.

    Raises:
      ValueError: If `temperature` is not a finite number above 0.

    Example:
      >>> soft()(jnp.array([[0.0, 0.0]])).weights
      Array([[0.5, 0.5]], dtype=float32)
    """
    core.check_positive("temperature", temperature)

    @_of_those_that_count
    def route(logits, key, weight):
        del key, weight
        scores = logits / temperature
        return Routed(jax.nn.softmax(scores), scores)

    return route


def top_k(k: int, *, normalize: bool = True) -> Routing:
    """The K experts with the largest logits, weighted by softmax.

    Args:
      k: K, from 1 to E.
      normalize: True: the softmax runs over the chosen experts alone and the weights sum to one
        (Shazeer et al., Outrageously Large Neural Networks, arXiv 1701.06538, eq. 3-5); with K = 1
        the weight is exactly 1 and the gate gets no gradient (see `straight_through`). False: the
        softmax over all experts, cut to the chosen (Fedus et al., arXiv 2101.03961).

    Raises:
      ValueError: If `k` is not an integer from 1 to E (E known when called).

    Example:
      >>> top_k(2)(jnp.array([[1.0, 5.0, 5.0]])).weights
      Array([[0. , 0.5, 0.5]], dtype=float32)
      >>> top_k(4)(jnp.zeros((1, 3)))
      Traceback (most recent call last):
      ...
      ValueError: k must be an integer in [1, 3], got 4
    """
    core.check_integer("k", k, 1)

    @_of_those_that_count
    def route(logits, key, weight):
        del key, weight
        num_experts = logits.shape[-1]
        core.check_integer("k", k, 1, num_experts)
        _, chosen = jax.lax.top_k(logits, k)
        kept = jax.nn.one_hot(chosen, num_experts, dtype=bool).any(-2)
        return Routed(_softmax_of(logits, kept, normalize), logits)

    return route


def switch() -> Routing:
    """The one expert with the largest logit, weighted by its probability (Fedus et al. 2021).

    The weight scales the output, which gives the gate a gradient and leaves the top-1 class alone.
    Source: Switch Transformers, arXiv 2101.03961, eq. 2.

    Example:
      >>> switch()(jnp.array([[0.0, 0.0]])).weights
      Array([[0.5, 0. ]], dtype=float32)
    """
    return top_k(1, normalize=False)


def noisy_top_k(k: int, noise: float = 1.0, *, normalize: bool = True) -> Routing:
    """`top_k` of the logits plus Gaussian noise, so that every expert is tried.

    Source: Shazeer et al., arXiv 1701.06538, eq. 4, with the constant deviation of Riquelme et al.,
    arXiv 2106.05974. Without a key (at inference) there is no noise.

    Args:
      k: K, from 1 to E.
      noise: Standard deviation, in units of logits; above 0.
      normalize: As for `top_k`.

    Raises:
      ValueError: If `k` is not from 1 to E or `noise` not above 0.

    Example:
      >>> routed = noisy_top_k(1)(jnp.zeros((1, 3)), jax.random.key(0))
      >>> int((routed.weights > 0).sum())
      1
    """
    core.check_positive("noise", noise)
    chosen = top_k(k, normalize=normalize)

    def route(logits, key=None, weight=None):
        if key is not None:
            logits = logits + noise * jax.random.normal(key, logits.shape, logits.dtype)
        return chosen(logits, None, weight)

    return route


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

    Raises:
      ValueError: If `k` is not an integer from 1 to E or the factor not above 0.

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

    @_of_those_that_count
    def route(logits, key, weight):
        del key
        # Ranked by logarithms, where small probabilities do not vanish and tie.
        scores = jax.nn.log_softmax(logits)
        held = best_inputs(scores, k, capacity_factor, weight).held
        kept = held & ~jnp.isneginf(scores)
        return Routed(_softmax_of(logits, kept, normalize), logits)

    return route


def straight_through(routing: Routing) -> Routing:
    """Weights of `routing`, gradient of the full softmax over its scores.

    The outputs are to the bit those of the discrete choice that is deployed, while the gate learns
    from every expert whether it would have been better. Source: Bengio et al., Estimating or
    Propagating Gradients Through Stochastic Neurons, arXiv 1308.3432.

    Example:
      >>> weight = lambda logits: straight_through(top_k(1))(logits).weights[0, 0]
      >>> jax.value_and_grad(weight)(jnp.array([[0.0, 0.0]]))
      (Array(1., dtype=float32), Array([[ 0.25, -0.25]], dtype=float32))
    """

    @_of_those_that_count
    def route(logits, key, weight):
        hard = routing(logits, key, weight)
        probabilities = jax.nn.softmax(hard.scores)
        # The bracket is exactly zero, and so leaves the hard weights to the bit.
        weights = jax.lax.stop_gradient(hard.weights) + (
            probabilities - jax.lax.stop_gradient(probabilities)
        )
        return Routed(weights, hard.scores)

    return route


def random() -> Routing:
    """One expert at random, whatever the gate says (but NaN stays NaN): a control for evaluation.

    Raises:
      ValueError: If called without a key.

    Example:
      >>> random()(jnp.zeros((5, 3)), jax.random.key(0)).weights.sum(-1)
      Array([1., 1., 1., 1., 1.], dtype=float32)
    """

    @_of_those_that_count
    def route(logits, key, weight):
        del weight
        if key is None:
            raise ValueError("key must be a jax.random.key for random routing, got None")
        scores = jax.random.gumbel(key, logits.shape, logits.dtype)
        bad = jnp.isnan(logits).any(-1, keepdims=True)
        return Routed(jnp.where(bad, jnp.nan, _one_hot_argmax(scores)), scores)

    return route


def oracle(expert_logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The best expert for each input, known from its label: the bound on any top-1 gate.

    An expert with NaN logits is the best only where all are so.

    Args:
      expert_logits: float `(E, B, N)`.
      labels: int `(B,)` in [0, N); a traced one outside goes to the first expert, which is wrong as
        all are.

    Returns:
      One-hot float `(B, E)`: an expert that is right if there is one, and among those (or if none
      is) the one with the highest probability of the label.

    Raises:
      ValueError: If shapes differ, or labels are not integers or (where they are known) outside
        [0, N).

    Example:
      >>> logits = jnp.array([[[2.0, 0.0]], [[0.0, 1.0]]])
      >>> oracle(logits, jnp.array([1]))
      Array([[0., 1.]], dtype=float32)
    """
    if expert_logits.shape[1:-1] != labels.shape:
        raise ValueError(
            f"expert_logits must have shape (E, {len(labels)}, N), got {expert_logits.shape}"
        )
    right = core.top_class(expert_logits) == labels[None]
    labelled = core.one_hot(labels, expert_logits.shape[-1]).astype(expert_logits.dtype)
    probability = (jax.nn.softmax(expert_logits) * labelled[None]).sum(-1)
    probability = jnp.where(jnp.isnan(probability), -1, probability)
    return _one_hot_argmax((right.astype(probability.dtype) + probability).T)


def _softmax_of(logits, kept, normalize):
    """Softmax over the kept experts (or over all, then cut to those); a row of none is zero."""
    scores = jax.nn.log_softmax(logits)
    # A row with NaN is NaN all along, and stays so. It would not, if it were multiplied by a mask:
    # compiled, that may become a select.
    kept = kept | jnp.isnan(scores)
    if normalize:
        none = ~kept.any(-1, keepdims=True)
        scores = jnp.where(kept | none, scores, -jnp.inf)
    return jnp.where(kept, jax.nn.softmax(scores), 0)


def _one_hot_argmax(scores):
    return jax.nn.one_hot(jnp.argmax(scores, -1), scores.shape[-1], dtype=scores.dtype)
