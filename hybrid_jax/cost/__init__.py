"""What a model costs: MACs, BOPs, parameters, bytes; of a program its memory too."""

from hybrid_jax.cost.count import Cost, SiteCost, count
from hybrid_jax.cost.formula import Formula, formula
from hybrid_jax.cost.stored import File, Stored, of_program
