"""Sums, means and maxima over axes and windows."""

import math
from typing import Any

import numpy as np

from hybrid_jax.program.operations import AveragePool, Largest, MaxPool, Mean
from hybrid_jax.program.read.elementwise import affine
from hybrid_jax.program.read.flat import Known
from hybrid_jax.program.read.node import Builder, Node, Value


def reduced(builder: Builder, eqn: Any, values: list[Any]) -> list[Node]:
    """`reduce_sum`, `reduce_max`, `reduce_min` over any axes of an example."""
    (node,), axes = values, tuple(eqn.params["axes"])
    if any(node.axes[axis] == 0 for axis in axes) or 0 not in node.axes:
        raise ValueError("examples cannot meet each other")
    name = eqn.primitive.name
    kept = [axis for axis in range(len(node.sizes)) if axis not in axes]
    # What is broadcast along an axis is the same there.
    repeats = math.prod(node.sizes[axis] for axis in axes if node.axes[axis] is None)
    real = tuple(axis for axis in axes if node.axes[axis] is not None)
    sizes = tuple(node.sizes[axis] for axis in kept)
    rest = node.replace(axes=tuple(node.axes[axis] for axis in kept), sizes=sizes)
    scale = repeats if name == "reduce_sum" else 1
    if not real:
        return [affine(builder, rest, scale) if scale != 1 else rest]
    if name == "reduce_min":
        node = affine(builder, node, -1.0)
    order = [axis for axis in node.natural if node.axes[axis] is not None]
    order += [axis for axis in kept if node.axes[axis] is None]
    held = builder.placed(node, order + [a for a in axes if a not in real], expand=False)
    shape = builder.tensors[held].shape[: len(order) - 1]
    held = builder.shaped(held, shape)
    places = tuple(sorted(order.index(axis) - 1 for axis in real))
    left = [axis for axis in order if axis not in real]
    result = tuple(n for i, n in enumerate(shape) if i not in places)
    kind = Mean if name == "reduce_sum" else Largest
    value = Value(builder.add(kind((held,), "", axes=places), result), result)
    where = tuple(left.index(axis) for axis in kept)
    where = tuple(None if node.axes[axis] is None else place for axis, place in zip(kept, where))
    made = Node(value, where, sizes)
    if kind is Mean:
        return [affine(builder, made, np.float32(repeats * math.prod(shape[i] for i in places)))]
    return [affine(builder, made, -1.0) if name == "reduce_min" else made]


def pooled(builder: Builder, eqn: Any, values: list[Any]) -> list[Node]:
    """`reduce_window_max` and `reduce_window_sum`, over one or two axes."""
    params, node = eqn.params, values[0]
    window, strides, padding = (
        params[key] for key in ("window_dimensions", "window_strides", "padding")
    )
    if {*params.get("base_dilation", ()), *params.get("window_dilation", ())} - {1}:
        raise ValueError("a pool must have no dilation")
    moved = [
        axis for axis, n in enumerate(window) if n > 1 or strides[axis] > 1 or any(padding[axis])
    ]
    if not moved:
        return [node]
    if any(node.axes[axis] == 0 for axis in moved):
        raise ValueError("examples cannot meet each other")
    if len(moved) > 2:
        raise ValueError(f"a pool must be over one or two axes, got {len(moved)}")
    if 0 not in node.axes:
        raise ValueError("the batch must stay an axis of its own")
    batch = node.axes.index(0)
    rest = [axis for axis in node.natural if axis not in (batch, *moved)]
    # All but the window is channels; of the image two axes, the second of length 1 if need be.
    order = (
        batch,
        *sorted(moved, key=lambda axis: (node.axes[axis] is None, node.axes[axis])),
        *rest,
    )
    moved = list(order[1 : 1 + len(moved)])
    name = builder.placed(node, order)
    spatial = [node.sizes[axis] for axis in moved] + [1] * (2 - len(moved))
    image = (*spatial, math.prod(node.sizes[axis] for axis in rest))
    name = builder.shaped(name, image)

    def along(entries, default):
        return tuple(entries[axis] for axis in moved) + (default,) * (2 - len(moved))

    pairs = tuple((int(low), int(high)) for low, high in along(padding, (0, 0)))
    kind = MaxPool if eqn.primitive.name == "reduce_window_max" else AveragePool
    size, step = along(window, 1), along(strides, 1)
    sizes = eqn.outvars[0].aval.shape
    shape = (*along(sizes, 1), image[-1])
    pool = builder.add(kind((name,), "", size, step, pairs), shape)
    full = tuple(sizes[axis] for axis in order[1:])
    made = builder.node(builder.shaped(pool, full), order, sizes)
    # The window's sum is its mean times its size; the division that follows cancels it.
    return [made if kind is MaxPool else affine(builder, made, np.float32(math.prod(size)))]


def uncounted(builder: Builder, eqn: Any, values: list[Any]) -> list[Node] | None:
    """A sum over windows that is divided by how many entries each has: padding is not counted."""
    if eqn.primitive.name != "div" or not isinstance(values[1], Known) or not values[1].static:
        return None
    node, known = values
    value = node.value
    if not isinstance(value.source, str) or value.edge is not None:
        return None
    op = next((op for op in builder.operations if op.output == value.source), None)
    if not isinstance(op, AveragePool) or not op.count_padding or not any(map(any, op.padding)):
        return None
    if not np.all(value.scale == math.prod(op.window)) or node.axes != (0, 1, 2, 3):
        return None
    own = AveragePool(op.inputs, "", op.window, op.strides, op.padding, count_padding=False)
    counts = own.counts(builder.tensors[op.inputs[0]].shape)
    if known.value.ndim != 4 or not np.array_equal(
        np.broadcast_to(known.value, known.sizes)[0, :, :, :1], counts
    ):
        return None
    if known.value.shape[-1] != 1 or known.value.shape[0] != 1:
        return None
    shape = builder.tensors[value.source].shape
    return [node.replace(value=Value(builder.add(own, shape), shape))]
