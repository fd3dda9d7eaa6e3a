"""Penalties that a network is trained with, so that a removal takes little from it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hybrid_jax import core
from hybrid_jax.pruning import renewal
from hybrid_jax.pruning.criteria.filters import batchnorm_scale


def group_lasso(params: Any, groups: Sequence[core.Group]) -> jax.Array:
    """Σ_g √m_g Σ_k ‖θ_g[k]‖₂: the norms of all that leaves with each channel.

    θ_g[k] are the m_g parameters that leave with unit k of group g: filters, biases, scales of a
    normalization, the weights that read the channel. The norm, not its square, pulls whole units to
    zero; its gradient at zero is zero. M. Yuan and Y. Lin, Model selection and estimation in
    regression with grouped variables (2006); W. Wen et al., Learning Structured Sparsity in Deep
    Neural Networks (arXiv 1608.03665). What `params` do not hold of the groups, and Linen's
    'batch_stats', is not penalized.
    """
    if not groups:
        raise ValueError("groups must hold a coupled group to penalize, got none")
    flat = {
        path: leaf
        for path, leaf in core.flatten_paths(params).items()
        if not path.startswith("batch_stats/") and not core.is_masked_node(leaf)
    }

    def of_group(group):
        members = [member for member in group.members if member.path in flat]
        if not members:
            raise ValueError(
                f"params must hold a member of group {group.name!r}, got none of: "
                f"{', '.join(member.path for member in group.members)}"
            )
        squares, count = 0.0, 0
        for member in members:
            leaf = flat[member.path].astype(jnp.float32)
            others = tuple(axis for axis in range(leaf.ndim) if axis != member.axis)
            # Summed before it is indexed: the gradient scatters a vector, not a kernel.
            along = jnp.sum(jnp.square(leaf), axis=others)
            squares += jnp.sum(along[member.index], axis=1)
            count += member.index.shape[1] * leaf.size // leaf.shape[member.axis]
        positive = squares > 0
        norms = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)
        return jnp.sqrt(jnp.float32(count)) * jnp.sum(norms)

    return sum(map(of_group, groups))


def batchnorm_l1(params: Any, pattern: str = r"(.*/)?scale") -> jax.Array:
    """Σ |γ| over the scales of the normalizations, with gradient 0 at 0: network slimming.

    Z. Liu et al., Learning Efficient Convolutional Networks through Network Slimming (arXiv
    1708.06519). `pattern` matches the whole path of each scale.
    """
    scales = jax.tree.leaves(batchnorm_scale(params, pattern))
    # The gradient of `abs` at 0 is 1; that of a scale which is zero has to be 0.
    return sum(jnp.sum(jnp.where(scale > 0, scale, 0.0)) for scale in scales)


def add_penalty(
    penalty: Callable[[Any], jax.Array], strength: float | jax.Array
) -> optax.GradientTransformation:
    """Adds the gradient of `strength · penalty(params)` to the updates.

    Before the optimizer it is a term of the loss; after the optimizer's scaling by its moments, and
    before its learning rate, it is decoupled as AdamW's weight decay is.

    Example:
      >>> tx = optax.chain(add_penalty(batchnorm_l1, 0.5), optax.sgd(1.0))
      >>> params = {'scale': jnp.array([2.0, -1.0])}
      >>> updates, _ = tx.update({'scale': jnp.zeros(2)}, tx.init(params), params)
      >>> updates['scale'].tolist()
      [-0.5, 0.5]
    """

    def update(updates, params):
        renewal.check_params(params)
        gradients = jax.grad(lambda params: strength * penalty(params))(params)
        return jax.tree.map(lambda u, g: u + g.astype(u.dtype), updates, gradients)

    return optax.stateless(update)
