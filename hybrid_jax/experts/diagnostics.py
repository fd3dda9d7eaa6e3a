"""How the experts are used and how they differ: what tells whether a gate earns its cost.

What is over inputs takes the weight `(B,)` of each; None weighs all alike, and an input of weight
0, as padding has, may hold anything. It is a mean in float32, and raises ValueError for a batch
without inputs.
"""

import jax
import jax.numpy as jnp

from hybrid_jax import core


def usage(weights: jax.Array, *, weight: jax.Array | None = None) -> jax.Array:
    """The share of inputs whose largest of the weights `(B, E)` is each expert's, `(E,)`.

    The shares sum to one, or less where inputs have no expert. NaN weights make them NaN.

    Example:
      >>> usage(jnp.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [1.0, 0.0]]))
      Array([0.75, 0.25], dtype=float32)
    """
    return core.weighted_mean(_first(weights), weight)


def usage_per_class(
    weights: jax.Array,
    labels: jax.Array,
    num_classes: int,
    *,
    weight: jax.Array | None = None,
) -> jax.Array:
    """Row n: `usage` by the inputs of class n, `(N, E)`; zero for a class without any.

    `labels` are `(B,)` in [0, N); a traced one outside makes all NaN.
    """
    of_class = core.one_hot(labels, num_classes, weight)
    if weight is not None:
        of_class = of_class * core.widen(weight)[:, None]
    return jax.vmap(lambda own: usage(weights, weight=own), 1)(of_class)


def usage_entropy(usage: jax.Array) -> jax.Array:
    """Entropy of the usage `(E,)` in nats: log E when all experts are used alike, 0 for one."""
    return jax.scipy.special.entr(usage).sum()


def unused(usage: jax.Array, share: float = 0.1) -> jax.Array:
    """Which experts get less than `share` of an even share 1/E of the usage `(E,)`, bool `(E,)`."""
    core.check_fraction("share", share)
    return usage < share / usage.shape[0]


def collapsed(usage: jax.Array) -> jax.Array:
    """Whether all experts but one are `unused`, bool `()`; never for a single expert."""
    num_experts = usage.shape[0]
    return (unused(usage).sum() == num_experts - 1) & (num_experts > 1)


def disagreement(expert_logits: jax.Array, *, weight: jax.Array | None = None) -> jax.Array:
    """The share of inputs, or positions, on which two experts name different classes, `(E, E)`.

    Of `expert_logits` `(E, B, ..., N)`. NaN logits name no class, which differs from every class.
    """
    top = jnp.moveaxis(core.top_class(expert_logits), 1, 0)  # (B, E, ...)
    differ = core.widen(top[:, :, None] != top[:, None])
    return core.weighted_mean(differ.mean(tuple(range(3, differ.ndim))), weight)


def _first(weights):
    """One-hot `(B, E)` of each input's largest weight; zero where it has none, NaN where NaN."""
    first = jax.nn.one_hot(jnp.argmax(weights, -1), weights.shape[-1], dtype=jnp.float32)
    first = jnp.where((weights == 0).all(-1, keepdims=True), 0, first)
    return jnp.where(jnp.isnan(weights).any(-1, keepdims=True), jnp.nan, first)
