"""The operations of an inference graph: what each is, and means in floats and in integers.

`floats` takes and returns float32 arrays (B, …); a constant has B = 1. `integers` takes each input
as it is stored, uint8 where it is encoded, accumulates in int32 and requantizes once, as
`arithmetic` states. An operation without integers of its own has only the first: what is encoded
around it is converted.
"""

from hybrid_jax.program.operations.base import Operation as Operation
from hybrid_jax.program.operations.base import compute as compute
from hybrid_jax.program.operations.base import convert as convert
from hybrid_jax.program.operations.base import dequantize as dequantize
from hybrid_jax.program.operations.base import quantize as quantize
from hybrid_jax.program.operations.base import requantize as requantize
from hybrid_jax.program.operations.base import rounded as rounded
from hybrid_jax.program.operations.base import steps_from_zero as steps_from_zero
from hybrid_jax.program.operations.call import Call as Call
from hybrid_jax.program.operations.contraction import Conv as Conv
from hybrid_jax.program.operations.contraction import Dense as Dense
from hybrid_jax.program.operations.contraction import MatMul as MatMul
from hybrid_jax.program.operations.elementwise import Add as Add
from hybrid_jax.program.operations.elementwise import Clip as Clip
from hybrid_jax.program.operations.elementwise import Convert as Convert
from hybrid_jax.program.operations.elementwise import Function as Function
from hybrid_jax.program.operations.elementwise import Maximum as Maximum
from hybrid_jax.program.operations.elementwise import Minimum as Minimum
from hybrid_jax.program.operations.elementwise import Multiply as Multiply
from hybrid_jax.program.operations.moves import Broadcast as Broadcast
from hybrid_jax.program.operations.moves import Concatenate as Concatenate
from hybrid_jax.program.operations.moves import Constant as Constant
from hybrid_jax.program.operations.moves import Gather as Gather
from hybrid_jax.program.operations.moves import Pad as Pad
from hybrid_jax.program.operations.moves import Reshape as Reshape
from hybrid_jax.program.operations.moves import Slice as Slice
from hybrid_jax.program.operations.moves import Transpose as Transpose
from hybrid_jax.program.operations.reduce import AveragePool as AveragePool
from hybrid_jax.program.operations.reduce import Largest as Largest
from hybrid_jax.program.operations.reduce import MaxPool as MaxPool
from hybrid_jax.program.operations.reduce import Mean as Mean
from hybrid_jax.program.operations.reduce import Normalize as Normalize
from hybrid_jax.program.operations.reduce import Softmax as Softmax
