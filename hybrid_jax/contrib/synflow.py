"""SynFlow: the criterion, the flow that it needs, and its rounds of pruning, without any data."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax import core
from hybrid_jax.pruning.allocation import global_
from hybrid_jax.pruning.criteria.leaves import (
    Kernels,
    check_statistics,
    gradient,
    in_float32,
    score,
)
from hybrid_jax.pruning.criteria.weights import magnitude
from hybrid_jax.pruning.masking import apply_masks, masks
from hybrid_jax.pruning.selection import check_sparsity


def synflow(kernels: Kernels, params: Any, flow: Any) -> Any:
    """Scores a weight by |w| · ∂R/∂|w|: all that flows through it from inputs to outputs.

    R is the sum of the outputs of the network of absolute values on inputs of ones, `flow` what
    `synaptic_flow` gives. Scored once, whole layers may leave; `synflow_masks` scores anew after
    each of many small removals, as H. Tanaka et al., Pruning neural networks without any data by
    iteratively conserving synaptic flow (arXiv 2006.05467) do.
    """
    check_statistics("flow", params, flow)
    return score(lambda kernel, w, f: abs(w) * f, kernels, params, flow)


def synaptic_flow(fn: Callable[..., Any], params: Any, *inputs: Any, scale: float = 1.0) -> Any:
    """∂R/∂|w|, with R the sum of `fn`'s outputs at |params| on inputs of ones, for `synflow`.

    R grows with every layer, in a ResNet-56 beyond float32. Inputs of `scale` instead of ones, and
    `scale` times the outputs, leave the ranking as it is where there are no biases: a ResNet-56
    takes 1e-34. Activations have to be like ReLU, not ReLU6. It is for networks at initialization:
    a trained BatchNorm subtracts a running mean and stops the flow; take the function of its graph
    (`program.apply`). Of `inputs` a batch of one, or its shape, is enough.
    """
    core.check_positive("scale", scale)

    def filled(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return in_float32(jnp.full(leaf.shape, scale, leaf.dtype)) if floating else leaf

    def flow(absolute):
        outputs = jax.tree.leaves(fn(absolute, *jax.tree.map(filled, inputs)))
        return sum(scale * jnp.sum(leaf.astype(jnp.float32)) for leaf in outputs)

    # In loops, as of `synflow_masks`, XLA is many times slower at gradients on a CPU.
    of_absolute = core.fast_convolutions(gradient(flow), loop=True)
    return of_absolute(jax.tree.map(jnp.abs, in_float32(params)))


def synflow_masks(
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    sparsity: float | jax.Array,
    rounds: int = 100,
    exempt: Sequence[str] = (),
    scale: float = 1.0,
) -> Any:
    """Prunes by `synflow` in rounds, the fraction that is left falling by the same factor in each.

    After round k of n the sparsity is 1 − (1 − s)^(k/n), over all kernels together, and the flow is
    worked out anew with what is removed at zero. One compilation holds all rounds (the authors take
    100). The masks keep exactly what `global_()` does. A flow through a kernel that is not finite,
    or zero before anything is removed, is an error (unless traced). `fn`, `inputs` and `scale` are
    as for `synaptic_flow`.

    Example:
      >>> fn = lambda params, x: x @ params['a'] @ params['b']
      >>> params = {'a': jnp.array([[1.0, -2.0]]), 'b': jnp.array([[-3.0], [4.0]])}
      >>> synflow_masks(fn, params, jnp.ones((1, 1)), sparsity=0.5)
      {'a': Array([[False,  True]], dtype=bool), 'b': Array([[False],
             [ True]], dtype=bool)}
    """
    check_sparsity(sparsity)
    core.check_integer("rounds", rounds, 1)
    left = 1.0 - jnp.asarray(sparsity, jnp.float32)
    kernels = core.trace(fn, params, *inputs).kernels

    def prune(k, carry):
        kept, flows = carry
        masked = apply_masks(params, kept)
        scores = synflow(kernels, masked, synaptic_flow(fn, masked, *inputs, scale=scale))

        def still(path, flow, score):
            del path
            if core.is_masked_node(flow):
                return flow
            total = jnp.sum(score)
            return flow & jnp.isfinite(total) & ((total > 0) | (k > 0))

        flows = core.map_with_path(still, flows, scores)
        reached = 1.0 - left ** ((k + 1) / rounds)
        kept = masks(scores, reached, allocation=global_(), exempt=exempt, previous=kept)
        return kept, flows

    everything = masks(magnitude(kernels, params), 0.0, exempt=exempt)
    start = (everything, jax.tree.map(lambda mask: jnp.array(True), everything))
    kept, flows = jax.lax.fori_loop(0, rounds, prune, start)
    for path, flow in core.flatten_paths(flows).items():
        if not core.is_masked_node(flow) and not core.is_traced(flow) and not flow:
            raise ValueError(
                "fn must let a flow that is finite and not zero through every kernel, got none "
                f"through {path!r} at scale {scale:g}"
            )
    return kept
