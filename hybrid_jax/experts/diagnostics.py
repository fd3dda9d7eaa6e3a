"""How the experts are used and how they differ: what tells whether a gate earns its cost."""

import jax
import jax.numpy as jnp

from hybrid_jax import core


def usage(weights: jax.Array) -> jax.Array:
    """The share of inputs whose largest weight is each expert's, `(E,)`, summing to one.

    Args:
      weights: float `(B, E)`.

    Example:
      >>> usage(jnp.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [1.0, 0.0]]))
      Array([0.75, 0.25], dtype=float32)
    """
    return _first(weights).mean(0)


def usage_per_class(weights: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """Row n: the share of class n's inputs that go to each expert, `(N, E)`.

    Args:
      weights: float `(B, E)`.
      labels: int `(B,)`.
      num_classes: N. The row of a class without inputs is zero.

    Example:
      >>> weights = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
      >>> usage_per_class(weights, jnp.array([0, 0, 1]), num_classes=2)
      Array([[0.5, 0.5],
             [0. , 1. ]], dtype=float32)
    """
    of_class = jax.nn.one_hot(labels, num_classes, dtype=weights.dtype)
    counts = jnp.maximum(of_class.sum(0), 1)
    return of_class.T @ _first(weights) / counts[:, None]


def usage_entropy(usage: jax.Array) -> jax.Array:
    """Entropy of the usage in nats: log E when all experts are used alike, 0 when only one is.

    Args:
      usage: float `(E,)`, summing to one.

    Example:
      >>> usage_entropy(jnp.array([0.5, 0.5, 0.0])).round(4)  # log 2
      Array(0.6931, dtype=float32)
    """
    return jax.scipy.special.entr(usage).sum()


def unused(usage: jax.Array, share: float = 0.1) -> jax.Array:
    """Which experts get less than `share` of an even share, bool `(E,)`.

    Args:
      usage: float `(E,)`, summing to one.
      share: In [0, 1]; the even share is 1/E.

    Raises:
      ValueError: If `share` is not in [0, 1].

    Example:
      >>> unused(jnp.array([0.6, 0.39, 0.01]))
      Array([False, False,  True], dtype=bool)
    """
    core.check_fraction("share", share)
    return usage < share / usage.shape[0]


def collapsed(usage: jax.Array, share: float = 0.1) -> jax.Array:
    """Whether the gate uses one expert only, bool `()`; never for a single expert.

    Args:
      usage: float `(E,)`, summing to one.
      share: As for `unused`.

    Raises:
      ValueError: If `share` is not in [0, 1].

    Example:
      >>> bool(collapsed(jnp.array([0.99, 0.01])))
      True
      >>> bool(collapsed(jnp.array([0.6, 0.4])))
      False
    """
    num_experts = usage.shape[0]
    return (unused(usage, share).sum() == num_experts - 1) & (num_experts > 1)


def disagreement(expert_logits: jax.Array) -> jax.Array:
    """The share of inputs on which two experts name different classes, `(E, E)`.

    Args:
      expert_logits: float `(E, B, N)`.

    Example:
      >>> disagreement(jnp.array([[[2.0, 1.0], [0.0, 1.0]], [[2.0, 1.0], [1.0, 0.0]]]))
      Array([[0. , 0.5],
             [0.5, 0. ]], dtype=float32)
    """
    top = jnp.argmax(expert_logits, -1)
    return (top[:, None] != top[None]).mean(-1)


def _first(weights):
    return jax.nn.one_hot(jnp.argmax(weights, -1), weights.shape[-1], dtype=weights.dtype)
