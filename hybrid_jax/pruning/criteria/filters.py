"""Criteria of whole filters and channels, handed to the weights or scales that they consist of."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_jax import core
from hybrid_jax.pruning.criteria.leaves import Kernels, restored, score


def geometric_median(kernels: Kernels, params: Any) -> Any:
    """Scores a filter by the sum of its distances to all filters of its layer (FPGM).

    A filter near the geometric median can be replaced by the others, however large it is. The
    score of filter o, d_o = Σ_o' ‖w_o − w_o'‖₂, is handed to its weights by their part in it,
    (w_oi − w_o'i)² / ‖w_o − w_o'‖₂ summed over o', so that summing over a filter gives exactly
    d_o. Y. He et al., Filter Pruning via Geometric Median (arXiv 1811.00250).

    Args:
      kernels: `core.trace(...).kernels`, what is scored: which axis holds the filters is known.
      params: Pytree of parameters.

    Returns:
      float32 scores shaped like `params`.

    Raises:
      ValueError: If `params` has not the kernels, or one has no one form (taps, in, out).

    Example:
      >>> params = {'w': jnp.array([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]])}  # (O, C)
      >>> kernels = core.trace(lambda p, x: x @ p['w'].T, params, jnp.ones((1, 2))).kernels
      >>> geometric_median(kernels, params)['w'].sum(1)
      Array([8., 9., 7.], dtype=float32)
    """
    return score(
        lambda kernel, w: restored(kernel, jax.vmap(_distances)(kernel.canonical(w))),
        kernels,
        params,
    )


def batchnorm_scale(params: Any, pattern: str = r"(.*/)?scale") -> Any:
    """Scores a channel by |γ|, the scale of the normalization that follows it.

    Reduced over a coupled group with `group_scores` it ranks the channels of that group. Z. Liu
    et al., Learning Efficient Convolutional Networks through Network Slimming (arXiv 1708.06519).

    Args:
      params: Pytree of parameters.
      pattern: Regular expression that matches the whole path of each scale.

    Returns:
      float32 scores at the scales, `optax.MaskedNode()` everywhere else.

    Raises:
      ValueError: If `pattern` matches no path, or a leaf that is not a floating vector.

    Example:
      >>> import jax.numpy as jnp
      >>> batchnorm_scale({'bn': {'scale': jnp.array([-2.0, 1.0]), 'bias': jnp.zeros(2)}})
      {'bn': {'bias': MaskedNode(), 'scale': Array([2., 1.], dtype=float32)}}
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


@jax.jit
def _distances(w: jax.Array) -> jax.Array:
    """What each weight of (T, C, O) has of its filter's distances."""
    filters = w.reshape(-1, w.shape[-1]).T

    def shares(own):
        square = jnp.square(filters - own[None])
        distance = jnp.sqrt(square.sum(axis=1, keepdims=True))
        return jnp.sum(square / jnp.where(distance > 0, distance, 1.0), axis=0)

    # One filter at a time: all pairs at once would take O times the memory of the layer.
    return jax.lax.map(shares, filters).T.reshape(w.shape)
