"""Experts: stacked, mapped, routed and mixed.

`stack` puts experts of equal shape in one pytree and `map_experts` runs a function over them. A
routing is a pure function from the gate's logits to weights. Three dispatches give the same
numbers: `mixture` runs and weighs all experts (for training and as a reference), `gathered` runs
each on the inputs gathered for it (for large batches), and `one_of` runs the gate and one expert
(for the edge). A `cascade` needs no gate: a cheap expert hands on what it is unsure of. Losses
balance the gate, and `budget_update` keeps its cost.
"""

from hybrid_jax.experts.budget import (
    BudgetState,
    budget_init,
    budget_update,
    cost_aware,
    expected_cost,
)
from hybrid_jax.experts.capacity import capacity
from hybrid_jax.experts.cascade import (
    Cascaded,
    cascade,
    cascade_cost,
    cascade_edge,
    margin,
    max_probability,
)
from hybrid_jax.experts.competition import expected_loss
from hybrid_jax.experts.diagnostics import (
    collapsed,
    disagreement,
    unused,
    usage,
    usage_entropy,
    usage_per_class,
)
from hybrid_jax.experts.dispatch import gathered
from hybrid_jax.experts.fingerprint import check_fitted, fingerprint
from hybrid_jax.experts.gates import gate_cnn, gate_linear, linear_probe, ridge, shared_stem
from hybrid_jax.experts.losses import (
    entropy,
    importance,
    load,
    switch_balance,
    z_loss,
)
from hybrid_jax.experts.mapping import fastest, map_experts
from hybrid_jax.experts.mixture import Aux, combine, mixture, one_of
from hybrid_jax.experts.routing import (
    Routed,
    Routing,
    expert_choice,
    noisy_top_k,
    oracle,
    random,
    soft,
    straight_through,
    switch,
    top_k,
)
from hybrid_jax.experts.sharding import expert_mesh, shard_stack
from hybrid_jax.experts.stacking import count, stack, unstack

__all__ = [
    "Aux",
    "BudgetState",
    "Cascaded",
    "Routed",
    "Routing",
    "budget_init",
    "budget_update",
    "capacity",
    "cascade",
    "cascade_cost",
    "cascade_edge",
    "check_fitted",
    "collapsed",
    "combine",
    "cost_aware",
    "count",
    "disagreement",
    "entropy",
    "expected_cost",
    "expected_loss",
    "expert_choice",
    "expert_mesh",
    "fastest",
    "fingerprint",
    "gate_cnn",
    "gate_linear",
    "gathered",
    "importance",
    "linear_probe",
    "load",
    "map_experts",
    "margin",
    "max_probability",
    "mixture",
    "noisy_top_k",
    "one_of",
    "oracle",
    "random",
    "ridge",
    "shard_stack",
    "shared_stem",
    "soft",
    "stack",
    "straight_through",
    "switch",
    "switch_balance",
    "top_k",
    "unstack",
    "unused",
    "usage",
    "usage_entropy",
    "usage_per_class",
    "z_loss",
]
