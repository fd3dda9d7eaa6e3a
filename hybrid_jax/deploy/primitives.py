"""What each primitive of a jaxpr becomes in the inference graph.

A rule is rule(builder, equation, values, site) -> the outputs. Values are NumPy arrays where they
come from parameters alone, and `Node`s where they depend on the input; at least one is a node. A
rule raises ValueError for what the graph cannot express.
"""

import math

import numpy as np

from hybrid_jax.deploy.builder import Node, Source
from hybrid_jax.deploy.moves import MOVES, natural, reshaped
from hybrid_jax.deploy.program import (
    UNBOUNDED,
    Add,
    AveragePool,
    Conv,
    Dense,
    Lookup,
    MaxPool,
    Mean,
    Multiply,
    Pad,
    Reshape,
    Softmax,
    Weights,
)


def _identity(builder, eqn, values, site):
    return [values[0]]


def _conv(builder, eqn, values, site):
    x, kernel = values
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    if isinstance(kernel, Node) or not isinstance(x, Node):
        raise ValueError("the kernel of a convolution must come from parameters alone")
    if len(x.sizes) != 4:
        raise ValueError(f"a convolution must be over H and W, got {len(x.sizes) - 2} axes")
    if set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
        raise ValueError("a convolution must not be transposed")
    batch, feature, *spatial = numbers.lhs_spec
    x = _with_padding(builder, x, (batch, *spatial, feature), params["padding"])
    out, inner, *sides = numbers.rhs_spec
    order = (*sides, inner, out)
    values_hwio = np.transpose(kernel, order)
    op = Conv(
        (x[0],),
        "",
        site.name,
        Weights(values_hwio, None, np.zeros(values_hwio.shape[-1], np.float32)),
        tuple(params["window_strides"]),
        x[1],
        tuple(params["rhs_dilation"]),
        params["feature_group_count"],
    )
    sizes = eqn.outvars[0].aval.shape
    batch, feature, *spatial = numbers.out_spec
    axes = [0] * 4
    for place, axis in enumerate((batch, *spatial, feature)):
        axes[axis] = place
    shape = tuple(sizes[axis] for axis in (*spatial, feature))
    source = Source(kernel, order, values_hwio.shape, np.ones(shape[-1], np.float32))
    return [builder.site(op, source, shape=shape, axes=tuple(axes), sizes=sizes)]


def _with_padding(builder, node, order, padding):
    """The tensor to convolve, and its padding, of which a `Pad` of H and W becomes part."""
    padding = tuple((int(low), int(high)) for low, high in padding)
    if min(min(pair) for pair in padding) < 0:
        raise ValueError(f"padding of a convolution must not be negative, got {padding}")
    op = node.result
    if isinstance(op, Pad) and node.plain and not any(op.padding[-1]):
        shape = tuple(n - sum(p) for n, p in zip(node.shape, op.padding, strict=True))
        before = node.replace(
            result=op.inputs[0],
            shape=shape,
            sizes=tuple(1 if a is None else (node.sizes[0], *shape)[a] for a in node.axes),
        )
        if [before.axes[axis] for axis in order] == [0, 1, 2, 3]:
            more = zip(padding, op.padding, strict=False)
            joined = tuple((low + a, high + b) for (low, high), (a, b) in more)
            return op.inputs[0], joined
    return builder.arranged(node, order).result, padding


def _dot(builder, eqn, values, site):
    place = 0 if isinstance(values[0], Node) else 1
    x, kernel = values[place], values[1 - place]
    contracted, batched = eqn.params["dimension_numbers"]
    if isinstance(kernel, Node) or batched[0]:
        raise ValueError("one factor of a matrix product must come from parameters alone")
    own, theirs = contracted[place], contracted[1 - place]
    if len(own) != 1:
        raise ValueError(f"a matrix product must sum over one axis, got {len(own)}")
    kept = [axis for axis in range(len(x.sizes)) if axis not in own]
    outs = [axis for axis in range(kernel.ndim) if axis not in theirs]
    if place == 1 and outs:
        raise ValueError("the batch must stay the leading axis; multiply from the right")
    x = builder.arranged(x, (*kept, *own))
    order = (*theirs, *outs)
    inputs, outputs = kernel.shape[theirs[0]], math.prod(kernel.shape[axis] for axis in outs)
    flat = np.transpose(kernel, order).reshape(inputs, outputs)
    bias, ones = np.zeros(outputs, np.float32), np.ones(outputs, np.float32)
    middle = x.shape[:-1]
    sizes = eqn.outvars[0].aval.shape
    if not middle:
        op = Dense((x.result,), "", site.name, Weights(flat, None, bias))
        shape, node_shape = flat.shape, (outputs,)
    else:
        # A dense layer at each place is a 1×1 convolution.
        image = middle if len(middle) == 2 else (math.prod(middle), 1)
        name = x.result
        if image != middle:
            name = builder.add(Reshape((name,), ""), (*image, inputs))
        shape, node_shape = (1, 1, *flat.shape), (*image, outputs)
        op = Conv((name,), "", site.name, Weights(flat.reshape(shape), None, bias))
    node = builder.site(
        op,
        Source(kernel, order, shape, ones),
        shape=node_shape,
        axes=tuple(range(len(node_shape) + 1)),
        sizes=(sizes[0], *node_shape),
    )
    return [node if node.sizes == sizes else reshaped(builder, node, sizes)]


def _scalar_or_channels(node, operand):
    """A known operand as () or (C,) along the node's channels."""
    operand = np.asarray(operand, np.float32)
    varying = []
    for axis in range(operand.ndim):
        first = np.take(operand, [0], axis)
        if operand.shape[axis] > 1 and (operand == first).all():
            operand = first
        if operand.shape[axis] > 1:
            varying.append(axis)
    if not varying:
        return operand.reshape(-1)[0]
    if varying != [node.channel_axis]:
        raise ValueError("a constant must differ between channels only")
    return operand.reshape(-1)


def _affine(builder, node, scale=1.0, shift=0.0):
    if node.clip != UNBOUNDED:
        node = builder.made(node)
    scale = np.float32(scale)
    return node.replace(scale=node.scale * scale, shift=node.shift * scale + np.float32(shift))


def _binary(builder, eqn, values, site):
    name, (a, b) = eqn.primitive.name, values
    if isinstance(a, Node) and isinstance(b, Node):
        return [_of_two(builder, name, a, b)]
    node, known = (a, b) if isinstance(a, Node) else (b, a)
    known = _scalar_or_channels(node, known)
    if name in ("max", "min"):
        if np.ndim(known):
            raise ValueError("a bound must be one number")
        return [
            _clipped(node, float(known), math.inf)
            if name == "max"
            else _clipped(node, -math.inf, float(known))
        ]
    if name == "add":
        return [_affine(builder, node, shift=known)]
    if name == "mul":
        return [_affine(builder, node, scale=known)]
    if name == "div" and node is a:
        return [_affine(builder, node, scale=np.float32(1) / known)]
    if name == "sub":
        if node is a:
            return [_affine(builder, node, shift=-known)]
        return [_affine(builder, node, scale=-1.0, shift=known)]
    raise ValueError("a constant cannot be divided by a value of the graph")


def _of_two(builder, name, a, b):
    if name == "div" and a.softmax and b.softmax and b.softmax == ("sum", a.softmax[1]):
        x = builder.arranged(a.softmax[1], range(len(a.sizes)))
        return x.replace(result=Softmax((x.result,), ""))
    if name == "sub" and b.softmax == ("max", a):
        return a.replace(softmax=("shifted", a))
    if name == "sub":
        name, b = "add", _affine(builder, b, scale=-1.0)
    if name not in ("add", "mul"):
        raise ValueError("two values of the graph can only be added or multiplied")
    if any(axis is None and n > 1 for axis, n in zip(a.axes, a.sizes, strict=True)):
        a, b = b, a
    order = natural(a)
    a = builder.arranged(a, order)
    if name == "mul" and any(x is None and n > 1 for x, n in zip(b.axes, b.sizes, strict=True)):
        lengths = [1 if x is None else n for x, n in zip(b.axes, b.sizes, strict=True)]
        b = builder.arranged(b.replace(sizes=tuple(lengths)), order)
        if len(a.shape) != 3 or b.shape[:2] != (1, 1) or b.shape[2] != a.shape[2]:
            raise ValueError(f"factors must be (H, W, C) and (1, 1, C), got {a.shape}, {b.shape}")
        return a.replace(result=Multiply((a.result, b.result), ""))
    b = builder.arranged(b, order)
    kind = Add if name == "add" else Multiply
    return a.replace(result=kind((a.result, b.result), ""), softmax=None)


def _clipped(node, low, high):
    first, last = (min(max(end, low), high) for end in node.clip)
    return node.replace(clip=(first, last))


def _clamp(builder, eqn, values, site):
    low, node, high = values
    if isinstance(low, Node) or isinstance(high, Node) or np.ndim(low) or np.ndim(high):
        raise ValueError("a bound must be one number")
    return [_clipped(node, float(low), float(high))]


def _reduced(node, axes):
    """The traced value's sizes and axes without some."""
    kept = [axis for axis in range(len(node.sizes)) if axis not in axes]
    return kept, tuple(node.sizes[axis] for axis in kept)


def _reduce_sum(builder, eqn, values, site):
    node, axes = values[0], tuple(eqn.params["axes"])
    kept, sizes = _reduced(node, axes)
    if node.softmax and node.softmax[0] == "exp" and axes == (len(node.sizes) - 1,):
        return [node.replace(softmax=("sum", node.softmax[1]), axes=(0,), sizes=sizes)]
    count = math.prod(node.sizes[axis] for axis in axes)
    if 0 in axes or len(axes) > 2 or len(kept) > 2:
        raise ValueError(f"a sum must be over H and W, got axes {axes}")
    channel = [axis for axis in kept if axis != 0]
    image = builder.arranged(node, (0, *axes, *channel))
    shape = (*(image.shape[:2] if len(axes) == 2 else (image.shape[0], 1)), *sizes[1:])
    if len(shape) == 2:
        shape = (*shape, 1)
    name = image.result
    if shape != image.shape:
        name = builder.add(Reshape((name,), ""), shape)
    mean = Node(Mean((name,), ""), (shape[-1],), (0, 1)[: len(sizes)], sizes)
    return [mean.replace(scale=np.float32(count))]


def _reduce_max(builder, eqn, values, site):
    node, axes = values[0], tuple(eqn.params["axes"])
    kept, sizes = _reduced(node, axes)
    if axes == (len(node.sizes) - 1,) and len(node.shape) == 1:
        return [node.replace(softmax=("max", node), axes=(0,), sizes=sizes)]
    if 0 in axes or len(axes) != 2 or len(kept) != 2:
        raise ValueError(f"a maximum must be over H and W, got axes {axes}")
    image = builder.arranged(node, (0, *axes, kept[1]))
    pool = MaxPool((image.result,), "", image.shape[:2], (1, 1))
    return [Node(pool, (1, 1, image.shape[2]), (0, 3), sizes)]


def _pool(builder, eqn, values, site):
    params = eqn.params
    node, rank = values[0], len(values[0].sizes)
    window, strides, padding = (
        params[key] for key in ("window_dimensions", "window_strides", "padding")
    )
    dilated = {*params.get("base_dilation", ()), *params.get("window_dilation", ())} - {1}
    spatial = [axis for axis in range(1, rank) if axis != node.channel_axis]
    if rank != 4 or len(spatial) != 2 or dilated:
        raise ValueError("a pool must be over H and W, without dilation")
    if any(window[axis] > 1 or any(padding[axis]) for axis in range(4) if axis not in spatial):
        raise ValueError("a pool must be over H and W")
    image = builder.arranged(node, (0, *spatial, node.channel_axis))
    kind = MaxPool if eqn.primitive.name == "reduce_window_max" else AveragePool
    size = tuple(window[axis] for axis in spatial)
    pool = kind(
        (image.result,),
        "",
        size,
        tuple(strides[axis] for axis in spatial),
        tuple((int(padding[axis][0]), int(padding[axis][1])) for axis in spatial),
    )
    sizes = eqn.outvars[0].aval.shape
    shape = (*(sizes[axis] for axis in spatial), sizes[node.channel_axis])
    made = Node(pool, shape, image.axes, sizes)
    # The window's sum is its mean times its size; the division that follows cancels it.
    return [made if kind is MaxPool else made.replace(scale=np.float32(math.prod(size)))]


def _function(builder, eqn, values, site):
    node, name = values[0], eqn.primitive.name
    if name == "exp" and node.softmax and node.softmax[0] == "shifted":
        return [node.replace(softmax=("exp", node.softmax[1]))]
    made = builder.made(node)
    return [made.replace(result=Lookup((made.result,), "", name))]


def _neg(builder, eqn, values, site):
    return [_affine(builder, values[0], scale=-1.0)]


RULES = MOVES | {
    "conv_general_dilated": _conv,
    "dot_general": _dot,
    "add": _binary,
    "sub": _binary,
    "mul": _binary,
    "div": _binary,
    "max": _binary,
    "min": _binary,
    "clamp": _clamp,
    "neg": _neg,
    "reduce_sum": _reduce_sum,
    "reduce_max": _reduce_max,
    "reduce_window_max": _pool,
    "reduce_window_sum": _pool,
    "logistic": _function,
    "tanh": _function,
    "exp": _function,
    "convert_element_type": _identity,
    "copy": _identity,
    "copy_p": _identity,
    "stop_gradient": _identity,
    "reduce_precision": _identity,
    "optimization_barrier": lambda builder, eqn, values, site: list(values),
}
"""{primitive: its rule}."""
