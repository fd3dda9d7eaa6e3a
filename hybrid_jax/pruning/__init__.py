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
    masks = core.expand(found.choice, graph.groups, params)
    small_fn, small, certificate = core.shrink(fn, params, masks, x)

What each layer, or group of channels, bears alone, and which to leave out:

    each = pruning.channels(graph.groups)
    losses = pruning.sensitivity(loss_fn, params, scores, (0.25, 0.5), x, granularity=each)
    exempt = [re.escape(name) for name, own in losses.items() if own.max() > limit]
    masks = pruning.masks(scores, 0.5, each, exempt=exempt)

By name they are in registries that are open to users: `CRITERIA`, of a `Given` network and data;
`GRANULARITIES` and `ALLOCATIONS`, of a graph; `SCHEDULES`, of a sparsity and the steps to it;
`RECOVERIES`, of a `Given` network and masks.
"""

from hybrid_jax.pruning.allocation import ALLOCATIONS, Allocation, erk, global_, uniform
from hybrid_jax.pruning.coupling import channels, group_scores, keep_channels
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
from hybrid_jax.pruning.criteria.leaves import CRITERIA, Given
from hybrid_jax.pruning.criteria.weights import lamp, magnitude, random
from hybrid_jax.pruning.granularity import GRANULARITIES, Granularity, unstructured
from hybrid_jax.pruning.masking import apply_masks, masks
from hybrid_jax.pruning.obs import RECOVERIES, compensate, obs
from hybrid_jax.pruning.penalties import add_penalty, batchnorm_l1, group_lasso
from hybrid_jax.pruning.rounds import prune_in_rounds
from hybrid_jax.pruning.schedules import (
    SCHEDULES,
    Schedule,
    cubic,
    cyclic,
    exponential,
    iterative,
    one_shot,
)
from hybrid_jax.pruning.sensitivity import sensitivity
from hybrid_jax.pruning.targets import Reached, to_target
from hybrid_jax.pruning.transforms import HoldMasksState, PruneState, hold_masks, prune_by_schedule
from hybrid_jax.pruning.widths import paying_widths, to_widths
