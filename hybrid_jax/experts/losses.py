"""Auxiliary losses of a gate: scalars to add, each with its own small factor, to the task loss.

Functions of the gate logits `(B, E)` or the weights `(B, E)` of one batch, in float32 or wider. NaN
among those makes the loss NaN; a logit of -inf rules an expert out. What the experts cost is in
`budget`.

All take the weight `(B,)` of each input in means over the batch; None weighs all alike. An input of
weight 0, as padding has, may hold anything: no part of it is in the loss or its gradient. Where no
input counts, the loss is 0. They raise ValueError for a batch without inputs.
"""

import jax
import jax.numpy as jnp

from hybrid_jax import core


def importance(weights: jax.Array, *, weight: jax.Array | None = None) -> jax.Array:
    """Squared coefficient of variation of each expert's total weight; 0 when all are equal.

    So it is where no expert has any. Source: Shazeer et al., arXiv 1701.06538, eq. 6-7.
    """
    return _squared_variation(core.weighted_mean(weights, weight))


def load(
    logits: jax.Array,
    scores: jax.Array,
    k: int,
    noise: float = 1.0,
    *,
    weight: jax.Array | None = None,
) -> jax.Array:
    """Squared coefficient of variation of each expert's expected number of inputs.

    The expectation is over a new draw of that expert's own noise, so that, unlike a count, it has a
    gradient. Source: Shazeer et al., arXiv 1701.06538, eq. 8-11.

    `scores` are the `Routed.scores` of `noisy_top_k(k, noise)`, and `logits` those without noise;
    `k` is below E, as with all experts chosen there is nothing to balance.
    """
    num_experts = core.check_integer("the number of experts", logits.shape[-1], 2)
    core.check_integer("k", k, 1, num_experts - 1)
    core.check_positive("noise", noise)
    logits, scores = (core.selected(core.widen(x), weight) for x in (logits, scores))
    top, _ = jax.lax.top_k(scores, k + 1)
    # The k-th largest score of the *other* experts: what this one has to beat to be chosen.
    to_beat = jnp.where(scores >= top[:, k - 1 : k], top[:, k : k + 1], top[:, k - 1 : k])
    # One that is ruled out has no chance, though what it has to beat be ruled out too.
    out = jnp.isneginf(logits)
    margin = jnp.where(out, 0, logits) - jnp.where(out, 0, to_beat)
    chance = jnp.where(out, 0, jax.scipy.stats.norm.cdf(margin / noise))
    return _squared_variation(core.weighted_mean(chance, weight))


def entropy(logits: jax.Array, *, weight: jax.Array | None = None) -> jax.Array:
    """Mean entropy of the gate's choice for one input, in nats; 0 when it is sure, at most log E.

    Add it to make the gate decisive, subtract it to keep it open.
    """
    log_p = jax.nn.log_softmax(core.selected(core.widen(logits), weight))
    return -core.weighted_mean(core.expectation(jnp.exp(log_p), log_p), weight)


def z_loss(logits: jax.Array, *, weight: jax.Array | None = None) -> jax.Array:
    """Mean square of logsumexp of the logits, which keeps them small.

    Source: Zoph et al., ST-MoE, arXiv 2202.08906, eq. 5.
    """
    logits = core.selected(core.widen(logits), weight)
    return core.weighted_mean(jnp.square(jax.nn.logsumexp(logits, -1)), weight)


def expected_loss(
    weights: jax.Array, losses: jax.Array, *, weight: jax.Array | None = None
) -> jax.Array:
    """Mean over inputs of the loss of one expert drawn with the weights of the routing.

    Of a mixture of which one expert runs: experts compete, they do not add up. The loss of the
    combined logits makes experts cancel each other's errors, and tells the gate how to mix them.
    This one tells the gate which expert to choose: with p the softmax of its logits, the gradient
    for logit e of an input is p_e (loss_e - sum_i p_i loss_i) / B, from `soft` and from
    `straight_through(top_k(1))` alike. An expert learns in proportion to its weight.

    Source: Jacobs, Jordan, Nowlan and Hinton, Adaptive Mixtures of Local Experts, Neural
    Computation 3 (1991), eq. 1.2.

    `weights` `(B, E)` are of any routing whose weights sum to one, `losses` `(E, B)` each expert's
    own on each input. `weight` `(B,)` is that of each input in the mean; one of weight 0 may hold
    anything.

    Example:
      >>> losses = jnp.array([[1.0], [3.0]])
      >>> loss = lambda logits: expected_loss(jax.nn.softmax(logits), losses)
      >>> jax.value_and_grad(loss)(jnp.zeros((1, 2)))  # 1/2 (1 - 2) and 1/2 (3 - 2)
      (Array(2., dtype=float32), Array([[-0.5,  0.5]], dtype=float32))
    """
    if losses.shape != weights.shape[::-1]:
        raise ValueError(f"losses must have shape {weights.shape[::-1]}, got {losses.shape}")
    weights, losses = (core.selected(core.widen(x), weight) for x in (weights, losses.T))
    return core.weighted_mean((weights * losses).sum(-1), weight)


def _squared_variation(x):
    mean = jnp.mean(x)
    return jnp.var(x) / jnp.where(mean == 0, 1, jnp.square(mean))
