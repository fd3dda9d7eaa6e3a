"""An ONNX graph in the making: which value holds which tensor of a program, and in what form."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybrid_jax.deploy import arithmetic
from hybrid_jax.deploy.packed import pack_bits
from hybrid_jax.deploy.program import UNBOUNDED, Encoding, Operation, Program

WHOLE = (0, 255)  # where a QuantizeLinear to uint8 saturates


class Graph:
    """The nodes and constants that make a program's tensors.

    A tensor is stored as uint8 where it is encoded, and channels first where it is an image. Values
    are named by numbers, as names of words are half of a small network's file, and equal constants
    are one; the nodes of layers are named after their sites.

    Args:
      onnx: The module.
      program: The program.
      x: Name of the value that is its input, (N, …) in the program's order of axes.
      prefix: Of every name that is made.
      vnni: Whether all kernels of integers are int8.
      opset: Version of ONNX's operations.

    Attributes:
      nodes: `onnx.NodeProto`s, in running order.
      stored: {tensor: name of the value that holds it}.
      vnni, opset: As given.
    """

    def __init__(
        self,
        onnx: Any,
        program: Program,
        x: str,
        prefix: str = "",
        vnni: bool = False,
        opset: int = 21,
    ):
        self.vnni, self.opset = vnni, opset
        self.nodes: list[Any] = []
        self._onnx, self._program = onnx, program
        self._names = (f"{prefix}{number}" for number in itertools.count())
        self._floats: dict[str, str] = {}
        self._constants: dict[tuple, Any] = {}
        order = axis_order(self.shape(program.input))
        self.stored = {program.input: self.transpose(x, order)}

    @property
    def constants(self) -> list[Any]:
        """`onnx.TensorProto`s."""
        return list(self._constants.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one example of a tensor, in the program's order."""
        return self._program.tensors[name].shape

    def encoding(self, name: str) -> Encoding | None:
        """A tensor's encoding."""
        return self._program.encoding(name)

    def result(self) -> str:
        """The value that is the program's output, in floats and in the program's order of axes."""
        order = axis_order(self.shape(self._program.output))
        back = [order.index(axis) for axis in range(len(order))]
        return self.transpose(self.floats(self._program.output), back)

    def floats(self, name: str) -> str:
        """The value that holds a tensor in floats, the same for all who read it."""
        if name not in self._floats:
            self._floats[name] = self.dequantize(self.stored[name], self.encoding(name))
        return self._floats[name]

    def dequantize(self, value: str, encoding: Encoding | None) -> str:
        """A stored value in floats."""
        if encoding is None:
            return value
        return self.node("DequantizeLinear", [value, *self._parameters_of(encoding)])

    def store(self, value: str, op: Operation, within: tuple[Any, Any] = WHOLE) -> str:
        """Floats as the operation's output is stored, clipped.

        Args:
          value: The floats.
          op: The operation.
          within: The bounds that integers behind a QuantizeLinear are taken to keep.
        """
        encoding, clip = self.encoding(op.output), getattr(op, "clip", UNBOUNDED)
        if encoding is None:
            return self.clip(value, clip, np.float32, UNBOUNDED)
        quantized = self.node("QuantizeLinear", [value, *self._parameters_of(encoding)])
        return self.clip(quantized, arithmetic.bounds(encoding, clip), np.uint8, within)

    def clip(self, value: str, bounds: tuple[Any, Any], dtype: Any, within: tuple[Any, Any]) -> str:
        """A value between bounds, none of which is written that it keeps already."""
        if bounds == within:
            return value
        if bounds == (0.0, np.inf):
            return self.node("Relu", [value])
        ends = [
            "" if bound == known else self.constant(np.asarray(bound, dtype))
            for bound, known in zip(bounds, within)
        ]
        return self.node("Clip", [value, *ends])

    def pad(self, value: str, padding: Sequence[tuple[int, int]], encoding: Encoding | None) -> str:
        """A stored value with zeros around it; (before, after) along each axis of an example."""
        zero = np.float32(0) if encoding is None else np.uint8(encoding.zero_point)
        widths = np.int64(pads([(0, 0), *arranged(padding)]))
        return self.node("Pad", [value, self.constant(widths), self.constant(zero)])

    def transpose(self, value: str, order: Sequence[int]) -> str:
        """A value with its axes, the batch aside, in that order."""
        if list(order) == list(range(len(order))):
            return value
        return self.node("Transpose", [value], perm=[0, *(axis + 1 for axis in order)])

    def node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Appends a node, and returns the name of its output."""
        output = next(self._names)
        self.nodes.append(self._onnx.helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, value: Any) -> str:
        """The name of a constant, of the rank that it has."""
        value = np.asarray(value)
        key = value.dtype, value.shape, value.tobytes()
        if key not in self._constants:
            made = self._onnx.numpy_helper.from_array(value, next(self._names))
            self._constants[key] = made
        return self._constants[key].name

    def halves(self, value: np.ndarray, step: int) -> str:
        """An int8 of multiples of `step`, of which the file holds 4 bits each.

        Runtimes make it an int8 when they open the file, and compute as with any other.
        """
        types, helper = self._onnx.TensorProto, self._onnx.helper
        data = pack_bits((value // step).ravel(), 4).tobytes()
        key = types.INT4, value.shape, data
        if key not in self._constants:
            made = helper.make_tensor(next(self._names), types.INT4, value.shape, data, raw=True)
            self._constants[key] = made
        whole = self.node("Cast", [self._constants[key].name], to=types.INT32)
        steps = self.node("Mul", [whole, self.constant(np.int32(step))])
        return self.node("Cast", [steps], to=types.INT8)

    def _parameters_of(self, encoding):
        scale, zero = np.float32(encoding.scale), np.uint8(encoding.zero_point)
        return [self.constant(scale), self.constant(zero)]


def axis_order(shape: Sequence[int]) -> tuple[int, ...]:
    """Which axis of an example of that shape stands at each place in ONNX.

    Example:
      >>> axis_order((32, 16, 3)), axis_order((10,))
      ((2, 0, 1), (0,))
    """
    return (2, 0, 1) if len(shape) == 3 else tuple(range(len(shape)))


def arranged(entries: Sequence[Any]) -> list[Any]:
    """One entry for each axis of an example, in ONNX's order.

    Example:
      >>> arranged('hwc')
      ['c', 'h', 'w']
    """
    return [entries[axis] for axis in axis_order(entries)]


def pads(padding: Sequence[tuple[int, int]]) -> list[int]:
    """(before, after) along each axis as ONNX has them: all befores, then all afters.

    Example:
      >>> pads([(1, 2), (3, 4)])
      [1, 3, 2, 4]
    """
    return [width for ends in zip(*padding) for width in ends]
