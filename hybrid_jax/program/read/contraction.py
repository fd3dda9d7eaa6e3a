"""Convolutions and matrix products."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from hybrid_jax.program.encoding import UNBOUNDED, Weights
from hybrid_jax.program.graph import Source
from hybrid_jax.program.operations import (
    Concatenate,
    Conv,
    Dense,
    MatMul,
    Pad,
    Reshape,
    Slice,
    Transpose,
)
from hybrid_jax.program.read.flat import Known
from hybrid_jax.program.read.node import Builder, Node, Pending, Value


def convolution(builder: Builder, eqn: Any, values: list[Any]) -> list[Node]:
    """`conv_general_dilated`, over one or two axes of space; also transposed."""
    x, kernel = values
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    if not isinstance(kernel, Known):
        raise ValueError("the kernel of a convolution must come from parameters alone")
    space = len(x.sizes) - 2
    if not 1 <= space <= 2:
        raise ValueError(f"a convolution must be over one or two axes, got {space}")
    if params["batch_group_count"] != 1:
        raise ValueError("a convolution must not group its batch")
    (batch, feature, *spatial), (out, inner, *sides) = numbers.lhs_spec, numbers.rhs_spec
    order = (*sides, inner, out)
    weights = np.transpose(kernel.whole(), order)
    pairs = [tuple(map(int, pair)) for pair in params["padding"]]
    strides, dilation, spread = (
        tuple(params[key]) for key in ("window_strides", "rhs_dilation", "lhs_dilation")
    )
    groups, sizes = params["feature_group_count"], eqn.outvars[0].aval.shape
    places = tuple(sizes[axis] for axis in numbers.out_spec[2:])
    flat = set(spread) == {1}
    x, taken = _taken(builder, x, feature, groups, flat, any(map(any, pairs)))
    name = builder.placed(x, (batch, *spatial, feature))
    if space == 1:
        # One axis of space is an image of one column.
        length, channels = builder.tensors[name].shape
        name = builder.add(Reshape((name,), "", (length, 1, channels)), (length, 1, channels))
        weights, pairs, places = weights[:, None], [*pairs, (0, 0)], (*places, 1)
        strides, dilation, spread = (*strides, 1), (*dilation, 1), (*spread, 1)
    if taken is not None and np.any(taken[1] != 0) and any(map(any, pairs)):
        name, pairs = _bordered(builder, name, pairs, taken), [(0, 0), (0, 0)]
    source = Source(builder.site, order, kernel.sizes, taken)
    weights = _with_bias(weights, taken)
    if flat:
        name, pairs = _with_pad(builder, *builder.cropped(name, pairs))
        title = builder.site or builder.unique("kernel")
        op = Conv((name,), "", title, weights, strides, tuple(pairs), dilation, groups)
        pending = Pending(op, source)
    else:
        if set(strides) != {1} or set(dilation) != {1} or groups != 1:
            raise ValueError("a transposed convolution must have strides alone, and one group")
        pending = _transposed(builder, name, weights, pairs, spread, places, source)
    held = (*places, weights.values.shape[-1])
    (batch, feature, *spatial), axes = numbers.out_spec, [0] * len(sizes)
    for place, axis in zip((0, 1, 2), (batch, *spatial), strict=False):
        axes[axis] = place
    axes[feature] = 3
    return [Node(Value(pending, held), tuple(axes), tuple(sizes))]


def _taken(builder, node, feature, groups, flat, padded):
    """The node without what scales and shifts its edge, and that, where a kernel takes it in.

    What differs between channels is taken in at the function's inputs alone: a kernel is rounded to
    a scale for each of its outputs.
    """
    value = node.value
    if not isinstance(value.source, str) or value.clip != UNBOUNDED or value.edge or value.unscaled:
        return node, None
    each = np.ndim(value.scale) or np.ndim(value.shift)
    if each and (
        value.source not in builder.inputs
        or groups != 1
        or node.axes[feature] != len(value.shape)
        or value.shape[-1] > 4
    ):
        return node, None
    # A border of zeros holds another value before the shift.
    moved = not value.static or bool(np.any(value.shift != 0))
    if moved and (not flat or (padded and not value.static)):
        return node, None
    return node.replace(value=Value(value.source, value.shape)), (value.scale, value.shift)


def _with_bias(kernel, taken):
    bias = np.zeros(kernel.shape[-1], np.float32)
    if taken is None:
        return Weights(kernel, None, bias)
    scale, shift = (np.broadcast_to(own, kernel.shape[-2:-1])[:, None] for own in taken)
    return Weights(kernel * scale, None, (kernel * shift).sum(tuple(range(kernel.ndim - 1))))


def _bordered(builder, name, pairs, taken):
    """The edge with a border of what becomes zero: (0 − shift) / scale, of each channel its own."""
    shape = builder.tensors[name].shape
    channels = shape[-1]
    border = np.broadcast_to(-taken[1] / taken[0], (channels,))
    padding = (*pairs, (0, 0))
    held = (*(n + sum(pair) for n, pair in zip(shape, pairs, strict=False)), channels)
    if len(set(border.tolist())) == 1:
        return builder.add(Pad((name,), "", padding, float(border[0])), held)
    parts = []
    for channel, value in enumerate(border.tolist()):
        starts, stops = (0, 0, channel), (*shape[:2], channel + 1)
        part = builder.add(Slice((name,), "", starts, stops, (1, 1, 1)), (*shape[:2], 1))
        parts.append(builder.add(Pad((part,), "", padding, value), (*held[:2], 1)))
    return builder.add(Concatenate(tuple(parts), "", 2), held)


def _with_pad(builder, name, pairs):
    """The edge before a `Pad` of zeros along space, and the padding of both."""
    made = builder.moves.get(name)
    if not isinstance(made, Pad) or made.value or any(made.padding[-1]):
        return name, pairs
    joined = zip(pairs, made.padding, strict=False)
    return made.inputs[0], [(a + c, b + d) for (a, b), (c, d) in joined]


def _transposed(builder, name, weights, pairs, spread, places, source):
    """A convolution of an input set apart by zeros: one for each phase of the result, side by side.

    Place p of the result meets entry i through tap t where p + t − before = i · spread. Which taps
    meet anything depends on p modulo the spread alone: the result is a plain convolution to as many
    times the channels as there are phases, which are then laid apart.
    """
    kernel = weights.values
    *window, inner, outputs = kernel.shape
    # {(phase, entry less that of the place's own): tap} along each axis.
    met = [
        {
            (phase, (phase + tap - before) // step): tap
            for phase in range(step)
            for tap in range(size)
            if (phase + tap - before) % step == 0
        }
        for size, step, (before, _) in zip(window, spread, pairs, strict=True)
    ]
    entries = [[entry for _, entry in own] or [0] for own in met]
    first, last = [min(own) for own in entries], [max(own) for own in entries]
    nothing = np.zeros((inner, outputs), np.float32)

    def phases(*at):
        every = itertools.product(*map(range, spread))
        taps = [[own.get(pair) for own, pair in zip(met, zip(each, at))] for each in every]
        return np.concatenate([nothing if None in tap else kernel[tuple(tap)] for tap in taps], -1)

    spans = [range(low, high + 1) for low, high in zip(first, last, strict=True)]
    whole = np.stack([np.stack([phases(i, j) for j in spans[1]]) for i in spans[0]])
    counts = [-(-size // step) for size, step in zip(places, spread, strict=True)]
    space = builder.tensors[name].shape[:2]
    name, pairs = builder.cropped(
        name, [(-first[i], counts[i] + last[i] - space[i]) for i in range(2)]
    )
    copies = math.prod(spread)
    bias = np.tile(weights.bias, copies)
    title = source.site or builder.unique("kernel")
    op = Conv((name,), "", title, Weights(whole, None, bias), (1, 1), tuple(pairs))
    apart = (*counts, *spread, outputs)
    mixed = (counts[0], spread[0], counts[1], spread[1], outputs)
    full = (counts[0] * spread[0], counts[1] * spread[1], outputs)
    after = [
        (Reshape((), "", apart), apart),
        (Transpose((), "", (0, 2, 1, 3, 4)), mixed),
        (Reshape((), "", full), full),
    ]
    if full[:2] != places:
        stops = (*places, outputs)
        after.append((Slice((), "", (0, 0, 0), stops, (1, 1, 1)), stops))
    source = dataclasses.replace(source, copies=copies)
    return Pending(op, source, tuple(after), (*counts, copies * outputs))


def product(builder: Builder, eqn: Any, values: list[Any]) -> list[Node]:
    """`dot_general`: with a kernel that comes from parameters alone, or of two tensors."""
    contracted, batched = eqn.params["dimension_numbers"]
    if isinstance(values[0], Node) and isinstance(values[1], Node):
        return [_of_two(builder, eqn, values, contracted, batched)]
    place = 0 if isinstance(values[0], Node) else 1
    x, kernel = values[place], values[1 - place]
    own, theirs = contracted[place], contracted[1 - place]
    shared, shared_theirs = batched[place], batched[1 - place]
    kept = [axis for axis in range(len(x.sizes)) if axis not in (*own, *shared)]
    outs = [axis for axis in range(len(kernel.sizes)) if axis not in (*theirs, *shared_theirs)]
    if any(x.axes[axis] == 0 for axis in (*own, *shared)):
        raise ValueError("examples cannot meet each other")
    batch = next(axis for axis in kept if x.axes[axis] == 0)
    middle = [axis for axis in kept if axis != batch]
    name = builder.placed(x, (batch, *middle, *shared, *own))
    lengths = [x.sizes[axis] for axis in middle]
    groups = math.prod(x.sizes[axis] for axis in shared)
    inputs = math.prod(x.sizes[axis] for axis in own)
    outputs = math.prod(kernel.sizes[axis] for axis in outs)
    order = (*theirs, *shared_theirs, *outs)
    flat = np.transpose(kernel.whole(), order).reshape(inputs, groups * outputs)
    bias = np.zeros(groups * outputs, np.float32)
    title = builder.site or builder.unique("kernel")
    if not middle and groups == 1:
        name = builder.shaped(name, (inputs,))
        op: Any = Dense((name,), "", title, Weights(flat, None, bias))
        held: tuple[int, ...] = (outputs,)
    else:
        # A dense layer at each place is a 1×1 convolution.
        space = tuple(lengths) if len(lengths) == 2 else (math.prod(lengths), 1)
        image = (*space, groups * inputs)
        name = builder.shaped(name, image)
        kernel_ = flat.reshape(1, 1, inputs, groups * outputs)
        op = Conv((name,), "", title, Weights(kernel_, None, bias), groups=groups)
        held = (*space, groups * outputs)
    source = Source(builder.site, order, kernel.sizes)
    node = Node(
        Value(Pending(op, source), held), tuple(range(len(held) + 1)), (x.sizes[batch], *held)
    )
    # The traced result has the shared axes first, then those left of each operand in turn.
    sizes = [x.sizes[batch], *lengths, *(x.sizes[axis] for axis in shared)]
    node = builder.reshaped(node, [*sizes, *(kernel.sizes[axis] for axis in outs)])
    left = [0 if axis == batch else 1 + middle.index(axis) for axis in kept]
    heads = [1 + len(middle) + i for i in range(len(shared))]
    last = [1 + len(middle) + len(shared) + i for i in range(len(outs))]
    order = [*heads, *(left + last if place == 0 else last + left)]
    axes, sizes = (tuple(own[i] for i in order) for own in (node.axes, node.sizes))
    return [node.replace(axes=axes, sizes=sizes)]


def _of_two(builder, eqn, values, contracted, batched):
    """The product of two tensors, with every example by itself."""
    names, groups, rows = [], [], []
    for side, node in enumerate(values):
        shared, own = list(batched[side]), list(contracted[side])
        if not shared or 0 not in [node.axes[axis] for axis in shared]:
            raise ValueError("examples cannot meet each other")
        batch = next(axis for axis in shared if node.axes[axis] == 0)
        if side == 0:
            place = shared.index(batch)
        elif shared.index(batch) != place:
            raise ValueError("examples cannot meet each other")
        heads = [axis for axis in shared if axis != batch]
        free = [axis for axis in range(len(node.sizes)) if axis not in (*shared, *own)]
        order = (batch, *heads, *free, *own) if side == 0 else (batch, *heads, *own, *free)
        name = builder.placed(node, order)
        groups = [node.sizes[axis] for axis in heads]
        rows.append([node.sizes[axis] for axis in free])
        inner = math.prod(node.sizes[axis] for axis in own)
        last = (math.prod(rows[-1]), inner) if side == 0 else (inner, math.prod(rows[-1]))
        shape = (math.prod(groups), *last)
        name = builder.shaped(name, shape)
        names.append(name)
    held = (math.prod(groups), math.prod(rows[0]), math.prod(rows[1]))
    sizes = eqn.outvars[0].aval.shape
    node = builder.made(MatMul(tuple(names), ""), held, (sizes[place], *held))
    node = builder.reshaped(node, (sizes[place], *groups, *rows[0], *rows[1]))
    # The batch stands among the shared axes where the traced result has it.
    wanted = list(range(1, len(sizes)))
    wanted.insert(place, 0)
    return node.replace(axes=tuple(node.axes[i] for i in wanted), sizes=tuple(sizes))
