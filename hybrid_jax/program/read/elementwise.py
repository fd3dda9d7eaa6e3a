"""Element-wise equations: what is affine, a bound, the join of two tensors, or else an expression.

A scale or shift for each channel, and then bounds, go to the operation before. Sums, products,
maxima and minima of two tensors are operations. Everything else of one tensor is an expression,
which has a table in integers, and of several is one in floats.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybrid_jax.core.functions import options
from hybrid_jax.program.encoding import UNBOUNDED
from hybrid_jax.program.operations import Add, Constant, Conv, Dense, Maximum, Minimum, Multiply
from hybrid_jax.program.read.flat import Known
from hybrid_jax.program.read.node import Builder, Node, Pending, Value

_JOINS = ("add", "sub", "mul", "max", "min")


def elementwise(builder: Builder, eqn: Any, values: list[Any]) -> list[Node]:
    """An equation of `core.functions.FUNCTIONS`; operands are nodes, and known ones."""
    name, dtype = eqn.primitive.name, np.dtype(eqn.outvars[0].aval.dtype)
    values = [_widened(value, tuple(eqn.outvars[0].aval.shape)) for value in values]
    nodes = [value for value in values if isinstance(value, Node)]
    floating = all(np.issubdtype(own, np.floating) for own in (dtype, *(n.dtype for n in nodes)))
    if name == "convert_element_type" and _keeps_values(nodes[0], dtype):
        return [nodes[0].replace(dtype=dtype)]
    if floating and len(nodes) == 1:
        changed = _bounded(builder, name, values) or _affine(builder, name, values)
        if changed:
            return [changed.replace(dtype=dtype)]
    if floating and name in _JOINS and len(values) == 2:
        joined = _joined(builder, name, values)
        if joined:
            return [joined.replace(dtype=dtype)]
    return [_expression(builder, eqn, values).replace(dtype=dtype)]


def _widened(value, sizes):
    """An operand at the lengths of the result: axes of length 1 broadcast."""
    if not value.sizes or value.sizes == sizes:
        return value
    if isinstance(value, Known):
        return dataclasses.replace(value, sizes=sizes)
    pairs = zip(value.axes, value.sizes, sizes, strict=True)
    axes = tuple(None if before != after else axis for axis, before, after in pairs)
    return value.replace(axes=axes, sizes=sizes)


def affine(
    builder: Builder, node: Node, scale: Any = 1.0, shift: Any = 0.0, static: bool = True
) -> Node:
    """Scale · node + shift, each () or (C,) along the value's last axis."""
    value = node.value
    takes = isinstance(value.source, str) or (
        isinstance(value.source, Pending) and isinstance(value.source.op, Conv | Dense)
    )
    if not takes or value.clip != UNBOUNDED or value.edge is not None:
        value = builder.as_edge(node).value
    scale, shift = np.float32(scale), np.float32(shift)
    made = dataclasses.replace(
        value,
        scale=value.scale * scale,
        shift=value.shift * scale + shift,
        static=value.static and static,
        edge=None,
    )
    return node.replace(value=made)


def clipped(node: Node, low: float, high: float) -> Node:
    """The node between two bounds; it must not be an expression."""
    first, last = (float(min(max(end, low), high)) for end in node.value.clip)
    return node.replace(value=dataclasses.replace(node.value, clip=(first, last), edge=None))


def along_channels(node: Node, known: Known) -> Any:
    """A known operand as () or (C,) along the node's channels; None if it differs elsewhere."""
    if not known.varying:
        return known.value.reshape(())
    if node.shape and known.varying == (node.channel_axis,):
        channels = known.value.reshape(-1)
        return channels if channels.shape == node.shape[-1:] else None
    return None


def _keeps_values(node, dtype):
    """Whether a conversion of what a node holds changes no value."""
    if np.issubdtype(dtype, np.floating):
        # What an edge holds is a float already.
        return np.issubdtype(node.dtype, np.floating) or not isinstance(node.value.source, int)
    return node.dtype == dtype


def _bounded(builder, name, values):
    if name not in ("max", "min", "clamp"):
        return None
    (node,) = (value for value in values if isinstance(value, Node))
    if isinstance(node.value.source, int):
        return None
    ends = [value.number for value in values if isinstance(value, Known)]
    if None in ends or any(math.isnan(end) for end in ends):
        return None
    if name == "clamp":
        return clipped(node, *ends) if isinstance(values[1], Node) else None
    if node.value.edge is not None:
        node = builder.as_edge(node)
    return clipped(node, ends[0], math.inf) if name == "max" else clipped(node, -math.inf, ends[0])


def _affine(builder, name, values):
    if name == "neg":
        (node,) = values
        bounded = isinstance(node.value.source, str) and node.value.clip != UNBOUNDED
        takes = not isinstance(node.value.source, int) and not bounded
        return affine(builder, node, -1.0) if takes else None
    if name not in ("add", "sub", "mul", "div"):
        return None
    place = 0 if isinstance(values[0], Node) else 1
    node, known = values[place], values[1 - place]
    if name == "div" and place == 1:
        return None
    other = along_channels(node, known)
    # A number goes into an expression, or makes one of a bounded edge.
    value = node.value
    bounded = isinstance(value.source, str) and value.clip != UNBOUNDED and value.edge is None
    if other is None or (np.ndim(other) == 0 and (isinstance(value.source, int) or bounded)):
        return None
    if np.ndim(other) and _repeats(builder, node, known):
        return None
    if name == "add":
        return affine(builder, node, shift=other, static=known.static)
    if name == "mul":
        return affine(builder, node, other, static=known.static)
    if name == "div":
        made = affine(builder, node, static=known.static)
        value = made.value
        value.scale, value.shift = value.scale / other, value.shift / other
        return made
    if place == 0:
        return affine(builder, node, shift=-other, static=known.static)
    return affine(builder, node, -1.0, other, known.static)


def _repeats(builder, node, known):
    """Whether the value is broadcast along the axis of its channels."""
    return any(
        axis is None and known.sizes[i] > 1 and i in known.varying
        for i, axis in enumerate(node.axes)
    )


def _base(builder, node):
    """The edges that a node is computed from; None if it is open and nobody else's."""
    value = node.value
    if isinstance(value.source, int):
        return builder.terms.bases(value.source)
    if value.edge is not None:
        return frozenset([value.edge])
    return frozenset([value.source]) if isinstance(value.source, str) else None


def _joined(builder, name, values):
    """The join of two tensors; None where both are expressions of one."""
    nodes = [value for value in values if isinstance(value, Node)]
    if len(nodes) == 2:
        a, b = nodes
        bases = [_base(builder, node) for node in nodes]
        if None not in bases and len(bases[0] | bases[1]) == 1 and _alike(a, b):
            return None
        if name == "sub" and _is_open(b):
            name, b = "add", affine(builder, b, -1.0)
        values = [a, b]
    elif along_channels(nodes[0], next(v for v in values if isinstance(v, Known))) is not None:
        return None
    names, axes, sizes, shape = _aligned(builder, values)
    kinds = {"add": Add, "sub": Add, "mul": Multiply, "max": Maximum, "min": Minimum}
    options = {"minus": True} if name == "sub" else {}
    op = kinds[name](tuple(names), "", **options)
    open_op = isinstance(op, Add | Multiply)
    value = Value(Pending(op) if open_op else builder.add(op, shape), shape)
    return Node(value, axes, sizes)


def _is_open(node):
    """Whether a factor still goes into the operation before."""
    source = node.value.source
    weighted = isinstance(source, Pending) and isinstance(source.op, Conv | Dense)
    return weighted and node.value.clip == UNBOUNDED and node.value.edge is None


def _alike(*nodes):
    """Whether nodes have their axes at the same places of values of one shape."""
    return len({(node.axes, node.shape, node.sizes) for node in nodes}) == 1


def _aligned(builder, values):
    """Edges of the operands whose axes are in one order, and the result's axes, sizes and shape."""
    nodes = [value for value in values if isinstance(value, Node)]
    first = max(nodes, key=lambda node: sum(axis is not None for axis in node.axes))
    if first.axes.count(0) != 1:
        raise ValueError("the batch must stay an axis of its own")
    order = first.natural
    names, shapes = [], []
    for value in values:
        if isinstance(value, Node):
            if value.axes[order[0]] != 0:
                raise ValueError("examples cannot meet each other")
            names.append(builder.placed(value, order, expand=False))
        else:
            names.append(constant(builder, value, order))
        shapes.append(builder.tensors[names[-1]].shape)
    shape = np.broadcast_shapes(*shapes)
    axes: list[int | None] = [None] * len(order)
    for place, axis in enumerate(order):
        if place == 0 or shape[place - 1] == first.sizes[axis]:
            axes[axis] = place
    return names, tuple(axes), first.sizes, shape


def constant(builder: Builder, known: Known, order: Sequence[int], expand: bool = False) -> str:
    """The edge of a known operand with its axes in that order, at its lengths if `expand`."""
    value = known.value.reshape(np.shape(known.value) or (1,) * len(order))
    if value.shape[order[0]] != 1:
        raise ValueError("a constant must be the same for every example")
    held = np.transpose(np.broadcast_to(value, known.sizes) if expand else value, order)[0]
    return builder.add(Constant((), "", held.astype(np.float32)), held.shape)


def _expression(builder, eqn, values):
    """One more step of an expression."""
    nodes = [value for value in values if isinstance(value, Node)]
    first = nodes[0]
    others = [along_channels(first, value) for value in values if isinstance(value, Known)]
    direct = _alike(*nodes) and not any(other is None for other in others)
    if direct:
        axes, sizes, shape = first.axes, first.sizes, first.shape
        operands = [
            _operand(builder, value)
            if isinstance(value, Node)
            else builder.terms.constant(along_channels(first, value))
            for value in values
        ]
    else:
        scalars = [isinstance(v, Known) and np.size(v.value) == 1 for v in values]
        apart = [value for value, scalar in zip(values, scalars, strict=True) if not scalar]
        names, axes, sizes, shape = _aligned(builder, apart)
        placed = iter(zip(names, apart, strict=True))
        operands = []
        for value, scalar in zip(values, scalars, strict=True):
            if scalar:
                operands.append(builder.terms.constant(value.value.reshape(())))
                continue
            name, held = next(placed)
            made = builder.terms.edge(name)
            dtype = held.dtype if isinstance(held, Node) else held.value.dtype
            operands.append(_typed(builder, made, np.dtype(dtype)))
    made = builder.terms.step(eqn.primitive.name, *operands, options=tuple(options(eqn).items()))
    return Node(Value(made, tuple(shape)), axes, sizes)


def _operand(builder, node):
    made = builder.term(node)
    expression = isinstance(node.value.source, int) and node.value.edge is None
    return made if expression else _typed(builder, made, node.dtype)


def _typed(builder, number, dtype):
    """What an edge holds in floats, in the dtype that the traced function has there."""
    if np.issubdtype(dtype, np.floating):
        return number
    options = (("new_dtype", str(dtype)),)
    return builder.terms.step("convert_element_type", number, options=options)
