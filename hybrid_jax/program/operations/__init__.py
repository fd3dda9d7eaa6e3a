"""The operations of an inference graph: what each is, and means in floats and in integers.

`floats` takes and returns float32 arrays (B, …); a constant has B = 1. `integers` takes each input
as it is stored, uint8 where it is encoded, accumulates in int32 and requantizes once, as
`arithmetic` states. An operation without integers of its own has only the first: what is encoded
around it is converted.
"""

from hybrid_jax.program.operations.base import (
    Operation,
    compute,
    convert,
    dequantize,
    quantize,
    requantize,
    rounded,
    steps_from_zero,
)
from hybrid_jax.program.operations.call import Call
from hybrid_jax.program.operations.contraction import Conv, Dense, MatMul
from hybrid_jax.program.operations.elementwise import (
    Add,
    Clip,
    Convert,
    Function,
    Maximum,
    Minimum,
    Multiply,
)
from hybrid_jax.program.operations.moves import (
    Broadcast,
    Concatenate,
    Constant,
    Gather,
    Pad,
    Reshape,
    Slice,
    Transpose,
)
from hybrid_jax.program.operations.reduce import (
    AveragePool,
    Largest,
    MaxPool,
    Mean,
    Normalize,
    Softmax,
)
