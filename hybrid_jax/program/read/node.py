"""Values on their way to becoming edges of an inference graph."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybrid_jax.program.encoding import UNBOUNDED, Tensor, Weights
from hybrid_jax.program.graph import Source
from hybrid_jax.program.operations import (
    Add,
    Broadcast,
    Clip,
    Conv,
    Dense,
    Multiply,
    Operation,
    Reshape,
    Slice,
    Transpose,
)
from hybrid_jax.program.read.terms import Terms

_ONE, _NONE, _FLOAT = np.float32(1), np.float32(0), np.dtype(np.float32)


@dataclasses.dataclass(eq=False)
class Pending:
    """An operation that still takes what follows into its weights and bounds."""

    op: Operation  # its output is not named
    source: Source | None = None  # how its kernel comes from the traced one; None without
    # Moves of its result, (operation, shape of an example) each
    after: tuple[tuple[Operation, tuple[int, ...]], ...] = ()
    # Of an example of its own result, before the moves; None without
    shape: tuple[int, ...] | None = None


@dataclasses.dataclass(eq=False)
class Value:
    """What is computed: clip(scale · source + shift)."""

    # An operation still open, the name of an edge, or the number of a term
    source: Pending | str | int
    shape: tuple[int, ...]  # of one example, as the graph orders its axes: channels last
    scale: Any = _ONE  # float32, () or (C,), along the last axis
    shift: Any = _NONE
    clip: tuple[float, float] = UNBOUNDED
    static: bool = True  # whether no parameter is in scale and shift
    edge: str | None = None  # the edge that holds it, once there is one

    @property
    def unscaled(self) -> bool:
        """Whether scale and shift are known to change nothing, but for the rounding of one."""
        if not self.static:
            return False
        return bool(np.all(np.abs(self.scale - 1) < 1e-6) and np.all(self.shift == 0))

    @property
    def plain(self) -> bool:
        """Whether it is an edge itself."""
        return isinstance(self.source, str) and self.unscaled and self.clip == UNBOUNDED

    @property
    def held(self) -> str | None:
        """The edge that holds it; None if there is none."""
        return self.edge or (self.source if self.plain else None)


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A value as the traced program has it."""

    value: Value
    # For each axis of the traced value its axis in the value, batch included (0); None for one that
    # has length 1 or is broadcast
    axes: tuple[int | None, ...]
    sizes: tuple[int, ...]  # their lengths
    dtype: Any = _FLOAT  # of the traced value
    merged: int = 1  # how many of the first axes the traced value has as one

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example of the value."""
        return self.value.shape

    @property
    def traced(self) -> tuple[int, ...]:
        """The lengths of the traced value's axes."""
        return (math.prod(self.sizes[: self.merged]), *self.sizes[self.merged :])

    @property
    def channel_axis(self) -> int | None:
        """The traced value's axis that is the value's last."""
        last = len(self.shape)
        return self.axes.index(last) if last in self.axes else None

    @property
    def natural(self) -> list[int]:
        """The traced value's axes in the order that the graph has them."""
        return sorted(
            range(len(self.axes)), key=lambda i: (self.axes[i] is None, self.axes[i] or 0)
        )

    @property
    def batch_first(self) -> tuple[int, ...]:
        """The traced value's axes in their order, but for the batch."""
        if 0 not in self.axes:
            raise ValueError("examples cannot meet each other")
        return tuple(sorted(range(len(self.axes)), key=lambda i: self.axes[i] != 0))

    def replace(self, **changes: Any) -> "Node":
        """A node that differs in these fields."""
        return dataclasses.replace(self, **changes)


class Builder:
    """The edges and operations made so far."""

    def __init__(self):
        self.inputs: list[str] = []  # names of the edges that the program is given
        self.tensors: dict[str, Tensor] = {}
        self.operations: list[Operation] = []
        self.sources: dict[str, Source] = {}  # of the outputs of convolutions and dense layers
        self.moves: dict[str, Operation] = {}  # {edge: what makes it by moving entries}
        self.site: str | None = None  # the name of the site that is being read
        self.terms = Terms()
        self._again: dict[Any, str] = {}
        self._edges: dict[int, str] = {}

    def unique(self, name: str) -> str:
        """A name that no edge has."""
        found, count = name, 1
        while found in self.tensors:
            count += 1
            found = f"{name}_{count}"
        return found

    def add(self, op: Operation, shape: Sequence[int], name: str = "") -> str:
        """Appends an operation, and returns the name of its output.

        The same move of the same edge is made once, and a reshape of a reshape is one.
        """
        if isinstance(op, Reshape):
            before = self.moves.get(op.inputs[0])
            if isinstance(before, Reshape):
                op = dataclasses.replace(op, inputs=before.inputs)
            if self.tensors[op.inputs[0]].shape == op.shape:
                return op.inputs[0]
        again = (type(op), op.inputs, *dataclasses.astuple(op)[2:]) if op.same_encoding else None
        if again in self._again:
            return self._again[again]
        output = self._append(op, shape, name)
        if op.same_encoding:
            self._again[again] = output
            self.moves[output] = op
        return output

    def shaped(self, name: str, shape: Sequence[int]) -> str:
        """An edge under another shape; itself if it has that."""
        return self.add(Reshape((name,), "", tuple(shape)), shape)

    def cropped(self, name: str, pairs: Sequence[tuple[int, int]]) -> tuple[str, list]:
        """An edge without what negative padding along its first axes cuts off, and the rest."""
        if min((min(pair) for pair in pairs), default=0) >= 0:
            return name, list(pairs)
        shape = self.tensors[name].shape
        whole = [*pairs, *[(0, 0)] * (len(shape) - len(pairs))]
        starts = tuple(max(-low, 0) for low, _ in whole)
        stops = tuple(n - max(-high, 0) for n, (_, high) in zip(shape, whole, strict=True))
        held = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        name = self.add(Slice((name,), "", starts, stops, (1,) * len(shape)), held)
        return name, [(max(low, 0), max(high, 0)) for low, high in pairs]

    def copied(self, name: str) -> str:
        """Another edge that holds the same."""
        shape = self.tensors[name].shape
        return self._append(Reshape((name,), "", shape), shape, "")

    def _append(self, op, shape, name):
        output = self.unique(name or type(op).__name__.lower())
        self.tensors[output] = Tensor(tuple(map(int, shape)))  # of NumPy's some are
        self.operations.append(dataclasses.replace(op, output=output))
        return output

    def node(self, name: str, order: Sequence[int], sizes: Sequence[int], dtype=_FLOAT) -> Node:
        """The node of an edge, whose axes are those of the traced value in that order."""
        axes = tuple(order.index(i) for i in range(len(sizes)))
        return Node(Value(name, self.tensors[name].shape), axes, tuple(sizes), dtype)

    def made(self, op: Operation, shape: Sequence[int], sizes: Sequence[int], **node: Any) -> Node:
        """The node of an operation that nothing changes any more, its axes in the traced order."""
        value = Value(self.add(op, shape), tuple(shape))
        return Node(value, tuple(range(len(sizes))), tuple(sizes), **node)

    def edge(self, node: Node) -> str:
        """The name of the edge that holds the node's value, made at the first call."""
        value = node.value
        if value.edge is None:
            value.edge = self._make(value)
        return value.edge

    def as_edge(self, node: Node) -> Node:
        """The same value, as an edge."""
        if node.value.plain:
            return node
        return node.replace(value=Value(self.edge(node), node.shape))

    def placed(self, node: Node, order: Sequence[int], expand: bool = True) -> str:
        """The name of an edge that holds the node's value with its axes in that traced order.

        The batch is first. Axes that are broadcast get their length, or without `expand` 1.
        """
        wanted = [node.axes[axis] for axis in order]
        if wanted[:1] != [0]:
            raise ValueError("the batch must stay an axis of its own")
        name = self.edge(node)
        there = [axis for axis in wanted if axis is not None]
        permutation = [*there, *(i for i in range(len(node.shape) + 1) if i not in there)]
        # Axes of length 1 need not move: a reshape puts them where they belong.
        long = [axis for axis in permutation[1:] if node.shape[axis - 1] != 1]
        shape = list(node.shape)
        if long != sorted(long):
            shape = [node.shape[axis - 1] for axis in permutation[1:]]
            moved = Transpose((name,), "", tuple(axis - 1 for axis in permutation[1:]))
            name = self.add(moved, shape)
        held = [1 if axis is None else node.shape[axis - 1] for axis in wanted[1:]]
        name = self.shaped(name, held)
        sizes = [node.sizes[axis] for axis in order[1:]]
        if expand and sizes != held:
            name = self.add(Broadcast((name,), "", tuple(sizes)), sizes)
        return name

    def reshaped(self, node: Node, sizes: Sequence[int]) -> Node:
        """The node under other lengths: only lengths of 1 that come or go need no operation."""
        sizes = tuple(sizes)
        if sizes == node.sizes:
            return node
        kept = [(axis, n) for axis, n in zip(node.axes, node.sizes, strict=True) if n != 1]
        if [n for _, n in kept] == [n for n in sizes if n != 1]:
            names = iter([axis for axis, _ in kept])
            return node.replace(
                axes=tuple(None if n == 1 else next(names) for n in sizes), sizes=sizes
            )
        if sizes[:1] != node.sizes[:1] or node.axes[0] != 0:
            raise ValueError(f"the batch must stay an axis of its own, got {node.sizes} to {sizes}")
        name = self.placed(node, range(len(node.sizes)))
        return self.made(Reshape((name,), "", sizes[1:]), sizes[1:], sizes, dtype=node.dtype)

    def term(self, node: Node) -> int:
        """The number of the term that a node's value is."""
        value, terms = node.value, self.terms
        if isinstance(value.source, int):
            return value.source
        if isinstance(value.source, Pending) or value.edge is not None:
            return terms.edge(self.edge(node))
        made = terms.edge(value.source)
        if not value.unscaled:
            made = terms.step("mul", made, terms.constant(np.float32(value.scale)))
            made = terms.step("add", made, terms.constant(np.float32(value.shift)))
        for name, end in zip(("max", "min"), value.clip, strict=True):
            if np.isfinite(end):
                made = terms.step(name, made, terms.constant(np.float32(end)))
        return made

    def _make(self, value):
        source = value.source
        if isinstance(source, int):
            if source not in self._edges:
                made = self.terms.function(source)
                if not made.steps:
                    self._edges[source] = made.inputs[0]
                else:
                    title = made.kind or "function"
                    self._edges[source] = self.add(made, value.shape, title)
            return self._edges[source]
        if isinstance(source, str):
            return self._affine(source, value)
        op, clip = source.op, value.clip
        if isinstance(op, Conv | Dense):
            channels, copies = op.weights.values.shape[-1], source.source.copies
            scale, shift = (
                np.tile(np.broadcast_to(np.float32(own), (channels // copies,)), copies)
                for own in (value.scale, value.shift)
            )
            weights = Weights(op.weights.values * scale, None, shift + op.weights.bias * scale)
            own = dataclasses.replace(op, weights=weights, clip=clip)
            name = self.add(own, source.shape or value.shape, op.name)
            self.sources[name] = dataclasses.replace(source.source, scale=scale)
            for move, shape in source.after:
                name = self.add(dataclasses.replace(move, inputs=(name,)), shape)
            return name
        if isinstance(op, Add | Multiply):
            return self.add(dataclasses.replace(op, clip=clip), value.shape)
        raise AssertionError(f"no operation is pending that is {type(op).__name__}")

    def _affine(self, name, value):
        """What is left of scale, shift and clip after an edge."""
        if value.unscaled:
            if value.clip == UNBOUNDED:
                return name
            return self.add(Clip((name,), "", *value.clip), value.shape)
        if np.ndim(value.scale) == np.ndim(value.shift) == 0:
            return self._make(dataclasses.replace(value, source=self.term(Node(value, (), ()))))
        # Of each channel its own: a 1×1 depthwise convolution.
        channels = value.shape[-1]
        image = value.shape
        if len(image) != 3:
            image = (math.prod(value.shape[:-1]), 1, channels)
            name = self.shaped(name, image)
        scale, shift = (
            np.broadcast_to(np.float32(own), (channels,)) for own in (value.scale, value.shift)
        )
        title = self.unique(f"{name}/affine")
        weights = Weights(scale.reshape(1, 1, 1, channels), None, shift)
        conv = Conv((name,), "", title, weights, groups=channels, clip=value.clip)
        return self.shaped(self.add(conv, image, title), value.shape)
