"""The inference graph: operations between named edges, in floats or integers, for every target.

Shapes are those of one example, without the batch; images are (H, W, C) whatever the traced
function preferred. An encoded edge holds unsigned integers q for the values
scale · (q − zero_point); the others are float32.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from hybrid_jax.program.encoding import Encoding, Tensor, Weights
from hybrid_jax.program.operations import Constant, Conv, Dense, Function, Operation

Params = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """How the kernel of an operation comes from that of the traced function."""

    site: str | None  # the site's name; None of a kernel without parameters
    # The transposition of the traced kernel that ends in (…, inputs, outputs)
    order: tuple[int, ...]
    sizes: tuple[int, ...]  # lengths of the traced kernel
    # (scale, shift) of its input that the kernel has taken in; None without
    before: tuple[Any, Any] | None = None
    # How often its outputs stand in the kernel, one after the other: once for each phase of a
    # transposed convolution
    copies: int = 1
    scale: Any = None  # float32 (O,), by which what follows the site multiplies

    def outputs(self, entries: Any) -> np.ndarray:
        """What broadcasts to the traced kernel, for each output of the kernel here: (O,)."""
        whole = np.broadcast_to(np.asarray(entries), self.sizes).transpose(self.order)
        return np.tile(whole.reshape(-1, len(self.scale) // self.copies)[0], self.copies)

    def moved(self, change: Any) -> Any:
        """What the bias is to take in when the kernel changes: (O,), or 0.

        An input that the kernel has shifted to be zero is far from zero, beside what it differs by:
        the kernel must still make nothing of what stands for zero.
        """
        if self.before is None or not np.any(self.before[1]):
            return np.float32(0)
        scale, shift = np.broadcast_arrays(*self.before)
        rank = (1,) * (change.ndim - 2)
        change = change * (shift / scale).astype(np.float32).reshape(*rank, -1, 1)
        return change.sum(tuple(range(change.ndim - 1)))


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """An inference graph."""

    # Names of the edges that it is given; a single name stands for a tuple of one
    inputs: tuple[str, ...]
    # Names of the edges that it returns, float32 unless one is returned as it is stored
    outputs: tuple[str, ...]
    tensors: dict[str, Tensor]  # {name: shape, encoding and dtype} of the edges
    operations: tuple[Operation, ...]  # in an order in which they can run
    # {output of a convolution or dense layer: how its kernel comes from the traced one}
    sources: dict[str, Source] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for end in ("inputs", "outputs"):
            names = getattr(self, end)
            if isinstance(names, str):
                object.__setattr__(self, end, (names,))

    @property
    def parts(self) -> tuple["Program", ...]:
        """The programs that it consists of: itself."""
        return (self,)

    @property
    def written(self) -> tuple["Program", ...]:
        """What a target writes of it: itself alone."""
        return self.parts

    @property
    def input(self) -> str:
        """The only input."""
        (name,) = self.inputs
        return name

    @property
    def output(self) -> str:
        """The only output."""
        (name,) = self.outputs
        return name

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one example of the only input."""
        return self.tensors[self.input].shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of one example of the only output."""
        return self.tensors[self.output].shape

    @property
    def weighted(self) -> Iterator[Conv | Dense]:
        """The convolutions and dense layers, in running order."""
        return (op for op in self.operations if isinstance(op, Conv | Dense))

    @property
    def makers(self) -> dict[str, Operation]:
        """{edge: the operation that makes it}."""
        return {op.output: op for op in self.operations}

    @property
    def readers(self) -> dict[str, list[Operation]]:
        """{edge: the operations that read it}, each as often as it does."""
        found: dict[str, list[Operation]] = collections.defaultdict(list)
        for op in self.operations:
            for name in op.inputs:
                found[name].append(op)
        return found

    @property
    def params(self) -> Params:
        """Its weights: {output of an operation: {'kernel', 'bias', 'value' or a number: array}}.

        They are trained, and put back by `replace`.
        """
        found = {op.output: leaves(op) for op in self.operations}
        return {name: own for name, own in found.items() if own}

    def replace(self, params: Params) -> "Program":
        """The same graph with other weights, which may be traced."""
        own = self.params
        for name in [*own, *params]:
            if (name in own) != (name in params):
                raise ValueError(
                    f"params must be of {len(own)} operations, as program.params has them, got "
                    f"{name!r} {'over' if name in params else 'missing'}"
                )
        operations = [
            with_leaves(op, params[op.output]) if op.output in params else op
            for op in self.operations
        ]
        return dataclasses.replace(self, operations=tuple(operations))

    def encoding(self, name: str) -> Encoding | None:
        """The encoding of the edge of that name."""
        return self.tensors[name].encoding

    def in_floats(self, op: Operation) -> bool:
        """Whether an operation reads floats and makes floats."""
        return all(self.encoding(name) is None for name in (*op.inputs, op.output))

    def __repr__(self) -> str:
        kinds = collections.Counter(type(op).__name__ for op in self.operations)
        ends = [
            ", ".join(f"{name} {self.tensors[name].shape}" for name in names)
            for names in (self.inputs, self.outputs)
        ]
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        return f"Program({ends[0]} -> {ends[1]}: {counts})"


def leaves(op: Operation) -> dict[str, Any]:
    """The arrays of an operation that can be trained, by name."""
    if isinstance(op, Conv | Dense) and op.weights.scale is None:
        return {"kernel": op.weights.values, "bias": op.weights.bias}
    if isinstance(op, Constant):
        return {"value": op.value}
    if isinstance(op, Function):
        floats = (
            (str(i), constant)
            for i, constant in enumerate(op.constants)
            if np.issubdtype(constant.dtype, np.floating)
        )
        return dict(floats)
    return {}


def with_leaves(op: Operation, own: Mapping[str, Any]) -> Operation:
    """The operation with other arrays."""
    if isinstance(op, Conv | Dense):
        return dataclasses.replace(op, weights=Weights(own["kernel"], None, own["bias"]))
    if isinstance(op, Constant):
        return dataclasses.replace(op, value=own["value"])
    constants = tuple(own.get(str(i), constant) for i, constant in enumerate(op.constants))
    return dataclasses.replace(op, constants=constants)
