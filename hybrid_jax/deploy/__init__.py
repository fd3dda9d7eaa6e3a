"""Deployment: what leaves this package, checked after it left.

`lower` makes the inference graph of a function, a `Program` in floats or in integers, `run`
evaluates it in JAX and `simulate` in floats; a `Mixture` is a gate and experts. `fastest` measures
how its convolutions are best computed. `export_to` writes it for one of `TARGETS`, and `check` runs
the file there, beside the dense float model's. `export_program` writes StableHLO, `save_program`
and `load_program` a packed file; `to_c` is C99, `to_litert` a .tflite
flatbuffer, `to_onnx` an ONNX model.

`export` writes any function with its parameters to a StableHLO file, `load` reads it back.
`latency` times one function against another, `seconds` one call, `width_latencies` the widths that
channels may be cut to.
"""

from hybrid_jax.deploy.c import to_c
from hybrid_jax.deploy.checking import Check, check, export_to
from hybrid_jax.deploy.forms import fastest
from hybrid_jax.deploy.litert import to_litert
from hybrid_jax.deploy.lowering import lower
from hybrid_jax.deploy.onnx_writer import to_onnx
from hybrid_jax.deploy.packed import load_program, save_program
from hybrid_jax.deploy.program import Encoding, Mixture, Program, Tensor, Weights
from hybrid_jax.deploy.reference import run, simulate
from hybrid_jax.deploy.stablehlo import PLATFORMS, export, export_program, load
from hybrid_jax.deploy.targets import TARGETS
from hybrid_jax.deploy.timing import Latency, latency, width_latencies

__all__ = [
    "PLATFORMS",
    "TARGETS",
    "Check",
    "Encoding",
    "Latency",
    "Mixture",
    "Program",
    "Tensor",
    "Weights",
    "check",
    "export",
    "export_program",
    "export_to",
    "fastest",
    "latency",
    "load",
    "load_program",
    "lower",
    "run",
    "save_program",
    "simulate",
    "to_c",
    "to_litert",
    "to_onnx",
    "width_latencies",
]
