"""The loss of a mixture of which one expert runs: experts compete, they do not add up."""

import jax

from hybrid_jax import core


def expected_loss(
    weights: jax.Array, losses: jax.Array, *, weight: jax.Array | None = None
) -> jax.Array:
    """Mean over inputs of the loss of one expert drawn with the weights of the routing.

    The loss of the combined logits makes experts cancel each other's errors, and tells the gate how
    to mix them. This one tells the gate which expert to choose: with p the softmax of its logits,
    the gradient for logit e of an input is p_e (loss_e - sum_i p_i loss_i) / B, from `soft` and
    from `straight_through(top_k(1))` alike. An expert learns in proportion to its weight.

    Source: Jacobs, Jordan, Nowlan and Hinton, Adaptive Mixtures of Local Experts, Neural
    Computation 3 (1991), eq. 1.2.

    `weights` `(B, E)` are of any routing whose weights sum to one, `losses` `(E, B)` each expert's
    own on each input. `weight` `(B,)` is that of each input in the mean; one of weight 0 may hold
    anything.

    Example:
      >>> import jax.numpy as jnp
      >>> losses = jnp.array([[1.0], [3.0]])
      >>> loss = lambda logits: expected_loss(jax.nn.softmax(logits), losses)
      >>> jax.value_and_grad(loss)(jnp.zeros((1, 2)))  # 1/2 (1 - 2) and 1/2 (3 - 2)
      (Array(2., dtype=float32), Array([[-0.5,  0.5]], dtype=float32))
    """
    if losses.shape != weights.shape[::-1]:
        raise ValueError(f"losses must have shape {weights.shape[::-1]}, got {losses.shape}")
    weights, losses = (core.selected(core.widen(x), weight) for x in (weights, losses.T))
    return core.weighted_mean((weights * losses).sum(-1), weight)
