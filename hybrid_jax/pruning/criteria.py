"""Criteria: how much each weight matters, as a pytree of scores shaped like the parameters.

A score is larger where a weight is worth more, and says nothing about how many weights leave:
`masks` and `keep_channels` do. Prunable are the floating leaves of rank 2 or more (kernels);
biases, scalars, normalization vectors and integers carry `optax.MaskedNode()`. The exception is
`batchnorm_scale`, which scores the normalization scales and nothing else.

For a stack of E experts, `jax.vmap` the criterion over it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hybrid_jax import core


def magnitude(params: Any, p: int = 1) -> Any:
    """Scores a weight by |w| (p = 1) or w² (p = 2).

    Summed over a channel these are its L1 norm and its squared L2 norm. S. Han, J. Pool, J. Tran,
    W. Dally, Learning both Weights and Connections (arXiv 1506.02626); for filters H. Li et al.,
    Pruning Filters for Efficient ConvNets (arXiv 1608.08710).

    Args:
      params: Pytree of parameters.
      p: 1 or 2.

    Returns:
      float32 scores shaped like `params`.

    Raises:
      ValueError: If `p` is neither, or `params` has nothing to prune.

    Example:
      >>> import jax.numpy as jnp
      >>> magnitude({'kernel': jnp.array([[1.0, -2.0]]), 'bias': jnp.array([5.0, 5.0])})
      {'bias': MaskedNode(), 'kernel': Array([[1., 2.]], dtype=float32)}
    """
    core.check_integer("p", p, 1, 2)
    return _score(lambda w: jnp.abs(w) if p == 1 else jnp.square(w), params)


def random(params: Any, key: jax.Array) -> Any:
    """Scores every weight by an independent uniform number in [0, 1): the control.

    Args:
      params: Pytree of parameters.
      key: A key of `jax.random.key`; the same key gives the same scores.

    Returns:
      float32 scores shaped like `params`.

    Raises:
      ValueError: If `params` has nothing to prune.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> random({'kernel': jnp.ones((2, 3))}, jax.random.key(0))['kernel'].shape
      (2, 3)
    """
    leaves, treedef = jax.tree.flatten(params)
    keys = treedef.unflatten(jax.random.split(key, max(len(leaves), 1))[: len(leaves)])
    return _score(lambda w, k: jax.random.uniform(k, w.shape), params, keys)


def taylor(params: Any, gradients: Any) -> Any:
    """Scores a weight by |w · g|, the first-order change of the loss when it is set to zero.

    P. Molchanov et al., Importance Estimation for Neural Network Pruning (arXiv 1906.10771). On
    the parameters at initialization it ranks as N. Lee et al., SNIP (arXiv 1810.02340).

    Args:
      params: Pytree of parameters.
      gradients: Gradients of the loss, shaped like `params`.

    Returns:
      float32 scores shaped like `params`.

    Raises:
      ValueError: If `gradients` has another structure, or `params` has nothing to prune.

    Example:
      >>> import jax.numpy as jnp
      >>> taylor({'w': jnp.array([[1.0, -2.0]])}, {'w': jnp.array([[3.0, 0.5]])})
      {'w': Array([[3., 1.]], dtype=float32)}
    """
    core.check_same_structure("gradients", params, gradients)
    return _score(lambda w, g: jnp.abs(w * g), params, gradients)


def fisher(params: Any, squared_gradients: Any) -> Any:
    """Scores a weight by ½ F w², with F the diagonal of the empirical Fisher information.

    The second-order change of the loss, the Hessian of Y. LeCun, J. Denker, S. Solla, Optimal
    Brain Damage (1990), replaced by the Fisher information as in L. Theis et al., Faster gaze
    prediction with dense networks and Fisher pruning (arXiv 1801.05787).

    Args:
      params: Pytree of parameters.
      squared_gradients: F, the mean over examples of the squared gradient of each example's
        loss, shaped like `params`: what `mean_squared_gradients` gives.

    Returns:
      float32 scores shaped like `params`.

    Raises:
      ValueError: If `squared_gradients` has another structure, or `params` has nothing to prune.

    Example:
      >>> import jax.numpy as jnp
      >>> fisher({'w': jnp.array([[1.0, -2.0]])}, {'w': jnp.array([[4.0, 1.0]])})
      {'w': Array([[2., 2.]], dtype=float32)}
    """
    core.check_same_structure("squared_gradients", params, squared_gradients)
    return _score(lambda w, f: 0.5 * f * jnp.square(w), params, squared_gradients)


def mean_squared_gradients(loss_fn: Callable[..., jax.Array], params: Any, examples: Any) -> Any:
    """Mean over examples of each example's squared gradient, one example in memory at a time.

    Args:
      loss_fn: `loss_fn(params, example) -> ()`, the loss of one example without a batch axis.
      params: Pytree of floating parameters.
      examples: Pytree of arrays with a leading axis B.

    Returns:
      Pytree shaped like `params`, for `fisher`.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = lambda params, x: jnp.sum(params['w'] * x)
      >>> x = jnp.array([[[1.0, 2.0]], [[3.0, 0.0]]])  # B = 2
      >>> mean_squared_gradients(loss, {'w': jnp.ones((1, 2))}, x)
      {'w': Array([[5., 2.]], dtype=float32)}
    """

    def add(total, example):
        gradients = jax.grad(loss_fn)(params, example)
        return jax.tree.map(lambda t, g: t + jnp.square(g), total, gradients), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), examples)
    count = jax.tree.leaves(examples)[0].shape[0]
    return jax.tree.map(lambda t: t / count, total)


def lamp(params: Any) -> Any:
    """Scores a weight by w² over the sum of all squares in its leaf that are not smaller.

    Comparable between layers, so it goes with `global_` allocation. Equal weights are ordered as
    `masks` orders them, the earlier index above. J. Lee et al., Layer-adaptive sparsity for the
    Magnitude-based Pruning (arXiv 2010.07611).

    Args:
      params: Pytree of parameters.

    Returns:
      float32 scores in [0, 1], shaped like `params`.

    Raises:
      ValueError: If `params` has nothing to prune.

    Example:
      >>> import jax.numpy as jnp
      >>> lamp({'w': jnp.array([[1.0, -2.0, 2.0]])})  # 1/(1+4+4), 4/4, 4/(4+4)
      {'w': Array([[0.11111111, 1.        , 0.5       ]], dtype=float32)}
    """

    def score(w):
        square = jnp.square(w).ravel()
        order = jnp.argsort(-square, stable=True)
        falling = square[order]
        total = jnp.cumsum(falling)
        share = falling / jnp.where(total > 0, total, 1.0)
        return jnp.zeros_like(square).at[order].set(share).reshape(w.shape)

    return _score(score, params)


def geometric_median(params: Any) -> Any:
    """Scores a filter by the sum of its distances to all filters of its layer (FPGM).

    A filter near the geometric median can be replaced by the others, however large it is. The
    score of filter o, d_o = Σ_o' ‖w_o − w_o'‖₂, is handed to its weights by their part in it,
    (w_oi − w_o'i)² / ‖w_o − w_o'‖₂ summed over o', so that summing over a filter gives exactly
    d_o. Y. He et al., Filter Pruning via Geometric Median (arXiv 1811.00250).

    Args:
      params: Pytree of parameters whose last axis is O, as in Flax.

    Returns:
      float32 scores shaped like `params`.

    Raises:
      ValueError: If `params` has nothing to prune.

    Example:
      >>> import jax.numpy as jnp
      >>> geometric_median({'w': jnp.array([[0.0, 3.0, 3.0], [0.0, 4.0, 0.0]])})['w'].sum(0)
      Array([8., 9., 7.], dtype=float32)
    """

    def shares(filters, own):
        square = jnp.square(filters - own[None])
        distance = jnp.sqrt(square.sum(axis=1, keepdims=True))
        return jnp.sum(square / jnp.where(distance > 0, distance, 1.0), axis=0)

    def score(w):
        filters = w.reshape(-1, w.shape[-1]).T
        # One filter at a time: all pairs at once would take O times the memory of the layer.
        return jax.lax.map(lambda own: shares(filters, own), filters).T.reshape(w.shape)

    return _score(score, params)


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

    def score(path, leaf):
        if not chosen[path]:
            return optax.MaskedNode()
        if leaf.ndim != 1 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"pattern must match floating vectors only, got {leaf.dtype}{list(leaf.shape)} "
                f"at {path!r}"
            )
        return jnp.abs(leaf.astype(jnp.float32))

    return core.map_with_path(score, params)


def _score(f: Callable[..., jax.Array], params: Any, *rest: Any) -> Any:
    """Maps `f` over the prunable leaves (and those of `rest`) in float32."""

    def leaf_score(path, leaf, *others):
        if not _prunable(leaf):
            return optax.MaskedNode()
        floats = (
            x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in others
        )
        return f(leaf.astype(jnp.float32), *floats)

    paths = core.flatten_paths(params)
    if not any(map(_prunable, paths.values())):
        raise ValueError(
            "params must have a floating leaf of rank 2 or more to prune, "
            f"got only: {', '.join(paths) or 'no leaves'}"
        )
    return core.map_with_path(leaf_score, params, *rest)


def _prunable(leaf: Any) -> bool:
    if core.is_masked_node(leaf):
        return False
    return jnp.ndim(leaf) >= 2 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
