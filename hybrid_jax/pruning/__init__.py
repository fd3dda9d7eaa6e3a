"""Pruning: which weights or channels leave, when, and what is left.

Weights, a criterion → granularity and allocation → masks; or along a schedule, in any optimizer.
Which parameters are kernels, and how each one lies in its parameter, the trace knows:

    graph = core.trace(fn, params, x)
    scores = pruning.magnitude(graph.kernels, params)
    masks = pruning.masks(scores, 0.5, pruning.unstructured(), pruning.erk(graph.kernels))
    score = functools.partial(pruning.magnitude, graph.kernels)
    tx = pruning.prune_by_schedule(optax.adam(1e-3), score, pruning.cubic(0.5, begin=0, end=1000))

Channels, with all that leaves with each, down to a target and out of the network:

    of_groups = pruning.group_scores(scores, graph.groups)
    found = pruning.to_target(
        lambda sparsity: pruning.keep_channels(of_groups, sparsity),
        lambda keep: cost.count(core.narrow_graph(graph, keep)).macs,
        target)
    masks = pruning.expand(found.choice, graph.groups, params)
    small_fn, small, certificate = pruning.shrink(fn, params, masks, x)

What each layer, or group of channels, bears alone, and which to leave out:

    each = pruning.channels(graph.groups)
    losses = pruning.sensitivity(loss_fn, params, scores, (0.25, 0.5), x, granularity=each)
    masks = pruning.masks(scores, 0.5, each, exempt=pruning.sensitive(losses, limit))

By name they are in registries that are open to users: `CRITERIA`, of a `Given` network and data;
`GRANULARITIES` and `ALLOCATIONS`, of a graph; `SCHEDULES`, of a sparsity and the steps to it.
"""

from hybrid_jax.core import expand as expand
from hybrid_jax.core import narrow as narrow
from hybrid_jax.core import shrink as shrink
from hybrid_jax.core import slice_state as slice_state
from hybrid_jax.core import slice_tree as slice_tree
from hybrid_jax.pruning.allocation import ALLOCATIONS as ALLOCATIONS
from hybrid_jax.pruning.allocation import Allocation as Allocation
from hybrid_jax.pruning.allocation import erk as erk
from hybrid_jax.pruning.allocation import global_ as global_
from hybrid_jax.pruning.allocation import uniform as uniform
from hybrid_jax.pruning.coupling import channels as channels
from hybrid_jax.pruning.coupling import group_scores as group_scores
from hybrid_jax.pruning.coupling import keep_channels as keep_channels
from hybrid_jax.pruning.criteria import CRITERIA as CRITERIA
from hybrid_jax.pruning.criteria import Given as Given
from hybrid_jax.pruning.criteria import accumulate_movement as accumulate_movement
from hybrid_jax.pruning.criteria import activation_norms as activation_norms
from hybrid_jax.pruning.criteria import batchnorm_scale as batchnorm_scale
from hybrid_jax.pruning.criteria import channel_independence as channel_independence
from hybrid_jax.pruning.criteria import chip as chip
from hybrid_jax.pruning.criteria import fisher as fisher
from hybrid_jax.pruning.criteria import geometric_median as geometric_median
from hybrid_jax.pruning.criteria import grasp as grasp
from hybrid_jax.pruning.criteria import hessian_gradient as hessian_gradient
from hybrid_jax.pruning.criteria import lamp as lamp
from hybrid_jax.pruning.criteria import magnitude as magnitude
from hybrid_jax.pruning.criteria import mean_squared_gradients as mean_squared_gradients
from hybrid_jax.pruning.criteria import movement as movement
from hybrid_jax.pruning.criteria import random as random
from hybrid_jax.pruning.criteria import snip as snip
from hybrid_jax.pruning.criteria import taylor as taylor
from hybrid_jax.pruning.criteria import wanda as wanda
from hybrid_jax.pruning.granularity import GRANULARITIES as GRANULARITIES
from hybrid_jax.pruning.granularity import Granularity as Granularity
from hybrid_jax.pruning.granularity import unstructured as unstructured
from hybrid_jax.pruning.masking import apply_masks as apply_masks
from hybrid_jax.pruning.masking import masks as masks
from hybrid_jax.pruning.obs import compensate as compensate
from hybrid_jax.pruning.obs import obs as obs
from hybrid_jax.pruning.penalties import add_penalty as add_penalty
from hybrid_jax.pruning.penalties import batchnorm_l1 as batchnorm_l1
from hybrid_jax.pruning.penalties import group_lasso as group_lasso
from hybrid_jax.pruning.penalties import group_shrinkage as group_shrinkage
from hybrid_jax.pruning.rounds import prune_in_rounds as prune_in_rounds
from hybrid_jax.pruning.schedules import SCHEDULES as SCHEDULES
from hybrid_jax.pruning.schedules import Schedule as Schedule
from hybrid_jax.pruning.schedules import cubic as cubic
from hybrid_jax.pruning.schedules import cyclic as cyclic
from hybrid_jax.pruning.schedules import exponential as exponential
from hybrid_jax.pruning.schedules import iterative as iterative
from hybrid_jax.pruning.schedules import one_shot as one_shot
from hybrid_jax.pruning.sensitivity import sensitive as sensitive
from hybrid_jax.pruning.sensitivity import sensitivity as sensitivity
from hybrid_jax.pruning.targets import Reached as Reached
from hybrid_jax.pruning.targets import to_target as to_target
from hybrid_jax.pruning.transforms import HoldMasksState as HoldMasksState
from hybrid_jax.pruning.transforms import PruneState as PruneState
from hybrid_jax.pruning.transforms import hold_masks as hold_masks
from hybrid_jax.pruning.transforms import prune_by_schedule as prune_by_schedule
from hybrid_jax.pruning.widths import paying_widths as paying_widths
from hybrid_jax.pruning.widths import to_widths as to_widths
