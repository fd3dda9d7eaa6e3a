"""What primitives that only move values become: reshapes, slices, padding and concatenations.

Rules are as `primitives` states. Lengths of 1 that come or go, and the order of axes, are kept with
the node: they need no operation until something reads the values in an order.
"""

import numpy as np

from hybrid_jax.deploy.builder import Node
from hybrid_jax.deploy.program import Concatenate, Pad, Reshape, Slice


def reshaped(builder, node, sizes):
    """The node under other sizes: only lengths of 1 that come or go need no operation."""
    if sizes[0] != node.sizes[0]:
        raise ValueError(f"the batch must stay the leading axis, got {node.sizes} to {sizes}")
    kept = [(axis, n) for axis, n in zip(node.axes[1:], node.sizes[1:], strict=True) if n != 1]
    if [n for _, n in kept] == [n for n in sizes[1:] if n != 1]:
        names = iter([axis for axis, _ in kept])
        axes = (0, *(None if n == 1 else next(names) for n in sizes[1:]))
        return node.replace(axes=axes, sizes=tuple(sizes))
    node = builder.arranged(node, range(len(node.sizes)))
    shape = tuple(sizes[1:])
    return Node(Reshape((node.result,), ""), shape, tuple(range(len(sizes))), tuple(sizes))


def natural(node):
    """The traced value's axes in the order that the graph has them."""
    return sorted(range(len(node.axes)), key=lambda i: (node.axes[i] is None, node.axes[i] or 0))


def _reshape(builder, eqn, values, site):
    return [reshaped(builder, values[0], eqn.outvars[0].aval.shape)]


def _broadcast(builder, eqn, values, site):
    node, where = values[0], eqn.params["broadcast_dimensions"]
    sizes = eqn.outvars[0].aval.shape
    axes: list[int | None] = [None] * len(sizes)
    for axis, place in enumerate(where):
        axes[place] = node.axes[axis] if node.sizes[axis] == sizes[place] else None
    return [node.replace(axes=tuple(axes), sizes=tuple(sizes))]


def _transpose(builder, eqn, values, site):
    node, order = values[0], eqn.params["permutation"]
    return [
        node.replace(
            axes=tuple(node.axes[axis] for axis in order),
            sizes=tuple(node.sizes[axis] for axis in order),
        )
    ]


def _concatenate(builder, eqn, values, site):
    if not all(isinstance(value, Node) for value in values):
        raise ValueError("only values of the graph can be concatenated")
    first, axis = values[0], eqn.params["dimension"]
    order = natural(first)
    if None in first.axes or first.axes[axis] == 0:
        raise ValueError("the batch and broadcast values cannot be concatenated")
    parts = [builder.arranged(node, order) for node in values]
    place = parts[0].axes[axis]
    sizes = eqn.outvars[0].aval.shape
    shape = tuple(sizes[i] for i in order[1:])
    op = Concatenate(tuple(part.result for part in parts), "", place - 1)
    return [Node(op, shape, parts[0].axes, sizes)]


def _slice(builder, eqn, values, site):
    node, params = values[0], eqn.params
    sizes = eqn.outvars[0].aval.shape
    if sizes[0] != node.sizes[0]:
        raise ValueError("the batch cannot be sliced")
    if sizes == node.sizes:
        return [node]
    order = natural(node)
    steps = params["strides"] or (1,) * len(node.sizes)
    cut = [
        tuple(along[axis] for axis in order[1:])
        for along in (params["start_indices"], params["limit_indices"], steps)
    ]
    shape = tuple(sizes[axis] for axis in order[1:])
    whole = None not in node.axes and len(node.axes) == len(node.shape) + 1
    if isinstance(node.result, Slice) and node.plain and whole:
        return [node.replace(result=_after(node.result, *cut), shape=shape, sizes=sizes)]
    x = builder.arranged(node, order)
    return [Node(Slice((x.result,), "", *cut), shape, x.axes, sizes)]


def _after(first, starts, stops, strides):
    """One slice for two: that of `first`, and then this one of its result."""
    steps = tuple(a * b for a, b in zip(first.strides, strides))
    begins = tuple(a + s * b for a, s, b in zip(first.starts, first.strides, starts))
    counts = (-(-(stop - start) // step) for start, stop, step in zip(starts, stops, strides))
    ends = tuple(a + (n - 1) * s + 1 for a, n, s in zip(begins, counts, steps))
    return Slice(first.inputs, "", begins, ends, steps)


def _pad(builder, eqn, values, site):
    node, value = values
    config = eqn.params["padding_config"]
    if isinstance(value, Node) or float(np.asarray(value)) != 0:
        raise ValueError("padding must be with zeros")
    if any(inner for _, _, inner in config) or min(min(c[:2]) for c in config) < 0:
        raise ValueError("padding must be around the values, and not negative")
    if any(config[0][:2]):
        raise ValueError("the batch cannot be padded")
    order = natural(node)
    x = builder.arranged(node, order)
    sizes = eqn.outvars[0].aval.shape
    padding = tuple((int(config[a][0]), int(config[a][1])) for a in order[1:])
    shape = tuple(sizes[axis] for axis in order[1:])
    return [Node(Pad((x.result,), "", padding), shape, x.axes, sizes)]


MOVES = {
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "concatenate": _concatenate,
    "slice": _slice,
    "pad": _pad,
}
"""{primitive: its rule}."""
