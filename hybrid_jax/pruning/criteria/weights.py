"""Criteria of the weights alone."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core
from hybrid_jax.pruning.criteria.leaves import CRITERIA, Kernels, restored, score


def magnitude(kernels: Kernels, params: Any, p: int = 1) -> Any:
    """Scores a weight by |w| (p = 1) or w² (p = 2).

    Summed over a channel these are its L1 norm and its squared L2 norm. S. Han, J. Pool, J. Tran,
    W. Dally, Learning both Weights and Connections (arXiv 1506.02626); for filters H. Li et al.,
    Pruning Filters for Efficient ConvNets (arXiv 1608.08710).
    """
    core.check_integer("p", p, 1, 2)
    return score(lambda kernel, w: abs(w) if p == 1 else w * w, kernels, params)


def random(kernels: Kernels, params: Any, key: jax.Array) -> Any:
    """Scores every weight by an independent uniform number in [0, 1): the control."""
    sizes = [math.prod(kernel.shape) for kernel in kernels.values()]
    # All at once: a draw for each kernel would be compiled for each shape.
    drawn = jax.random.uniform(key, (sum(sizes),))
    xp = core.namespace(drawn)
    parts = dict(zip(kernels, xp.split(xp.asarray(drawn), np.cumsum(sizes)[:-1])))
    return score(lambda kernel, w: restored(kernel, parts[kernel.path]), kernels, params)


def lamp(kernels: Kernels, params: Any) -> Any:
    """Scores a weight by w² over the sum of all squares in its layer that are not smaller.

    Comparable between layers, so it goes with `global_` allocation; in [0, 1]. Equal weights are
    ordered as `masks` orders them, the earlier index above. J. Lee et al., Layer-adaptive sparsity
    for the Magnitude-based Pruning (arXiv 2010.07611).
    """

    def shares(kernel, w):
        xp, square = core.namespace(w), kernel.layers(w * w)
        order = xp.argsort(-square, axis=-1, stable=True)
        falling = xp.take_along_axis(square, order, -1)
        total = xp.cumsum(falling, axis=-1)
        share = falling / xp.where(total > 0, total, np.float32(1.0))
        return restored(kernel, _put(order, share))

    return score(shares, kernels, params)


def _put(order: Any, values: Any) -> Any:
    """`values` of (L, n) where `order` had taken them from."""
    if isinstance(values, np.ndarray):
        np.put_along_axis(back := np.empty_like(values), order, values, -1)
        return back
    return jnp.put_along_axis(jnp.zeros_like(values), order, values, -1, inplace=False)


CRITERIA |= {
    "magnitude": lambda given: magnitude(given.kernels, given.params),
    "magnitude_l2": lambda given: magnitude(given.kernels, given.params, p=2),
    "random": lambda given: random(given.kernels, given.params, given.needed("key")),
    "lamp": lambda given: lamp(given.kernels, given.params),
}
