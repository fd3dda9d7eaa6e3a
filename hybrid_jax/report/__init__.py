"""Reports: what to ship and why, tables, plots and plain words on one run, or on several seeds."""

from hybrid_jax.report.choice import choose as choose
from hybrid_jax.report.comparison import Comparison as Comparison
from hybrid_jax.report.comparison import McNemar as McNemar
from hybrid_jax.report.comparison import compare as compare
from hybrid_jax.report.comparison import mcnemar as mcnemar
from hybrid_jax.report.page import show as show
from hybrid_jax.report.page import write as write
from hybrid_jax.report.rows import File as File
from hybrid_jax.report.rows import Results as Results
from hybrid_jax.report.rows import Row as Row
from hybrid_jax.report.rows import read as read
from hybrid_jax.report.rows import save as save
from hybrid_jax.report.seeds import average as average
from hybrid_jax.report.seeds import write_average as write_average
from hybrid_jax.report.shipping import headline as headline
