"""Deployment: what leaves this package, checked after it left.

`export_to` writes a program for one of `TARGETS`, and `check` runs the file there as its user does,
beside the dense float model's. `export_program` writes StableHLO, `save_program` and `load_program`
a packed file; `to_c` is C99, `to_litert` a .tflite flatbuffer, `to_onnx` an ONNX model.

`emulate` compiles a C file for a Cortex-M, one of `PROCESSORS`, and says what it takes there;
`export_c_test` writes a second file by which it is checked on a board.

`export` writes any function with its parameters to a StableHLO file, `load` reads it back.
`latency` times one function against another, `width_latencies` the widths that channels may be cut
to.
"""

from hybrid_jax.deploy.c import to_c
from hybrid_jax.deploy.c_check import export_c_test
from hybrid_jax.deploy.checking import Check, check, export_to
from hybrid_jax.deploy.litert import to_litert
from hybrid_jax.deploy.microcontroller import PROCESSORS, Emulation, emulate
from hybrid_jax.deploy.onnx_writer import to_onnx
from hybrid_jax.deploy.packed import load_program, save_program
from hybrid_jax.deploy.stablehlo import PLATFORMS, export, export_program, load
from hybrid_jax.deploy.targets import TARGETS
from hybrid_jax.deploy.timing import Latency, latency, width_latencies
