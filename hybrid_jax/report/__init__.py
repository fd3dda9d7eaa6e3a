"""Reports: what to ship and why, tables, plots and plain words on one run, or on several seeds."""

from hybrid_jax.report.choice import choose
from hybrid_jax.report.comparison import Comparison, McNemar, compare, mcnemar
from hybrid_jax.report.page import show, write
from hybrid_jax.report.rows import File, Results, Row, read, save
from hybrid_jax.report.seeds import average, write_average
from hybrid_jax.report.shipping import headline
