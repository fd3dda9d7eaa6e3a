"""Experts: stacked, mapped, routed and mixed.

`stack` puts experts of equal shape in one pytree, `map_experts` runs a function over them,
`mixture` runs and weighs them all (for training and as a reference), and `one_of` runs the gate and
one expert (for the edge). Routings and losses are pure functions of the gate's logits.
"""

from hybrid_jax.experts.diagnostics import (
    collapsed,
    disagreement,
    unused,
    usage,
    usage_entropy,
    usage_per_class,
)
from hybrid_jax.experts.gates import gate_cnn, gate_linear, linear_probe, ridge, shared_stem
from hybrid_jax.experts.losses import (
    entropy,
    expected_cost,
    importance,
    load,
    switch_balance,
    z_loss,
)
from hybrid_jax.experts.mapping import fastest, map_experts
from hybrid_jax.experts.mixture import Aux, combine, mixture, one_of
from hybrid_jax.experts.products import as_products
from hybrid_jax.experts.routing import (
    Routed,
    Routing,
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
    "Routed",
    "Routing",
    "as_products",
    "collapsed",
    "combine",
    "count",
    "disagreement",
    "entropy",
    "expected_cost",
    "expert_mesh",
    "fastest",
    "gate_cnn",
    "gate_linear",
    "importance",
    "linear_probe",
    "load",
    "map_experts",
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
