"""The one account of what a device computes: inference graphs, read from functions.

`lower` reads a function into a `Program` of operations between named edges, and compares it with
the function. `apply` evaluates it with other weights, `run` in its integers, `simulate` in floats
rounded as a device rounds. A `Mixture` is a gate and experts, a `Cascade` stages of which the next
runs where one is not sure. How a program is stored in integers is planned in `quantization`.
"""

from hybrid_jax.program.choice import Cascade as Cascade
from hybrid_jax.program.choice import Choice as Choice
from hybrid_jax.program.choice import Mixture as Mixture
from hybrid_jax.program.choice import kernel_bits as kernel_bits
from hybrid_jax.program.encoding import UNBOUNDED as UNBOUNDED
from hybrid_jax.program.encoding import Encoding as Encoding
from hybrid_jax.program.encoding import Tensor as Tensor
from hybrid_jax.program.encoding import Weights as Weights
from hybrid_jax.program.encoding import integer_step as integer_step
from hybrid_jax.program.evaluate import Forms as Forms
from hybrid_jax.program.evaluate import apply as apply
from hybrid_jax.program.evaluate import edges as edges
from hybrid_jax.program.evaluate import fastest as fastest
from hybrid_jax.program.evaluate import run as run
from hybrid_jax.program.evaluate import simulate as simulate
from hybrid_jax.program.functions import Step as Step
from hybrid_jax.program.graph import Params as Params
from hybrid_jax.program.graph import Program as Program
from hybrid_jax.program.graph import Source as Source
from hybrid_jax.program.operations import Add as Add
from hybrid_jax.program.operations import AveragePool as AveragePool
from hybrid_jax.program.operations import Broadcast as Broadcast
from hybrid_jax.program.operations import Call as Call
from hybrid_jax.program.operations import Clip as Clip
from hybrid_jax.program.operations import Concatenate as Concatenate
from hybrid_jax.program.operations import Constant as Constant
from hybrid_jax.program.operations import Conv as Conv
from hybrid_jax.program.operations import Convert as Convert
from hybrid_jax.program.operations import Dense as Dense
from hybrid_jax.program.operations import Function as Function
from hybrid_jax.program.operations import Gather as Gather
from hybrid_jax.program.operations import Largest as Largest
from hybrid_jax.program.operations import MatMul as MatMul
from hybrid_jax.program.operations import Maximum as Maximum
from hybrid_jax.program.operations import MaxPool as MaxPool
from hybrid_jax.program.operations import Mean as Mean
from hybrid_jax.program.operations import Minimum as Minimum
from hybrid_jax.program.operations import Multiply as Multiply
from hybrid_jax.program.operations import Normalize as Normalize
from hybrid_jax.program.operations import Operation as Operation
from hybrid_jax.program.operations import Pad as Pad
from hybrid_jax.program.operations import Reshape as Reshape
from hybrid_jax.program.operations import Slice as Slice
from hybrid_jax.program.operations import Softmax as Softmax
from hybrid_jax.program.operations import Transpose as Transpose
from hybrid_jax.program.read import lower as lower
