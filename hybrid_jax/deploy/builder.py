"""Building an inference graph: values on their way to becoming tensors of it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybrid_jax.deploy.program import (
    UNBOUNDED,
    Add,
    Clip,
    Conv,
    Dense,
    Multiply,
    Operation,
    Reshape,
    Tensor,
    Transpose,
    Weights,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A value that depends on the input: clip(scale · result + shift), perhaps not yet computed.

    Attributes:
      result: The operation, its output not named yet, or the name of a tensor.
      shape: Of one example of the result, as the graph orders its axes: channels last.
      axes: For each axis of the traced value its axis in the result, batch included (0); None for
        one that has length 1 or is broadcast.
      sizes: The lengths of the traced value's axes.
      scale: float32, () or (C,), along the result's last axis.
      shift: Alike.
      clip: Bounds of the value.
      softmax: What part of a softmax it is, and of which node: ('max' | 'shifted' | 'exp' | 'sum',
        node). Such a value is no tensor.
    """

    result: Operation | str
    shape: tuple[int, ...]
    axes: tuple[int | None, ...]
    sizes: tuple[int, ...]
    scale: np.ndarray = dataclasses.field(default_factory=lambda: np.float32(1))
    shift: np.ndarray = dataclasses.field(default_factory=lambda: np.float32(0))
    clip: tuple[float, float] = UNBOUNDED
    softmax: tuple[str, "Node"] | None = None

    @property
    def plain(self) -> bool:
        """Whether the value is the result itself."""
        return self.clip == UNBOUNDED and self.unscaled

    @property
    def unscaled(self) -> bool:
        """Whether scale and shift change nothing."""
        return bool((self.scale == 1).all() and (self.shift == 0).all())

    @property
    def channel_axis(self) -> int | None:
        """The traced value's axis that is the result's last."""
        last = len(self.shape)
        return self.axes.index(last) if last in self.axes else None

    def replace(self, **changes: Any) -> "Node":
        """A node that differs in these fields."""
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """What a site's weights were made of.

    Attributes:
      kernel: As the traced operation takes it.
      order: The transposition of it that ends in the graph's axes.
      shape: Of the kernel in the graph.
      scale: float32 (O,), by which what follows the site multiplies.
    """

    kernel: np.ndarray
    order: tuple[int, ...]
    shape: tuple[int, ...]
    scale: np.ndarray

    def arrange(self, kernel: np.ndarray) -> np.ndarray:
        """An array of the kernel's shape, or one that broadcasts to it, as the graph has it."""
        whole = np.broadcast_to(kernel, self.kernel.shape)
        return np.transpose(whole, self.order).reshape(self.shape)


class Builder:
    """The tensors and operations made so far.

    Attributes:
      tensors: {name: Tensor}.
      operations: In running order.
      sources: {site name: what its weights were made of}.
      joins: {tensor: name of the join that it takes part in}.
    """

    def __init__(self):
        self.tensors: dict[str, Tensor] = {}
        self.operations: list[Operation] = []
        self.sources: dict[str, Source] = {}
        self.joins: dict[str, str] = {}
        self._made: dict[int, tuple[Node, str]] = {}
        self._awaited: dict[int, tuple[Any, str]] = {}
        self._pending: dict[int, Source] = {}

    def add(self, op: Operation, shape: Sequence[int], name: str = "") -> str:
        """Appends an operation, and returns the name of its output."""
        name = name or type(op).__name__.lower()
        unique, count = name, 1
        while unique in self.tensors:
            count += 1
            unique = f"{name}_{count}"
        self.tensors[unique] = Tensor(tuple(shape))
        self.operations.append(dataclasses.replace(op, output=unique))
        if id(op) in self._awaited:
            self.joins[unique] = self._awaited[id(op)][1]
        return unique

    def join(self, name: str, node: Node) -> None:
        """Says that the tensor which holds the node's value, or will, takes part in a join."""
        if id(node) in self._made:
            self.joins[self._made[id(node)][1]] = name
        else:
            self._awaited[id(node.result)] = node.result, name

    def site(self, op: Conv | Dense, source: Source, **node: Any) -> Node:
        """A node for a convolution or dense layer whose weights may still change."""
        self._pending[id(op)] = source
        return Node(op, **node)

    def tensor(self, node: Node) -> str:
        """The name of the tensor that holds the node's value, made at the first call."""
        if node.softmax:
            raise ValueError("fn must compute a softmax as a whole, got a part of one")
        if id(node) not in self._made:
            self._made[id(node)] = node, self._make(node)
        return self._made[id(node)][1]

    def made(self, node: Node) -> Node:
        """The same value, as a plain tensor."""
        return node.replace(
            result=self.tensor(node), scale=np.float32(1), shift=np.float32(0), clip=UNBOUNDED
        )

    def arranged(self, node: Node, order: Sequence[int]) -> Node:
        """The same value as a plain tensor whose axes are the traced ones in that order.

        Raises:
          ValueError: If an axis is broadcast, or the batch is not the first.
        """
        wanted = [node.axes[axis] for axis in order]
        sizes = [node.sizes[axis] for axis in order]
        if wanted[:1] != [0]:
            raise ValueError("the batch must stay the leading axis")
        if any(axis is None and n != 1 for axis, n in zip(wanted, sizes, strict=True)):
            raise ValueError("a broadcast value must be one of two factors")
        there = [axis for axis in wanted if axis is not None]
        permutation = [*there, *(i for i in range(len(node.shape) + 1) if i not in there)]
        node = self.made(node)
        name, shape = node.result, list(node.shape)
        # Axes of length 1 need not move: a reshape puts them where they belong.
        long = [axis for axis in permutation[1:] if node.shape[axis - 1] != 1]
        if long != sorted(long):
            shape = [node.shape[axis - 1] for axis in permutation[1:]]
            swap = Transpose((name,), "", tuple(axis - 1 for axis in permutation[1:]))
            name = self.add(swap, shape)
        if shape != sizes[1:]:
            name = self.add(Reshape((name,), ""), sizes[1:])
        axes: list[int | None] = [None] * len(node.axes)
        for place, axis in enumerate(order):
            axes[axis] = place
        return node.replace(result=name, shape=tuple(sizes[1:]), axes=tuple(axes))

    def _make(self, node):
        op = node.result
        if isinstance(op, str):
            return self._affine(op, node)
        if isinstance(op, Conv | Dense):
            source, shape = self._pending[id(op)], (node.shape[-1],)
            scale = np.broadcast_to(node.scale, shape).astype(np.float32)
            bias = np.broadcast_to(node.shift, shape).astype(np.float32)
            self.sources[op.name] = dataclasses.replace(source, scale=scale)
            weights = Weights(op.weights.values * scale, None, bias)
            made = dataclasses.replace(op, weights=weights, clip=node.clip)
            return self.add(made, node.shape, op.name)
        if isinstance(op, Add | Multiply) and node.unscaled:
            return self.add(dataclasses.replace(op, clip=node.clip), node.shape)
        return self._affine(self.add(op, node.shape), node)

    def _affine(self, name, node):
        """What is left of scale, shift and clip after a tensor: a 1×1 depthwise convolution."""
        if node.unscaled:
            if node.clip == UNBOUNDED:
                return name
            return self.add(Clip((name,), "", *node.clip), node.shape)
        channels = node.shape[-1]
        image = node.shape if len(node.shape) == 3 else (math.prod(node.shape[:-1]), 1, channels)
        if image != node.shape:
            name = self.add(Reshape((name,), ""), image)
        scale, shift = (
            np.broadcast_to(value, (channels,)).astype(np.float32)
            for value in (node.scale, node.shift)
        )
        weights = Weights(scale.reshape(1, 1, 1, channels), None, shift)
        title = f"{name}/affine"
        conv = Conv((name,), "", title, weights, groups=channels, clip=node.clip)
        name = self.add(conv, image, title)
        return name if image == node.shape else self.add(Reshape((name,), ""), node.shape)
