"""An ONNX graph in the making: which value holds which tensor of a program, and in what form."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hybrid_jax import program as p
from hybrid_jax.deploy.packed import pack_bits
from hybrid_jax.program import UNBOUNDED, arithmetic

WHOLE = (0, 255)  # where a QuantizeLinear to uint8 saturates


class Graph:
    """The nodes and constants that make a program's tensors.

    A tensor is stored as uint8 where it is encoded, and channels first where it has three axes.
    Values are named by numbers behind `prefix`, as names of words are half of a small network's
    file, and equal constants are one, as are equal nodes; those of layers are named after their
    sites.

    Attributes:
      stored: {tensor: name of the value that holds it}; at first `inputs`, (N, …) in the program's
        order of axes.
      bytes: {input: its value} of what comes as uint8.
      single: Tensors that have a batch of one, as they are of constants alone.
      vnni: Whether all kernels of integers are int8.
      opset: Version of ONNX's operations.
    """

    def __init__(
        self,
        onnx: Any,
        program: p.Program,
        inputs: Sequence[str],
        prefix: str = "",
        vnni: bool = False,
        opset: int = 21,
    ):
        self.vnni, self.opset = vnni, opset
        self._onnx, self._program = onnx, program
        self._names = (f"{prefix}{number}" for number in itertools.count())
        self._nodes: dict[Any, Any] = {}
        self._constants: dict[tuple, Any] = {}
        self._turned: dict[str, tuple[str, list[int]]] = {}
        self._first = inputs[0]
        self.bytes: dict[str, str] = {}
        self.single: set[str] = set()
        self.stored: dict[str, str] = {}
        for name, value in zip(program.inputs, inputs, strict=True):
            self.stored[name] = self._entered(name, value)

    def _entered(self, name, value):
        tensor = self._program.tensors[name]
        value = self.first_channels(value, len(tensor.shape))
        if tensor.dtype == "uint8":
            self.bytes[name] = value
            if tensor.encoding == p.Encoding(1.0):
                return value
        if file_dtype(tensor.dtype) != np.float32:
            value = self.cast(value, np.float32)
        return value if tensor.encoding is None else self.quantize(value, tensor.encoding)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one example of a tensor, in the program's order."""
        return self._program.tensors[name].shape

    def encoding(self, name: str) -> p.Encoding | None:
        """A tensor's encoding."""
        return self._program.encoding(name)

    def floats(self, name: str) -> str:
        """The value that holds a tensor in floats."""
        return self.dequantize(self.stored[name], self.encoding(name))

    def result(self, name: str) -> str:
        """A tensor in floats, of the whole batch and in the program's order of axes."""
        value = self.last_channels(self.floats(name), len(self.shape(name)))
        return self.batched(value, len(self.shape(name))) if name in self.single else value

    def batched(self, value: str, rank: int) -> str:
        """A value of one example for every example of the batch."""
        count = self.node("Gather", [self.node("Shape", [self._first]), np.int64([0])], axis=0)
        ones = np.ones(rank, np.int64)
        return self.node("Expand", [value, self.node("Concat", [count, ones], axis=0)])

    def dequantize(self, value: str, encoding: p.Encoding | None) -> str:
        """A stored value in floats."""
        if encoding is None:
            return value
        return self.node("DequantizeLinear", [value, *_parameters(encoding)])

    def quantize(self, value: str, encoding: p.Encoding) -> str:
        """Floats in an encoding, saturated where a uint8 is."""
        return self.node("QuantizeLinear", [value, *_parameters(encoding)])

    def store(self, value: str, op: p.Operation) -> str:
        """Floats as the operation's output is stored, clipped."""
        return self.stored_within(value, op, getattr(op, "clip", UNBOUNDED), WHOLE)

    def stored_within(self, value, op, clip, within) -> str:
        """The same with bounds that are given; see `clip` for `within`."""
        encoding = self.encoding(op.output)
        if encoding is None:
            return self.clip(value, clip, np.float32, UNBOUNDED)
        bounds = arithmetic.bounds(encoding, clip)
        return self.clip(self.quantize(value, encoding), bounds, np.uint8, within)

    def clip(self, value: str, bounds: tuple[Any, Any], dtype: Any, within: tuple[Any, Any]) -> str:
        """A value between bounds, none of which is written that it keeps already."""
        if bounds == within:
            return value
        if bounds == (0.0, np.inf):
            return self.node("Relu", [value])
        ends = ["" if a == b else np.asarray(a, dtype) for a, b in zip(bounds, within)]
        return self.node("Clip", [value, *ends])

    def pad(self, value: str, padding: Sequence[tuple[int, int]], constant: Any) -> str:
        """A value with a constant around it; (before, after) along each axis of an example."""
        return self.node("Pad", [value, np.int64(pads([(0, 0), *arranged(padding)])), constant])

    def reduce(self, kind: str, value: str, places: Sequence[int], keepdims: int) -> str:
        """A value reduced over axes of ONNX."""
        if self.opset >= 18:
            return self.node(kind, [value, np.int64(places)], keepdims=keepdims)
        return self.node(kind, [value], axes=places, keepdims=keepdims)

    def places(self, name: str, axes: Sequence[int]) -> list[int]:
        """Where axes of an example of a tensor stand in ONNX, behind the batch."""
        rank = len(self.shape(name))
        return [1 + axis_order(rank).index(axis % rank) for axis in axes]

    def first_channels(self, value: str, rank: int) -> str:
        """A value in the program's order of axes in that of ONNX."""
        return self.transpose(value, axis_order(rank))

    def last_channels(self, value: str, rank: int) -> str:
        """A value in ONNX's order of axes in that of the program."""
        return self.transpose(value, np.argsort(axis_order(rank)).tolist())

    def transpose(self, value: str, order: Sequence[int]) -> str:
        """A value with its axes, the batch aside, in that order; of two turns is made one."""
        places = [0, *(axis + 1 for axis in order)]
        if value in self._turned:
            value, before = self._turned[value]
            places = [before[place] for place in places]
        if places == sorted(places):
            return value
        made = self.node("Transpose", [value], perm=places)
        self._turned[made] = value, places
        return made

    def cast(self, value: str, dtype: Any) -> str:
        """A value in another dtype."""
        return self.node(
            "Cast", [value], to=self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        )

    def node(self, kind: str, inputs: Sequence[Any], name: str = "", **attributes: Any) -> str:
        """The output of a node; of its inputs, those that are no names are constants."""
        inputs = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        key = kind, *inputs, name, str(attributes)
        if key not in self._nodes:
            make, output = self._onnx.helper.make_node, next(self._names)
            self._nodes[key] = make(kind, inputs, [output], name or None, **attributes)
        return self._nodes[key].output[0]

    def kind(self, value: str) -> str | None:
        """The kind of the node that makes a value; None of what no node makes."""
        made = (node.op_type for node in self._nodes.values() if node.output[0] == value)
        return next(made, None)

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
        whole = self.cast(self._constants[key].name, np.int32)
        return self.cast(self.node("Mul", [whole, np.int32(step)]), np.int8)

    def ended(self, results: Mapping[str, str]) -> tuple[list[Any], list[Any]]:
        """The nodes and constants that make {value of the file: value here}."""
        make = self._onnx.helper.make_node
        last = [make("Identity", [value], [name]) for name, value in results.items()]
        kept, needed = [], set(results)
        for node in reversed([*self._nodes.values(), *last]):
            if node.output[0] in needed:
                kept.append(node)
                needed.update(node.input)
        return kept[::-1], [c for c in self._constants.values() if c.name in needed]


def file_dtype(dtype: str) -> np.dtype:
    """The dtype in a file of what the traced function has: floats are float32."""
    made = np.dtype(dtype)
    return made if made.kind in "biu" else np.dtype(np.float32)


def axis_order(rank: int) -> tuple[int, ...]:
    """Which axis of an example of that rank stands at each place in ONNX."""
    return (2, 0, 1) if rank == 3 else tuple(range(rank))


def arranged(entries: Sequence[Any]) -> list[Any]:
    """One entry for each axis of an example, in ONNX's order."""
    return [entries[axis] for axis in axis_order(len(entries))]


def along(vector: np.ndarray, rank: int) -> np.ndarray:
    """A number as it is, a vector along the channels of a value of that rank."""
    return vector[:, None, None] if np.ndim(vector) and rank == 3 else vector


def pads(padding: Sequence[tuple[int, int]]) -> list[int]:
    """(before, after) along each axis as ONNX has them: all befores, then all afters."""
    return [width for ends in zip(*padding) for width in ends]


def _parameters(encoding):
    return np.float32(encoding.scale), np.uint8(encoding.zero_point)
