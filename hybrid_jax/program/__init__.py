"""The one account of what a device computes: inference graphs, read from functions.

`lower` reads a function into a `Program` of operations between named edges, and compares it with
the function. `apply` evaluates it with other weights, `run` in its integers, `simulate` in floats
rounded as a device rounds. A `Mixture` is a gate and experts, a `Cascade` stages of which the next
runs where one is not sure. How a program is stored in integers is planned in `quantization`.
"""

from hybrid_jax.program.choice import Cascade, Choice, Mixture, kernel_bits
from hybrid_jax.program.encoding import UNBOUNDED, Encoding, Tensor, Weights, integer_step
from hybrid_jax.program.evaluate import Forms, apply, edges, fastest, run, simulate
from hybrid_jax.program.functions import Step
from hybrid_jax.program.graph import Params, Program, Source
from hybrid_jax.program.operations import (
    Add,
    AveragePool,
    Broadcast,
    Call,
    Clip,
    Concatenate,
    Constant,
    Conv,
    Convert,
    Dense,
    Function,
    Gather,
    Largest,
    MatMul,
    Maximum,
    MaxPool,
    Mean,
    Minimum,
    Multiply,
    Normalize,
    Operation,
    Pad,
    Reshape,
    Slice,
    Softmax,
    Transpose,
)
from hybrid_jax.program.read import lower
