"""Experts: stacked, mapped, routed and mixed.

`stack` puts experts of equal shape in one pytree and `map_experts` runs a function over them. A
routing is a pure function from the gate's logits to weights. Two mixtures give the same numbers:
`mixture` runs and weighs all experts (for training and as a reference), `one_of` runs the gate and
one expert (for the edge). A `cascade` needs no gate: a cheap expert hands on what it is unsure of.
Losses balance the gate, and `budget_update` keeps its cost.
"""

from hybrid_jax.experts.budget import BudgetState as BudgetState
from hybrid_jax.experts.budget import budget_init as budget_init
from hybrid_jax.experts.budget import budget_update as budget_update
from hybrid_jax.experts.budget import cost_aware as cost_aware
from hybrid_jax.experts.budget import expected_cost as expected_cost
from hybrid_jax.experts.cascade import Cascaded as Cascaded
from hybrid_jax.experts.cascade import cascade as cascade
from hybrid_jax.experts.cascade import cascade_cost as cascade_cost
from hybrid_jax.experts.cascade import cascade_edge as cascade_edge
from hybrid_jax.experts.cascade import margin as margin
from hybrid_jax.experts.cascade import max_probability as max_probability
from hybrid_jax.experts.cascade import opinions as opinions
from hybrid_jax.experts.diagnostics import collapsed as collapsed
from hybrid_jax.experts.diagnostics import disagreement as disagreement
from hybrid_jax.experts.diagnostics import unused as unused
from hybrid_jax.experts.diagnostics import usage as usage
from hybrid_jax.experts.diagnostics import usage_entropy as usage_entropy
from hybrid_jax.experts.diagnostics import usage_per_class as usage_per_class
from hybrid_jax.experts.fingerprint import check_fitted as check_fitted
from hybrid_jax.experts.fingerprint import fingerprint as fingerprint
from hybrid_jax.experts.gates import GATES as GATES
from hybrid_jax.experts.gates import gate_cnn as gate_cnn
from hybrid_jax.experts.gates import gate_mlp as gate_mlp
from hybrid_jax.experts.gates import gate_separable as gate_separable
from hybrid_jax.experts.gates import linear_probe as linear_probe
from hybrid_jax.experts.gates import ridge as ridge
from hybrid_jax.experts.gates import shared_stem as shared_stem
from hybrid_jax.experts.losses import entropy as entropy
from hybrid_jax.experts.losses import expected_loss as expected_loss
from hybrid_jax.experts.losses import importance as importance
from hybrid_jax.experts.losses import load as load
from hybrid_jax.experts.losses import z_loss as z_loss
from hybrid_jax.experts.mapping import alike as alike
from hybrid_jax.experts.mapping import fastest as fastest
from hybrid_jax.experts.mapping import map_each as map_each
from hybrid_jax.experts.mapping import map_experts as map_experts
from hybrid_jax.experts.mixture import Aux as Aux
from hybrid_jax.experts.mixture import combine as combine
from hybrid_jax.experts.mixture import mixture as mixture
from hybrid_jax.experts.mixture import one_of as one_of
from hybrid_jax.experts.routing import ROUTINGS as ROUTINGS
from hybrid_jax.experts.routing import Routed as Routed
from hybrid_jax.experts.routing import Routing as Routing
from hybrid_jax.experts.routing import noisy_top_k as noisy_top_k
from hybrid_jax.experts.routing import oracle as oracle
from hybrid_jax.experts.routing import random as random
from hybrid_jax.experts.routing import soft as soft
from hybrid_jax.experts.routing import straight_through as straight_through
from hybrid_jax.experts.routing import switch as switch
from hybrid_jax.experts.routing import top_k as top_k
from hybrid_jax.experts.sharding import expert_mesh as expert_mesh
from hybrid_jax.experts.sharding import shard_stack as shard_stack
from hybrid_jax.experts.stacking import count as count
from hybrid_jax.experts.stacking import stack as stack
from hybrid_jax.experts.stacking import unstack as unstack
