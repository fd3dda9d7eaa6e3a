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
"""

from hybrid_jax.core import expand, narrow, shrink, slice_state, slice_tree
from hybrid_jax.pruning.allocation import Allocation, erk, global_, uniform
from hybrid_jax.pruning.coupling import channels, group_scores, keep_channels
from hybrid_jax.pruning.criteria import (
    accumulate_movement,
    activation_norms,
    batchnorm_scale,
    channel_independence,
    chip,
    fisher,
    geometric_median,
    grasp,
    hessian_gradient,
    lamp,
    magnitude,
    mean_squared_gradients,
    movement,
    random,
    snip,
    synaptic_flow,
    synflow,
    synflow_masks,
    taylor,
    wanda,
)
from hybrid_jax.pruning.granularity import Granularity, blocks, kernels, n_m, unstructured
from hybrid_jax.pruning.lottery import (
    Ticket,
    barrier,
    errors_between,
    instability,
    interpolate,
    lottery_tickets,
)
from hybrid_jax.pruning.masking import apply_masks, masks
from hybrid_jax.pruning.obs import compensate, obs
from hybrid_jax.pruning.packing import pack_masks, unpack_masks
from hybrid_jax.pruning.penalties import add_penalty, batchnorm_l1, group_lasso, group_shrinkage
from hybrid_jax.pruning.rewiring import RewireState, rewire, rigl, set_
from hybrid_jax.pruning.rounds import prune_in_rounds
from hybrid_jax.pruning.schedules import (
    Schedule,
    cubic,
    cyclic,
    exponential,
    iterative,
    one_shot,
)
from hybrid_jax.pruning.sensitivity import sensitive, sensitivity
from hybrid_jax.pruning.straight_through import StraightThroughState, straight_through
from hybrid_jax.pruning.targets import Reached, to_target
from hybrid_jax.pruning.transforms import (
    HoldMasksState,
    PruneState,
    hold_masks,
    prune_by_schedule,
)
from hybrid_jax.pruning.widths import paying_widths, to_widths

__all__ = [
    "Allocation",
    "Granularity",
    "HoldMasksState",
    "PruneState",
    "Reached",
    "RewireState",
    "Schedule",
    "StraightThroughState",
    "Ticket",
    "accumulate_movement",
    "activation_norms",
    "add_penalty",
    "apply_masks",
    "barrier",
    "batchnorm_l1",
    "batchnorm_scale",
    "blocks",
    "channel_independence",
    "channels",
    "chip",
    "compensate",
    "cubic",
    "cyclic",
    "erk",
    "errors_between",
    "expand",
    "exponential",
    "fisher",
    "geometric_median",
    "global_",
    "grasp",
    "group_lasso",
    "group_scores",
    "group_shrinkage",
    "hessian_gradient",
    "hold_masks",
    "instability",
    "interpolate",
    "iterative",
    "keep_channels",
    "kernels",
    "lamp",
    "lottery_tickets",
    "magnitude",
    "masks",
    "mean_squared_gradients",
    "movement",
    "n_m",
    "narrow",
    "obs",
    "one_shot",
    "pack_masks",
    "paying_widths",
    "prune_by_schedule",
    "prune_in_rounds",
    "random",
    "rewire",
    "rigl",
    "sensitive",
    "sensitivity",
    "set_",
    "shrink",
    "slice_state",
    "slice_tree",
    "snip",
    "straight_through",
    "synaptic_flow",
    "synflow",
    "synflow_masks",
    "taylor",
    "to_target",
    "to_widths",
    "uniform",
    "unpack_masks",
    "unstructured",
    "wanda",
]
