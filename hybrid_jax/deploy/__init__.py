"""Deployment: what leaves this package, checked after it left.

`lower` makes the inference graph of a function, a `Program`, in floats or in integers, and `run`
evaluates it in JAX; a `Mixture` is a gate and experts. `export` writes any function with its
parameters to a StableHLO file with a manifest, `load` reads it back, `verify` runs it in a new
process against the model, and `latency` times one function against another, `seconds` one call,
`width_latencies` the widths that channels may be cut to.
"""

from hybrid_jax.deploy import packed
from hybrid_jax.deploy.lowering import lower
from hybrid_jax.deploy.program import Encoding, Mixture, Program, Tensor, Weights
from hybrid_jax.deploy.reference import run
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
    "Encoding",
    "Latency",
    "Mixture",
    "Program",
    "Tensor",
    "Verification",
    "Weights",
    "export",
    "export_c",
    "latency",
    "load",
    "lower",
    "packed",
    "run",
    "seconds",
    "to_c",
    "verify",
    "width_latencies",
]
