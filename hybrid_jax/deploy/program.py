"""The inference graph: a short closed list of operations, in floats or integers, for every target.

A `Program` is plain data: NumPy arrays and names. `lower` makes it from a traced function, `run`
evaluates it in JAX, and every backend writes it down in its target's language. Shapes are those of
one example, without the batch; images are (H, W, C) whatever the traced function preferred.

An *encoded* tensor holds unsigned integers q for the values scale · (q − zero_point). Operations of
encoded tensors accumulate in int32, exactly, and requantize once (see `arithmetic`); those of float
tensors compute in float32. A convolution or dense layer may take an encoded tensor and return a
float one, as the last layer does: its accumulator times its scale.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from hybrid_jax import core
from hybrid_jax.quantization import integer_step

UNBOUNDED = (-math.inf, math.inf)


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How a tensor's values are stored: scale · (q − zero_point), q in [low, high], in a uint8.

    Attributes:
      scale: Above 0; a float32 number.
      zero_point: In [low, high]; 0 after a ReLU.
      low: At least 0.
      high: At most 255; 2^bits − 1 for fewer bits.
    """

    scale: float
    zero_point: int = 0
    low: int = 0
    high: int = 255

    def __post_init__(self):
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be a finite number above 0, got {self.scale}")
        if not 0 <= self.low <= self.zero_point <= self.high <= 255:
            raise ValueError(
                "encoding must have 0 <= low <= zero_point <= high <= 255, "
                f"got {self.low}, {self.zero_point}, {self.high}"
            )


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The shape of one example, and how it is stored; None is float32."""

    shape: tuple[int, ...]
    encoding: Encoding | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """A kernel with a bias for each output channel.

    Attributes:
      values: (kh, kw, C / groups, O) or (C, O); float32, or int8 in [−127, 127], below 8
        bits in [−63, 63] and multiples of `integer_step(bits)`; with 1 bit none is 0.
      scale: float32 (O,), the kernel is values · scale; None for a float kernel.
      bias: float32 (O,), as a value, not in steps.
      bits: Of each entry of `values` in a packed file; 32 for a float kernel.

    Raises:
      ValueError: If there is a scale, and the bits are not 1 to 8 or the values not of these bits.
    """

    values: np.ndarray
    scale: np.ndarray | None
    bias: np.ndarray
    bits: int = 32

    def __post_init__(self):
        if self.scale is None:
            return
        step = integer_step(core.check_integer("bits", self.bits, 1, 8))
        most = step * max(2 ** (self.bits - 1) - 1, 1)
        sizes = np.abs(self.values.astype(np.int16))
        off = sizes != step if self.bits == 1 else (sizes % step != 0) | (sizes > most)
        if off.any():
            multiples = f"multiples of {step} in [−{most}, {most}]"
            wanted = f"−{step} and {step}" if self.bits == 1 else multiples
            raise ValueError(
                f"values must be {wanted} with bits {self.bits}, got {self.values[off][0]}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One step: reads tensors by name, and makes one.

    Attributes:
      inputs: Names of the tensors that it reads.
      output: Name of the tensor that it makes.
    """

    inputs: tuple[str, ...]
    output: str


@dataclasses.dataclass(frozen=True, eq=False)
class Conv(Operation):
    """A convolution of (H, W, C) with zero padding; cross-correlation, as in every framework.

    Attributes:
      name: The site's name.
      weights: Kernel (kh, kw, C / groups, O), bias (O,).
      strides: Along H and W.
      padding: ((before, after) along H, the same along W).
      dilation: Of the kernel, along H and W.
      groups: C for a depthwise convolution.
      clip: Least and greatest value of the result; (0, inf) is a ReLU, (0, 6) a ReLU6.
    """

    name: str
    weights: Weights
    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    clip: tuple[float, float] = UNBOUNDED


@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Operation):
    """A matrix product of (C,) with a kernel (C, O), plus a bias, clipped."""

    name: str
    weights: Weights
    clip: tuple[float, float] = UNBOUNDED


@dataclasses.dataclass(frozen=True, eq=False)
class Add(Operation):
    """The sum of two tensors of one shape, clipped."""

    clip: tuple[float, float] = UNBOUNDED


@dataclasses.dataclass(frozen=True, eq=False)
class Multiply(Operation):
    """The product of two tensors, clipped; the second may have length 1 along H and W."""

    clip: tuple[float, float] = UNBOUNDED


@dataclasses.dataclass(frozen=True, eq=False)
class Clip(Operation):
    """The values between `low` and `high`; of an encoded tensor in its encoding."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True, eq=False)
class MaxPool(Operation):
    """The largest value of each window of (H, W, C), in the input's encoding, padding aside."""

    window: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))


@dataclasses.dataclass(frozen=True, eq=False)
class AveragePool(Operation):
    """The mean of each window of (H, W, C); padding counts as zeros."""

    window: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))


@dataclasses.dataclass(frozen=True, eq=False)
class Mean(Operation):
    """The mean over H and W: (H, W, C) to (C,)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Concatenate(Operation):
    """The inputs one after the other along `axis` of an example."""

    axis: int


@dataclasses.dataclass(frozen=True, eq=False)
class Reshape(Operation):
    """The same values in row-major order under the output's shape, in the input's encoding."""


@dataclasses.dataclass(frozen=True, eq=False)
class Transpose(Operation):
    """Axis i of the output is axis permutation[i] of an example, in the input's encoding."""

    permutation: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Pad(Operation):
    """Zeros around the values, (before, after) along each axis, in the input's encoding."""

    padding: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Slice(Operation):
    """Entries start, start + stride, … before stop along each axis, in the input's encoding."""

    starts: tuple[int, ...]
    stops: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Lookup(Operation):
    """A function of each value: 'logistic', 'tanh' or 'exp'; of integers a table of 256 entries."""

    function: str


@dataclasses.dataclass(frozen=True, eq=False)
class Softmax(Operation):
    """Softmax over the last axis, in floats: both tensors are float32."""


@dataclasses.dataclass(frozen=True, eq=False)
class Convert(Operation):
    """The same values in the output's encoding: quantizes, requantizes or dequantizes."""


SAME_ENCODING = (Clip, MaxPool, Reshape, Transpose, Pad, Slice)
"""Operations whose output has the encoding of their input."""


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """An inference graph of one input and one output.

    Attributes:
      input: Name of the tensor that it is given, float32.
      output: Name of the tensor that it returns, float32.
      tensors: {name: shape and encoding}.
      operations: In an order in which they can run.
    """

    input: str
    output: str
    tensors: dict[str, Tensor]
    operations: tuple[Operation, ...]

    @property
    def parts(self) -> tuple["Program", ...]:
        """The programs that it consists of: itself."""
        return (self,)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one example."""
        return self.tensors[self.input].shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of one example."""
        return self.tensors[self.output].shape

    @property
    def weighted(self) -> Iterator["Conv | Dense"]:
        """The convolutions and dense layers, in running order."""
        return (op for op in self.operations if isinstance(op, Conv | Dense))

    def encoding(self, name: str) -> Encoding | None:
        """The encoding of the tensor of that name."""
        return self.tensors[name].encoding


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """A gate, and experts of which one runs for each image: that of the gate's largest output.

    Attributes:
      gate: Its outputs are (E,); ties go to the lowest index.
      experts: E programs of one input shape and one output shape.

    Raises:
      ValueError: If the shapes do not fit.
    """

    gate: Program
    experts: tuple[Program, ...]

    def __post_init__(self):
        count = self.gate.output_shape
        if count != (len(self.experts),):
            raise ValueError(f"gate must return shape ({len(self.experts)},), got {count}")
        ends = {
            "input": {program.input_shape for program in self.parts},
            "output": {program.output_shape for program in self.experts},
        }
        for end, shapes in ends.items():
            if len(shapes) > 1:
                raise ValueError(f"programs must have one {end} shape, got {sorted(shapes)}")

    @property
    def parts(self) -> tuple[Program, ...]:
        """The programs that it consists of: the gate, then the experts."""
        return (self.gate, *self.experts)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one example."""
        return self.gate.input_shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of one example."""
        return self.experts[0].output_shape


def kernel_bits(program: Program | Mixture) -> list[int]:
    """Bits of the kernels as `Weights.values` has them, for files that hold them as they are.

    Example:
      >>> weights = Weights(np.int8([[16]]), np.float32([0.5]), np.float32([1.0]), bits=4)
      >>> tensors = {'x': Tensor((1,)), 'y': Tensor((1,))}
      >>> kernel_bits(Program('x', 'y', tensors, (Dense(('x',), 'y', 'dense', weights),)))
      [8]
    """
    kernels = (op.weights.values for part in program.parts for op in part.weighted)
    return sorted({8 * values.itemsize for values in kernels})
