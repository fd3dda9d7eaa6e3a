"""Criteria of the loss's derivatives, and the pure functions that work these out."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core
from hybrid_jax.pruning.criteria.leaves import (
    CRITERIA,
    Given,
    Kernels,
    check_statistics,
    floating,
    gradient,
    in_float32,
    score,
)


def taylor(kernels: Kernels, params: Any, gradients: Any) -> Any:
    """Scores a weight by |w · g|, the first-order change of the loss when it is set to zero.

    P. Molchanov et al., Importance Estimation for Neural Network Pruning (arXiv 1906.10771).
    """
    check_statistics("gradients", params, gradients)
    return score(lambda kernel, w, g: abs(w * g), kernels, params, gradients)


def snip(kernels: Kernels, params: Any, gradients: Any) -> Any:
    """Scores a weight by |w · g| / Σ |w · g|, its share of the network's connection sensitivity.

    The scores of all kernels add up to 1, so that they compare and average between batches, seeds
    and losses; in one network they rank as those of `taylor`. Meant for the parameters at
    initialization. N. Lee, T. Ajanthan, P. Torr, SNIP: Single-shot Network Pruning based on
    Connection Sensitivity (arXiv 1810.02340).
    """
    sensitivity = taylor(kernels, params, gradients)
    xp = core.namespace(sensitivity)
    leaves = jax.tree.map(xp.asarray, sensitivity)
    total = sum(leaf.sum() for leaf in jax.tree.leaves(leaves))
    total = xp.where(total > 0, total, np.float32(1.0))
    return core.on_device(jax.tree.map(lambda leaf: leaf / total, leaves))


def grasp(kernels: Kernels, params: Any, hessian_gradient: Any) -> Any:
    """Scores a weight by w · (H g): how much of the gradient's norm removing it would cost.

    To set w to zero changes gᵀg by −2 w (H g) in the first order. This is what C. Wang, G. Zhang,
    R. Grosse, Picking Winning Tickets Before Training by Preserving Gradient Flow (GraSP, arXiv
    2002.07376) write as removing the largest −θ ⊙ H g. Meant for the parameters at initialization.
    Scores have signs: over a coupled group reduce them by 'sum' or 'mean' and do not normalize.
    """
    check_statistics("hessian_gradient", params, hessian_gradient)
    return score(lambda kernel, w, hg: w * hg, kernels, params, hessian_gradient)


def hessian_gradient(
    kernels: Kernels, loss_fn: Callable[..., jax.Array], params: Any, *inputs: Any
) -> Any:
    """H g: the Hessian of `loss_fn(params, *inputs) -> ()` times its gradient, over kernels only.

    Costs about two gradients; the Hessian is never formed. The authors divide the logits by a
    temperature of 200 before the loss.
    """
    params, inputs = in_float32((params, inputs))
    floats, join = floating(params)
    gradients, hessian = jax.linearize(jax.grad(lambda own: loss_fn(join(own), *inputs)), floats)
    # Biases and statistics are not pruned: theirs is not the flow that is to be kept.
    of_kernels, _ = floating(
        core.map_with_path(
            lambda path, g: g if path in kernels else jnp.zeros_like(g), join(gradients)
        )
    )
    return join(hessian(of_kernels))


def fisher(kernels: Kernels, params: Any, squared_gradients: Any) -> Any:
    """Scores a weight by ½ F w², with F the diagonal of the empirical Fisher information.

    The second-order change of the loss, the Hessian of Y. LeCun, J. Denker, S. Solla, Optimal
    Brain Damage (1990), replaced by the Fisher information as in L. Theis et al., Faster gaze
    prediction with dense networks and Fisher pruning (arXiv 1801.05787).
    """
    check_statistics("squared_gradients", params, squared_gradients)
    return score(lambda kernel, w, f: 0.5 * f * (w * w), kernels, params, squared_gradients)


def mean_squared_gradients(loss_fn: Callable[..., jax.Array], params: Any, examples: Any) -> Any:
    """Mean over `examples` (B, …), one at a time, of squared gradients of loss_fn(params, one)."""
    params, examples = in_float32((params, examples))
    count = jax.tree.leaves(examples)[0].shape[0]
    if not count:
        raise ValueError("examples must hold at least one example, got none")

    of_one = core.fast_convolutions(gradient(loss_fn), loop=True)

    def add(total, example):
        gradients = of_one(params, example)
        return jax.tree.map(lambda t, g: t + jnp.square(g), total, gradients), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), examples)
    return jax.tree.map(lambda t: t / count, total)


def movement(kernels: Kernels, params: Any, accumulated: Any) -> Any:
    """Scores a weight by −Σ w · g over the steps of training: how far it moved away from zero.

    A gradient step changes w² by −2 η w g in the first order, so that what grows stays, however
    small it is, and what shrinks leaves. V. Sanh, T. Wolf, A. Rush, Movement Pruning: Adaptive
    Sparsity by Fine-Tuning (arXiv 2005.07683). Scores have signs: over a coupled group reduce them
    by 'sum' or 'mean' and do not normalize. `accumulate_movement` adds the sum up.
    """
    check_statistics("accumulated", params, accumulated)
    return score(lambda kernel, w, moved: moved, kernels, params, accumulated)


def accumulate_movement(accumulated: Any, params: Any, gradients: Any) -> Any:
    """Adds −w · g of a step, for `movement`, at first to zeros like `params`; keeps dtypes."""
    check_statistics("accumulated", params, accumulated)
    check_statistics("gradients", params, gradients)

    def add(path, moved, w, g):
        del path
        if core.is_masked_node(moved) or not jnp.issubdtype(w.dtype, jnp.floating):
            return moved
        step = w.astype(jnp.float32) * g.astype(jnp.float32)
        return moved - step.astype(moved.dtype)

    return core.map_with_path(add, accumulated, params, gradients)


def _of_examples(given: Given) -> Any:
    def loss(params, example):
        return given.needed("loss")(params, *jax.tree.map(lambda leaf: leaf[None], example))

    mean = jax.jit(functools.partial(mean_squared_gradients, loss))
    means = [mean(given.params, tuple(batch)) for batch in given.needed("batches")]
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *means)


CRITERIA |= {
    "taylor": lambda given: taylor(given.kernels, given.params, given.gradients()),
    "snip": lambda given: snip(given.kernels, given.params, given.gradients()),
    "grasp": lambda given: grasp(
        given.kernels,
        given.params,
        jax.jit(lambda params: hessian_gradient(given.kernels, given.mean_loss, params))(
            given.params
        ),
    ),
    "fisher": lambda given: fisher(given.kernels, given.params, _of_examples(given)),
}
