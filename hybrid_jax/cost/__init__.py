"""What a model costs: MACs, BOPs, parameters, bytes; of a program its memory too."""

from hybrid_jax.cost.count import Cost as Cost
from hybrid_jax.cost.count import SiteCost as SiteCost
from hybrid_jax.cost.count import count as count
from hybrid_jax.cost.formula import Formula as Formula
from hybrid_jax.cost.formula import formula as formula
from hybrid_jax.cost.stored import File as File
from hybrid_jax.cost.stored import Stored as Stored
from hybrid_jax.cost.stored import of_program as of_program
