"""Criteria of the weights alone."""

from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax import core
from hybrid_jax.pruning.criteria.leaves import Kernels, restored, score


def magnitude(kernels: Kernels, params: Any, p: int = 1) -> Any:
    """Scores a weight by |w| (p = 1) or w² (p = 2).

    Summed over a channel these are its L1 norm and its squared L2 norm. S. Han, J. Pool, J. Tran,
    W. Dally, Learning both Weights and Connections (arXiv 1506.02626); for filters H. Li et al.,
    Pruning Filters for Efficient ConvNets (arXiv 1608.08710).

    Args:
      kernels: `core.trace(...).kernels`, what is scored.
      params: Pytree of parameters.
      p: 1 or 2.

    Returns:
      float32 scores shaped like `params`.

    Raises:
      ValueError: If `p` is neither, or `params` has not the kernels.

    Example:
      >>> params = {'kernel': jnp.array([[1.0, -2.0]]), 'bias': jnp.array([5.0, 5.0])}
      >>> fn = lambda params, x: x @ params['kernel'] + params['bias'][None]
      >>> magnitude(core.trace(fn, params, jnp.ones((1, 1))).kernels, params)
      {'bias': MaskedNode(), 'kernel': Array([[1., 2.]], dtype=float32)}
    """
    core.check_integer("p", p, 1, 2)
    return score(lambda kernel, w: abs(w) if p == 1 else w * w, kernels, params)


def random(kernels: Kernels, params: Any, key: jax.Array) -> Any:
    """Scores every weight by an independent uniform number in [0, 1): the control.

    Args:
      kernels: `core.trace(...).kernels`, what is scored.
      params: Pytree of parameters.
      key: A key of `jax.random.key`; the same key gives the same scores.

    Returns:
      float32 scores shaped like `params`.

    Raises:
      ValueError: If `params` has not the kernels.
    """
    keys = dict(zip(kernels, jax.random.split(key, max(len(kernels), 1))))

    def uniform(kernel, w):
        return restored(kernel, jax.random.uniform(keys[kernel.path], (w.size,)))

    return score(uniform, kernels, params)


def lamp(kernels: Kernels, params: Any) -> Any:
    """Scores a weight by w² over the sum of all squares in its layer that are not smaller.

    Comparable between layers, so it goes with `global_` allocation. Equal weights are ordered as
    `masks` orders them, the earlier index above. J. Lee et al., Layer-adaptive sparsity for the
    Magnitude-based Pruning (arXiv 2010.07611).

    Args:
      kernels: `core.trace(...).kernels`, what is scored.
      params: Pytree of parameters.

    Returns:
      float32 scores in [0, 1], shaped like `params`.

    Raises:
      ValueError: If `params` has not the kernels.
    """
    return score(
        lambda kernel, w: restored(kernel, jax.vmap(_share_of_larger)(kernel.layers(w))),
        kernels,
        params,
    )


@jax.jit
def _share_of_larger(w: jax.Array) -> jax.Array:
    square = jnp.square(w)
    order = jnp.argsort(-square, stable=True)
    falling = square[order]
    total = jnp.cumsum(falling)
    share = falling / jnp.where(total > 0, total, 1.0)
    return jnp.zeros_like(square).at[order].set(share)
