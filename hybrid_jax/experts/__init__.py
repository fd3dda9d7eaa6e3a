"""Experts: stacked, mapped, routed and mixed.

`stack` puts experts of equal shape in one pytree and `map_experts` runs a function over them. A
routing is a pure function from the gate's logits to weights. Two mixtures give the same numbers:
`mixture` runs and weighs all experts (for training and as a reference), `one_of` runs the gate and
one expert (for the edge). A `cascade` needs no gate: a cheap expert hands on what it is unsure of.
Losses balance the gate, and `budget_update` keeps its cost.
"""

from hybrid_jax.experts.budget import budget_update, cost_aware, expected_cost
from hybrid_jax.experts.cascade import (
    Cascaded,
    cascade,
    confidences,
    max_probability,
    opinions,
    stages,
)
from hybrid_jax.experts.diagnostics import (
    collapsed,
    disagreement,
    unused,
    usage,
    usage_entropy,
    usage_per_class,
)
from hybrid_jax.experts.fingerprint import check_fitted, fingerprint
from hybrid_jax.experts.gates import (
    GATES,
    gate_cnn,
    gate_mlp,
    gate_separable,
    linear_probe,
    ridge,
    shared_stem,
)
from hybrid_jax.experts.losses import entropy, expected_loss, importance, load, z_loss
from hybrid_jax.experts.mapping import alike, fastest, map_each, map_experts
from hybrid_jax.experts.mixture import Aux, combine, mixture, one_of
from hybrid_jax.experts.routing import (
    ROUTINGS,
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
