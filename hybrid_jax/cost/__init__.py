"""What a model costs: MACs, BOPs, parameters, bytes, peak activation memory."""

from hybrid_jax.cost.count import Cost, SiteCost, count
from hybrid_jax.cost.formula import Formula, formula
from hybrid_jax.cost.memory import peak_activation_bytes

__all__ = [
    "Cost",
    "Formula",
    "SiteCost",
    "count",
    "formula",
    "peak_activation_bytes",
]
