"""Deployment: what leaves this package, checked after it left.

`export` writes a function with its parameters to a StableHLO file with a manifest, `load` reads it
back, `verify` runs it in a new process against the model, and
`compare_latency` times it.
"""

from hybrid_jax.deploy.latency import Latency, compare_latency
from hybrid_jax.deploy.stablehlo import PLATFORMS, Verification, export, load, verify

__all__ = ["PLATFORMS", "Latency", "Verification", "compare_latency", "export", "load", "verify"]
