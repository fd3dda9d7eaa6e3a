"""What a model costs: MACs, BOPs, parameters, bytes, peak activation memory."""

from hybrid_jax.cost.count import Cost as Cost
from hybrid_jax.cost.count import SiteCost as SiteCost
from hybrid_jax.cost.count import count as count
from hybrid_jax.cost.formula import Formula as Formula
from hybrid_jax.cost.formula import formula as formula
from hybrid_jax.cost.memory import peak_activation_bytes as peak_activation_bytes
