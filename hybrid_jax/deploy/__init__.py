"""Deployment: what leaves this package, checked after it left.

`lower` makes the inference graph of a function, a `Program`, in floats or in integers, `run`
evaluates it in JAX and `simulate` in floats; a `Mixture` is a gate and experts. `fastest` measures
how its convolutions are best computed. `export` writes any function with its parameters to a
StableHLO file with a manifest, `export_program` a program; `load` reads it back, `verify` runs it
in a new process against the model. `latency` times one function against another, `seconds` one
call, `width_latencies` the widths that channels may be cut to.
"""

from hybrid_jax.deploy.forms import fastest
from hybrid_jax.deploy.lowering import lower
from hybrid_jax.deploy.program import Encoding, Mixture, Program, Tensor, Weights
from hybrid_jax.deploy.reference import run, simulate
from hybrid_jax.deploy.stablehlo import (
    PLATFORMS,
    Verification,
    export,
    export_program,
    load,
    verify,
)
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
    "export_program",
    "fastest",
    "latency",
    "load",
    "lower",
    "run",
    "seconds",
    "simulate",
    "verify",
    "width_latencies",
]
