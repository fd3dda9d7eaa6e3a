"""Deployment: what leaves this package, checked after it left.

`export` writes a function with its parameters to a StableHLO file with a manifest, `load` reads it
back, `verify` runs it in a new process against the model, and `latency` times one function against
another, `seconds` one call, `width_latencies` the widths that channels may be cut to. `to_c` writes
an integer program as one C99 file, `export_c` with a manifest beside it.
"""

from hybrid_jax.deploy.c import export_c, to_c
from hybrid_jax.deploy.stablehlo import PLATFORMS, Verification, export, load, verify
from hybrid_jax.deploy.timing import Latency, latency, seconds, width_latencies

__all__ = [
    "PLATFORMS",
    "Latency",
    "Verification",
    "export",
    "export_c",
    "latency",
    "load",
    "seconds",
    "to_c",
    "verify",
    "width_latencies",
]
