"""Routings: pure functions from gate logits `(B, E)` to the weight `(B, E)` of each expert.

A routing is `routing(logits, key=None, weight=None) -> Routed`. NaN in an input's gate logits gives
NaN weights for that input, and so a NaN output: it is never routed in silence. Ties go to the
lowest index. A routing that goes by costs is `cost_aware`, in `budget`.

`weight` `(B,)` says which inputs count: one of weight 0, as padding has, takes no expert,
whatever its logits are. The others are routed as they would be without it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybrid_jax import core


class Routed(NamedTuple):
    """What a routing decided."""

    weights: jax.Array  # float `(B, E)`, zero where an expert was not chosen
    scores: jax.Array  # float `(B, E)`, the logits that it went by (with their noise, if any)


Routing = Callable[[jax.Array, jax.Array | None, jax.Array | None], Routed]


def of_those_that_count(route: Routing) -> Routing:
    """`route`, whose other inputs have no weight, nor a gradient where their logits are NaN."""

    @functools.wraps(route)
    def counting(logits, key=None, weight=None):
        routed = route(core.selected(logits, weight), key, weight)
        return Routed(core.selected(routed.weights, weight), routed.scores)

    return counting


def soft(temperature: float = 1.0) -> Routing:
    """Every expert, weighted by the softmax of the logits (Jacobs et al. 1991)."""
    core.check_positive("temperature", temperature)

    @of_those_that_count
    def route(logits, key, weight):
        del key, weight
        scores = logits / temperature
        return Routed(jax.nn.softmax(scores), scores)

    return route


def top_k(k: int, *, normalize: bool = True) -> Routing:
    """The K experts with the largest logits, weighted by softmax.

    With `normalize` the softmax runs over the chosen experts alone and the weights sum to one
    (Shazeer et al., Outrageously Large Neural Networks, arXiv 1701.06538, eq. 3-5); with K = 1 the
    weight is exactly 1 and the gate gets no gradient (see `straight_through`). Else it is the
    softmax over all experts, cut to the chosen (Fedus et al., arXiv 2101.03961).

    Example:
      >>> top_k(2)(jnp.array([[1.0, 5.0, 5.0]])).weights
      Array([[0. , 0.5, 0.5]], dtype=float32)
    """
    core.check_integer("k", k, 1)

    @of_those_that_count
    def route(logits, key, weight):
        del key, weight
        num_experts = logits.shape[-1]
        core.check_integer("k", k, 1, num_experts)
        _, chosen = jax.lax.top_k(logits, k)
        kept = jax.nn.one_hot(chosen, num_experts, dtype=bool).any(-2)
        return Routed(softmax_of(logits, kept, normalize), logits)

    return route


def switch() -> Routing:
    """The one expert with the largest logit, weighted by its probability (Fedus et al. 2021).

    The weight scales the output, which gives the gate a gradient and leaves the top-1 class alone.
    Source: Switch Transformers, arXiv 2101.03961, eq. 2.
    """
    return top_k(1, normalize=False)


def noisy_top_k(k: int, noise: float = 1.0) -> Routing:
    """`top_k` of the logits plus noise of that deviation, so that every expert is tried.

    Without a key (at inference) there is none. Source: Shazeer et al., arXiv 1701.06538, eq. 4,
    with the constant deviation of Riquelme et al., arXiv 2106.05974.
    """
    core.check_positive("noise", noise)
    chosen = top_k(k)

    def route(logits, key=None, weight=None):
        if key is not None:
            logits = logits + noise * jax.random.normal(key, logits.shape, logits.dtype)
        return chosen(logits, None, weight)

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

    @of_those_that_count
    def route(logits, key, weight):
        hard = routing(logits, key, weight)
        probabilities = jax.nn.softmax(hard.scores)
        # The bracket is exactly zero, and so leaves the hard weights to the bit.
        weights = jax.lax.stop_gradient(hard.weights) + (
            probabilities - jax.lax.stop_gradient(probabilities)
        )
        return Routed(weights, hard.scores)

    return route


ROUTINGS: dict[str, Callable[[int, float], Routing]] = {
    "soft": lambda k, noise: soft(),
    "top_1": lambda k, noise: straight_through(top_k(1)),
    "top_k": lambda k, noise: straight_through(top_k(k)),
    "noisy_top_1": lambda k, noise: straight_through(noisy_top_k(1, noise)),
    "noisy_top_k": lambda k, noise: straight_through(noisy_top_k(k, noise)),
}
"""What a gate is trained with by name, open to users: f(k, noise) -> a routing.

A discrete choice has the gradient of the full softmax, so that the gate learns from experts that it
did not choose.
"""


def random() -> Routing:
    """One expert at random, whatever the gate says (but NaN stays NaN): a control."""

    @of_those_that_count
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

    One-hot `(B, E)`, of logits `(E, B, N)` and labels `(B,)`: an expert that is right if there is
    one, and among those (or if none is) the one with the highest probability of the label. A traced
    label outside [0, N) goes to the first expert, which is wrong as all are.

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


def softmax_of(logits, kept, normalize):
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
