"""Reports: tables, plots and plain words from the results of a run, or of several seeds."""

from hybrid_jax.report import exports
from hybrid_jax.report.comparison import Comparison as Comparison
from hybrid_jax.report.comparison import McNemar as McNemar
from hybrid_jax.report.comparison import compare as compare
from hybrid_jax.report.comparison import mcnemar as mcnemar
from hybrid_jax.report.seeds import aggregate as aggregate
from hybrid_jax.report.seeds import read as read
from hybrid_jax.report.seeds import write_aggregate as write_aggregate
from hybrid_jax.report.single import write as write

describe_export = exports.describe
