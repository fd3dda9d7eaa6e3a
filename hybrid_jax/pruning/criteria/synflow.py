"""SynFlow: the criterion, the flow that it needs, and its rounds of pruning, without any data."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax import core
from hybrid_jax.pruning.allocation import global_
from hybrid_jax.pruning.criteria.gradients import taylor
from hybrid_jax.pruning.criteria.scoring import prunable
from hybrid_jax.pruning.masking import apply_masks, masks
from hybrid_jax.pruning.selection import check_sparsity, is_traced


def synflow(params: Any, flow: Any) -> Any:
    """Scores a weight by |w| · ∂R/∂|w|: all that flows through it from inputs to outputs.

    R is the sum of the outputs of the network of absolute values on inputs of ones, so that a
    score is the sum over all paths through the weight of the products of the |w| on them. The
    scores of every layer of a network without biases add up to R, and compare between layers.
    Scored once, whole layers may leave; `synflow_masks` scores again after each of many small
    removals, as H. Tanaka et al., Pruning neural networks without any data by iteratively
    conserving synaptic flow (arXiv 2006.05467) do.

    Args:
      params: Pytree of parameters.
      flow: ∂R/∂|w|, shaped like `params`: what `synaptic_flow` gives.

    Returns:
      float32 scores shaped like `params`.

    Raises:
      ValueError: If `flow` has another structure, or `params` has nothing to prune.

    Example:
      >>> import jax.numpy as jnp
      >>> fn = lambda params, x: x @ params['w']
      >>> params = {'w': jnp.array([[1.0, -2.0]])}
      >>> synflow(params, synaptic_flow(fn, params, jnp.ones((1, 1))))
      {'w': Array([[1., 2.]], dtype=float32)}
    """
    check_statistics("flow", params, flow)
    return score(lambda w, f: jnp.abs(w) * f, params, flow)
