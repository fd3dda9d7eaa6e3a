"""What a model costs: MACs, BOPs, parameters, packed bytes, peak activation memory."""

from hybrid_jax.cost.count import Cost, SiteCost, count
from hybrid_jax.cost.formula import Formula, formula
from hybrid_jax.cost.memory import peak_activation_bytes
from hybrid_jax.cost.packing import csr_widths, layout_bits, packed_bytes

__all__ = [
    "Cost",
    "Formula",
    "SiteCost",
    "count",
    "csr_widths",
    "formula",
    "layout_bits",
    "packed_bytes",
    "peak_activation_bytes",
]
