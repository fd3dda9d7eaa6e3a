"""Reports: tables, plots and plain words from the results of a run, or of several seeds."""

from hybrid_jax.report.comparison import Comparison, McNemar, compare, mcnemar
from hybrid_jax.report.exports import describe as describe_export
from hybrid_jax.report.seeds import aggregate, read, write_aggregate
from hybrid_jax.report.single import write

__all__ = [
    "Comparison",
    "McNemar",
    "aggregate",
    "compare",
    "describe_export",
    "mcnemar",
    "read",
    "write",
    "write_aggregate",
]
