"""Criteria: how much each weight matters, as a pytree of scores shaped like the parameters.

A criterion is a pure function `criterion(kernels, params, *statistics) -> scores`. A score is
larger where a weight is worth more, and says nothing about how many weights leave: `masks` and
`keep_channels` do. Scored are the `kernels` that `core.trace(...)` found, whatever their rank and
layout; all that is no site's kernel (biases, normalizations, statistics, though stacked by a scan)
carries `optax.MaskedNode()`. The exception is `batchnorm_scale`, which scores the normalization
scales and nothing else. For a stack of E experts, `jax.vmap` the criterion over it.

Scores that compare across layers go with `global_` allocation, the others with `uniform` or `erk`.

| criterion        | statistics it needs                        | compares across layers         |
|:-----------------|:-------------------------------------------|:-------------------------------|
| magnitude        | none                                       | no                             |
| random           | a key                                      | yes                            |
| lamp             | none                                       | yes                            |
| geometric_median | none                                       | no                             |
| batchnorm_scale  | none                                       | yes                            |
| taylor           | gradients                                  | yes                            |
| snip             | gradients, at initialization               | yes                            |
| grasp            | `hessian_gradient`, at initialization      | yes                            |
| fisher           | `mean_squared_gradients`                   | yes                            |
| movement         | `accumulate_movement`, of training steps   | yes                            |
| synflow          | `synaptic_flow`; rounds: `synflow_masks`   | yes                            |
| wanda            | `activation_norms` of batches              | no, nor between output neurons |
| chip             | `channel_independence` of batches          | no                             |
"""

from hybrid_jax.pruning.criteria.activations import (
    activation_norms,
    channel_independence,
    chip,
    wanda,
)
from hybrid_jax.pruning.criteria.filters import batchnorm_scale, geometric_median
from hybrid_jax.pruning.criteria.gradients import (
    accumulate_movement,
    fisher,
    grasp,
    hessian_gradient,
    mean_squared_gradients,
    movement,
    snip,
    taylor,
)
from hybrid_jax.pruning.criteria.synflow import synaptic_flow, synflow, synflow_masks
from hybrid_jax.pruning.criteria.weights import lamp, magnitude, random

__all__ = [
    "accumulate_movement",
    "activation_norms",
    "batchnorm_scale",
    "channel_independence",
    "chip",
    "fisher",
    "geometric_median",
    "grasp",
    "hessian_gradient",
    "lamp",
    "magnitude",
    "mean_squared_gradients",
    "movement",
    "random",
    "snip",
    "synaptic_flow",
    "synflow",
    "synflow_masks",
    "taylor",
    "wanda",
]
