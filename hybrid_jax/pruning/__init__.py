"""Pruning: criteria → allocation → masks → schedule → optax transform; channels and shrink."""

from hybrid_jax.core import expand, narrow, shrink, slice_tree
from hybrid_jax.pruning.allocation import Allocation, erk, global_, uniform
from hybrid_jax.pruning.coupling import channels, group_scores, keep_channels
from hybrid_jax.pruning.criteria import (
    batchnorm_scale,
    fisher,
    geometric_median,
    lamp,
    magnitude,
    mean_squared_gradients,
    random,
    taylor,
)
from hybrid_jax.pruning.granularity import Granularity, blocks, kernels, n_m, unstructured
from hybrid_jax.pruning.masking import apply_masks, masks
from hybrid_jax.pruning.packing import pack_masks, unpack_masks
from hybrid_jax.pruning.penalties import add_penalty, batchnorm_l1, group_lasso, group_shrinkage
from hybrid_jax.pruning.rounds import prune_in_rounds
from hybrid_jax.pruning.schedules import Schedule, cubic, one_shot
from hybrid_jax.pruning.sensitivity import channel_sensitivity, sensitive, sensitivity
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
    "Schedule",
    "add_penalty",
    "apply_masks",
    "batchnorm_l1",
    "batchnorm_scale",
    "blocks",
    "channel_sensitivity",
    "channels",
    "cubic",
    "erk",
    "expand",
    "fisher",
    "geometric_median",
    "global_",
    "group_lasso",
    "group_scores",
    "group_shrinkage",
    "hold_masks",
    "keep_channels",
    "kernels",
    "lamp",
    "magnitude",
    "masks",
    "mean_squared_gradients",
    "n_m",
    "narrow",
    "one_shot",
    "pack_masks",
    "paying_widths",
    "prune_by_schedule",
    "prune_in_rounds",
    "random",
    "sensitive",
    "sensitivity",
    "shrink",
    "slice_tree",
    "taylor",
    "to_target",
    "to_widths",
    "uniform",
    "unpack_masks",
    "unstructured",
]
