"""What only moves values: reshapes, slices, padding, concatenations, and indices that are known.

Lengths of 1 that come or go, and the order of axes, are kept with the node: they need no operation
until something reads the values in an order.
"""

from typing import Any

import numpy as np

from hybrid_jax.core import interpreter
from hybrid_jax.program.operations import Concatenate, Gather, Pad, Slice
from hybrid_jax.program.read import merged
from hybrid_jax.program.read.elementwise import constant
from hybrid_jax.program.read.flat import EXAMPLES, Known
from hybrid_jax.program.read.node import Builder, Node, Value


def reshape(builder: Builder, eqn: Any, values: list[Any]) -> list[Node]:
    """`reshape`, `squeeze`."""
    return [merged.reshaped(builder, values[0], eqn.outvars[0].aval.shape)]


def broadcast(builder: Builder, eqn: Any, values: list[Any]) -> list[Node]:
    """`broadcast_in_dim`: new axes are broadcast until an operation needs them whole."""
    node, sizes = values[0], eqn.outvars[0].aval.shape
    axes: list[int | None] = [None] * len(sizes)
    for axis, place in enumerate(eqn.params["broadcast_dimensions"]):
        axes[place] = node.axes[axis] if node.sizes[axis] == sizes[place] else None
    return [node.replace(axes=tuple(axes), sizes=tuple(sizes))]


def transpose(builder: Builder, eqn: Any, values: list[Any]) -> list[Node]:
    """`transpose`: the axes' places are kept with the node."""
    node, order = values[0], eqn.params["permutation"]
    axes, sizes = (tuple(own[axis] for axis in order) for own in (node.axes, node.sizes))
    return [node.replace(axes=axes, sizes=sizes)]


def concatenate(builder: Builder, eqn: Any, values: list[Any]) -> list[Node]:
    """`concatenate`, of constants too."""
    axis = eqn.params["dimension"]
    return [_concatenated(builder, values, axis, eqn.outvars[0].aval.shape[axis])]


def _concatenated(builder, values, axis, length):
    first = next(value for value in values if isinstance(value, Node))
    # What has length 1 everywhere else may say nothing of the order.
    order = max((v for v in values if isinstance(v, Node)), key=_places).natural
    if first.axes[axis] == 0 or any(v.axes[order[0]] != 0 for v in values if isinstance(v, Node)):
        raise ValueError("examples cannot be joined")
    names = [
        builder.placed(value, order)
        if isinstance(value, Node)
        else constant(builder, value, order, expand=True)
        for value in values
    ]
    sizes = tuple(length if i == axis else n for i, n in enumerate(first.sizes))
    shape = tuple(sizes[i] for i in order[1:])
    name = builder.add(Concatenate(tuple(names), "", order.index(axis) - 1), shape)
    return builder.node(name, order, sizes, first.dtype)


def _places(node):
    return sum(axis is not None for axis in node.axes)


def stack(builder: Builder, eqn: Any, values: list[Any]) -> list[Node]:
    """`stack`: a concatenation along an axis of length 1 that each gets."""
    axis, sizes = eqn.params["axis"], list(eqn.outvars[0].aval.shape)
    sizes[axis] = 1
    parts = []
    for value in values:
        if isinstance(value, Node):
            parts.append(builder.reshaped(value, sizes))
        else:
            parts.append(Known(np.expand_dims(value.value, axis), tuple(sizes), value.static))
    return [_concatenated(builder, parts, axis, len(values))]


def slices(builder: Builder, eqn: Any, values: list[Any]) -> list[Node]:
    """`slice`."""
    node, params = values[0], eqn.params
    steps = params["strides"] or (1,) * len(node.sizes)
    return [_cut(builder, node, params["start_indices"], params["limit_indices"], steps)]


def split(builder: Builder, eqn: Any, values: list[Any]) -> list[Node]:
    """`split`: a slice for each part."""
    node, axis = values[0], eqn.params["axis"]
    parts, start = [], 0
    for size in eqn.params["sizes"]:
        starts, stops = [0] * len(node.sizes), list(node.sizes)
        starts[axis], stops[axis] = start, start + size
        parts.append(_cut(builder, node, starts, stops, (1,) * len(node.sizes)))
        start += size
    return parts


def _cut(builder, node, starts, stops, steps):
    sizes = tuple(
        -(-(stop - start) // step) for start, stop, step in zip(starts, stops, steps, strict=True)
    )
    if sizes == node.sizes:
        return node
    order = node.natural
    if any(node.axes[i] == 0 and sizes[i] != node.sizes[i] for i in range(len(sizes))):
        raise ValueError("a slice must not take some of the examples")
    # Of what is broadcast every part is alike.
    real = [i for i in order[1:] if node.axes[i] is not None]
    lengths = tuple(node.sizes[i] if node.axes[i] is not None else 1 for i in order[1:])
    name = builder.placed(node, order, expand=False)
    cut = tuple(
        tuple(own[i] if node.axes[i] is not None else fixed for i in order[1:])
        for own, fixed in ((starts, 0), (stops, 1), (steps, 1))
    )
    held = tuple(sizes[i] if i in real else 1 for i in order[1:])
    if held != lengths:
        made = builder.moves.get(name)
        op = _after(made, *cut) if isinstance(made, Slice) else Slice((name,), "", *cut)
        name = builder.add(op, held)
    axes = tuple(order.index(i) if node.axes[i] is not None else None for i in range(len(sizes)))
    return Node(Value(name, held), axes, sizes, node.dtype)


def _after(first, starts, stops, strides):
    """One slice for two: that of `first`, and then this one of its result."""
    steps = tuple(a * b for a, b in zip(first.strides, strides, strict=True))
    begins = tuple(a + s * b for a, s, b in zip(first.starts, first.strides, starts, strict=True))
    counts = (
        -(-(stop - start) // step) for start, stop, step in zip(starts, stops, strides, strict=True)
    )
    ends = tuple(a + (n - 1) * s + 1 for a, n, s in zip(begins, counts, steps, strict=True))
    return Slice(first.inputs, "", begins, ends, steps)


def pad(builder: Builder, eqn: Any, values: list[Any]) -> list[Node]:
    """`pad`, also between the values, and cutting."""
    node, value = values
    if not isinstance(value, Known) or value.number is None:
        raise ValueError("padding must be with a constant")
    if not isinstance(node, Node):
        raise ValueError("what is padded must depend on an input")
    config, sizes = eqn.params["padding_config"], eqn.outvars[0].aval.shape
    order = node.natural
    if any(config[i] != (0, 0, 0) and node.axes[i] == 0 for i in range(len(sizes))):
        raise ValueError("padding must not add examples")
    name = builder.placed(node, order)
    shape = builder.tensors[name].shape
    for place, axis in enumerate(order[1:]):
        inner = config[axis][2]
        if inner:
            # Each entry gets an axis of its own, which is padded behind it.
            n = shape[place]
            apart = (*shape[:place], n, 1, *shape[place + 1 :])
            name = builder.shaped(name, apart)
            padding = tuple((0, inner if i == place + 1 else 0) for i in range(len(apart)))
            apart = (*shape[:place], n, 1 + inner, *shape[place + 1 :])
            name = builder.add(Pad((name,), "", padding, value.number), apart)
            shape = (*shape[:place], n * (1 + inner), *shape[place + 1 :])
            name = builder.shaped(name, shape)
    # The last entry has nothing behind it.
    pairs = [(config[axis][0], config[axis][1] - config[axis][2]) for axis in order[1:]]
    name, pairs = builder.cropped(name, pairs)
    shape = builder.tensors[name].shape
    held = tuple(n + low + high for n, (low, high) in zip(shape, pairs, strict=True))
    if held != shape:
        name = builder.add(Pad((name,), "", tuple(pairs), value.number), held)
    return [builder.node(name, order, sizes, node.dtype)]


def indexed(builder: Builder, eqn: Any, values: list[Any]) -> list[Node]:
    """What takes entries by indices that are known: `gather`, `rev`, `dynamic_slice`.

    The equation is run on the number of each entry, and so says itself which it takes.
    """
    node = values[0]
    if any(isinstance(v, Node) or not v.static for v in values[1:]) or not isinstance(node, Node):
        raise ValueError("indices must be known")
    order = node.batch_first
    count = int(np.prod([node.sizes[i] for i in order[1:]]))
    numbers = np.arange(EXAMPLES * count, dtype=np.int32).reshape([node.sizes[i] for i in order])
    back = np.argsort(order)
    (taken,) = interpreter.bind(eqn, [numbers.transpose(back), *(v.whole() for v in values[1:])])
    taken, sizes = np.asarray(taken), eqn.outvars[0].aval.shape
    place = _examples(taken, count)
    entries = np.moveaxis(taken, place, 0)[0]
    if entries.size and entries.min() < 0:
        raise ValueError("indices must lie within the values")
    name = _gathered(builder, builder.placed(node, order), entries)
    order = (place, *(i for i in range(len(sizes)) if i != place))
    return [builder.node(name, order, sizes, node.dtype)]


def _examples(taken, count):
    """The axis of the result along which examples lie."""
    for axis in range(taken.ndim):
        if taken.shape[axis] == EXAMPLES:
            apart = np.moveaxis(taken, axis, 0)
            steps = np.arange(EXAMPLES).reshape(-1, *(1,) * (taken.ndim - 1)) * count
            if (apart == apart[:1] + steps).all():
                return axis
    raise ValueError("examples cannot meet each other")


def _gathered(builder, name, entries):
    """The entries of an edge that have these numbers, along each axis by itself where that does."""
    before, after = builder.tensors[name].shape, entries.shape
    if len(before) == len(after) and entries.size:
        places = np.stack(np.unravel_index(entries, before)) if before else None
        along = []
        for axis in range(len(before)):
            line = np.moveaxis(places[axis], axis, 0).reshape(after[axis], -1)
            if (line != line[:, :1]).any():
                break
            along.append(line[:, 0])
        if len(along) == len(before):
            shape = list(before)
            for axis, indices in enumerate(along):
                if not np.array_equal(indices, np.arange(before[axis])):
                    shape[axis] = len(indices)
                    op = Gather((name,), "", axis, tuple(indices.tolist()))
                    name = builder.add(op, shape)
            return name
    name = builder.shaped(name, (int(np.prod(before)),))
    name = builder.add(Gather((name,), "", 0, tuple(entries.ravel().tolist())), (entries.size,))
    return builder.shaped(name, after)
