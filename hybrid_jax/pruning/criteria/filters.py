"""Criteria of whole filters and channels, handed to the weights or scales that they consist of."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_jax import core
from hybrid_jax.pruning.criteria.leaves import CRITERIA, Kernels, restored, score


def geometric_median(kernels: Kernels, params: Any) -> Any:
    """Scores a filter by the sum of its distances to all filters of its layer (FPGM).

    A filter near the geometric median can be replaced by the others, however large it is. The
    score of filter o, d_o = Σ_o' ‖w_o − w_o'‖₂, is handed to its weights by their part in it,
    (w_oi − w_o'i)² / ‖w_o − w_o'‖₂ summed over o', so that summing over a filter gives exactly
    d_o. Y. He et al., Filter Pruning via Geometric Median (arXiv 1811.00250).
    """

    def shares(kernel, w):
        w = kernel.canonical(w)
        known = isinstance(w, np.ndarray)
        return restored(kernel, _known_shares(w) if known else jax.vmap(_shares)(w))

    return score(shares, kernels, params)


def batchnorm_scale(params: Any, pattern: str = r"(.*/)?scale") -> Any:
    """Scores a channel by |γ|, the scale of the normalization that follows it.

    `pattern` matches the whole path of each scale; all else has no score. Z. Liu et al., Learning
    Efficient Convolutional Networks through Network Slimming (arXiv 1708.06519).
    """
    chosen = core.match_rules([(pattern, True)], core.flatten_paths(params), default=False)

    def scale(path, leaf):
        if not chosen[path]:
            return optax.MaskedNode()
        if leaf.ndim != 1 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"pattern must match floating vectors only, got {leaf.dtype}{list(leaf.shape)} "
                f"at {path!r}"
            )
        return core.on_device(abs(core.namespace(leaf).asarray(leaf, np.float32)))

    return core.map_with_path(scale, params)


CRITERIA |= {
    "geometric_median": lambda given: geometric_median(given.kernels, given.params),
    "batchnorm_scale": lambda given: batchnorm_scale(given.params),
}


@jax.jit
def _shares(w: jax.Array) -> jax.Array:
    """What each weight of (T, C, O) has of its filter's distances."""
    filters = w.reshape(-1, w.shape[-1]).T

    def shares(own):
        square = jnp.square(filters - own[None])
        distance = jnp.sqrt(square.sum(axis=1, keepdims=True))
        return jnp.sum(square / jnp.where(distance > 0, distance, 1.0), axis=0)

    # One filter at a time: all pairs at once would take O times the memory of the layer.
    return jax.lax.map(shares, filters).T.reshape(w.shape)


def _known_shares(w: np.ndarray) -> np.ndarray:
    """`_shares` of each of L, by products, whose cancellation float64 bears."""
    own = w.reshape(len(w), -1, w.shape[-1]).astype(np.float64)
    inverse = np.swapaxes(own, 1, 2) @ own
    norms = np.diagonal(inverse, axis1=1, axis2=2).copy()
    inverse *= -2
    inverse += norms[:, :, None]
    inverse += norms[:, None]
    # What is nearer than float32 tells apart counts as the same.
    apart = inverse > 1e-14 * norms.max(axis=1)[:, None, None]
    np.sqrt(inverse, out=inverse, where=apart)
    np.divide(1.0, inverse, out=inverse, where=apart)
    inverse *= apart
    squares = own * own
    shares = squares * inverse.sum(1, keepdims=True) + squares @ inverse - 2 * own * (own @ inverse)
    return np.maximum(shares, 0.0).astype(np.float32).reshape(w.shape)
