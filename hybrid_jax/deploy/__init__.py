"""Deployment: what leaves this package, checked after it left.

`export` writes a function with its parameters to a StableHLO file with a manifest, `load` reads it
back, `verify` runs it in a new process against the model, and `latency` times one function against
another, `seconds` one call, `width_latencies` the widths that channels may be cut to.
`packed.save` writes the integers of a model in as few bits as they need, `packed.load` reads them.
"""

from hybrid_jax.deploy import packed
from hybrid_jax.deploy.stablehlo import PLATFORMS, Verification, export, load, verify
from hybrid_jax.deploy.timing import Latency, latency, seconds, width_latencies

__all__ = [
    "PLATFORMS",
    "Latency",
    "Verification",
    "export",
    "latency",
    "load",
    "packed",
    "seconds",
    "verify",
    "width_latencies",
]
