"""Pruning: criteria → allocation → masks → schedule → optax transform; channels and shrink."""

from hybrid_jax.core import expand, narrow, shrink, slice_tree
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
from hybrid_jax.pruning.sensitivity import channel_sensitivity, sensitive, sensitivity
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
    "channel_sensitivity",
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
