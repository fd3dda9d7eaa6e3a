"""What each operation of a program becomes in an ONNX graph.

A rule is rule(graph, operation) -> the value that holds the operation's output as it is stored.
Computing operations read their inputs in floats; those that move or compare values, as stored.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybrid_jax import program as p
from hybrid_jax.deploy.onnx_functions import FLOAT, converted, expression
from hybrid_jax.deploy.onnx_graph import WHOLE, Graph, arranged, axis_order, file_dtype, pads
from hybrid_jax.program import UNBOUNDED, arithmetic, operations

OF_HALVES = 21  # the first opset that casts an int4


def stored_bits(weights: p.Weights, x: p.Encoding | None, opset: int) -> int:
    """Bits of each entry of a kernel in the file; what multiplies floats is stored in floats."""
    if x is None:
        return 32
    # Three nodes that make an int8 of it take some 150 bytes.
    pays = weights.values.size >= 512
    return 4 if pays and weights.bits <= 4 and opset >= OF_HALVES else 8


def written(
    onnx: Any,
    program: p.Program,
    inputs: Sequence[str],
    outputs: Sequence[str],
    prefix: str = "",
    **options: Any,
) -> tuple[list, list]:
    """The nodes and constants that make a program's outputs of its inputs.

    `inputs` and `outputs` are names of values, `prefix` begins every other name, and `options` are
    those of `Graph`.
    """
    graph = Graph(onnx, program, inputs, prefix, **options)
    for op in program.operations:
        graph.stored[op.output] = RULES[type(op)](graph, op)
        if graph.single.issuperset(op.inputs):
            graph.single.add(op.output)
    results = [_result(graph, program, edge) for edge in program.outputs]
    return graph.ended(dict(zip(outputs, results, strict=True)))


def _result(graph, program, name):
    value, dtype = graph.result(name), file_dtype(program.tensors[name].dtype)
    if dtype == FLOAT:
        return value
    made = converted(graph, value, FLOAT, dtype)
    return made if dtype.kind == "b" or dtype == np.int32 else graph.cast(made, dtype)


def _conv(graph, op):
    kernel, bias = _weights(graph, op, (3, 2, 0, 1))
    x, padding = _padded(graph, op, min(map(min, op.padding)) < 0)  # ONNX crops in a Pad alone
    y = graph.node(
        "Conv",
        [x, kernel, bias],
        op.name,
        kernel_shape=op.weights.values.shape[:2],
        strides=op.strides,
        pads=pads(padding),
        dilations=op.dilation,
        group=op.groups,
    )
    return graph.store(y, op)


def _dense(graph, op):
    kernel, bias = _weights(graph, op, (0, 1))
    return graph.store(graph.node("Gemm", [graph.floats(op.inputs[0]), kernel, bias], op.name), op)


def _weights(graph, op, order):
    """Kernel and bias in floats; those of an encoded input are stored as integers.

    A kernel whose products with an int8 would saturate on some processors is a uint8.
    """
    weights, encoding = op.weights, graph.encoding(op.inputs[0])
    if encoding is None:
        kernel = weights.values if weights.scale is None else weights.values * weights.scale
        return np.asarray(kernel).transpose(order), weights.bias
    kernel, zero = weights.values.transpose(order), np.int8(0)
    if not graph.vnni and arithmetic.saturates(weights, encoding):
        kernel, zero = (kernel.astype(np.int16) + 128).astype(np.uint8), np.uint8(128)
    if stored_bits(weights, encoding, graph.opset) == 4:
        kernel = graph.halves(kernel, p.integer_step(4))
    kernel = [kernel, weights.scale, np.full(weights.scale.shape, zero)]
    step = np.float32(encoding.scale) * weights.scale
    bias = [arithmetic.integer_bias(weights, encoding), step]
    return (
        graph.node("DequantizeLinear", kernel, axis=order.index(len(order) - 1)),
        graph.node("DequantizeLinear", bias, axis=0),
    )


def _of_floats(kind):
    def rule(graph, op):
        return graph.store(graph.node(kind, [graph.floats(name) for name in op.inputs]), op)

    return rule


def _matmul(graph, op):
    rank = len(graph.shape(op.output))
    turned = [graph.last_channels(graph.stored[name], rank) for name in op.inputs]
    floats = [
        graph.dequantize(value, graph.encoding(name))
        for value, name in zip(turned, op.inputs, strict=True)
    ]
    return graph.first_channels(graph.store(graph.node("MatMul", floats), op), rank)


def _max_pool(graph, op):
    if any(max(pair) >= size for pair, size in zip(op.padding, op.window)):
        raise ValueError(
            f"MaxPool {op.output!r} must have padding below its window in ONNX, "
            f"got {op.padding} around {op.window}"
        )
    return _pool(graph, op, "MaxPool", graph.stored[op.inputs[0]], pads=pads(op.padding))


def _average_pool(graph, op):
    # Padding of the pool itself is the integer 0 in OpenVINO, whatever the zero point.
    x, padding = _padded(graph, op, op.count_padding and any(map(any, op.padding)))
    return graph.store(_pool(graph, op, "AveragePool", x, pads=pads(padding)), op)


def _padded(graph, op, apart):
    """What has windows, in floats, and the padding that is left to its node."""
    (name,), padding = op.inputs, op.padding
    x, encoding = graph.stored[name], graph.encoding(name)
    if apart:
        zero = _entry(0 if encoding is None else encoding.zero_point, encoding)
        x, padding = graph.pad(x, (*padding, (0, 0)), zero), ((0, 0), (0, 0))
    return graph.dequantize(x, encoding), padding


def _pool(graph, op, kind, x, **attributes):
    return graph.node(kind, [x], kernel_shape=op.window, strides=op.strides, **attributes)


def _mean(graph, op):
    """A global pool of (axes that stay, axes that go, 1), of which runtimes have kernels."""
    (name,), shape = op.inputs, graph.shape(op.inputs[0])
    gone, left = _parted(op, len(shape))
    x = graph.transpose(graph.last_channels(graph.stored[name], len(shape)), (*left, *gone))
    if (len(left), len(gone)) != (1, 2):
        count = math.prod(shape[axis] for axis in gone)
        x = graph.node("Reshape", [x, np.int64([-1, math.prod(shape) // count, count, 1])])
    y = graph.node("GlobalAveragePool", [graph.dequantize(x, graph.encoding(name))])
    # ONNX Runtime's kernels have the channels last: turned so here, it turns nothing.
    y = graph.transpose(graph.store(y, op), (1, 2, 0))
    y = graph.node("Reshape", [y, np.int64([0, *(shape[axis] for axis in left)])])
    return graph.first_channels(y, len(left))


def _largest(graph, op):
    rank, (name,) = len(graph.shape(op.inputs[0])), op.inputs
    y = graph.reduce("ReduceMax", graph.stored[name], graph.places(name, op.axes), 0)
    _, left = _parted(op, rank)
    there = [axis for axis in axis_order(rank) if axis in left]
    return graph.transpose(y, [there.index(left[axis]) for axis in axis_order(len(left))])


def _parted(op, rank):
    """The axes of an example that a reduction takes away, and those that it leaves."""
    gone = sorted(axis % rank for axis in op.axes)
    return gone, [axis for axis in range(rank) if axis not in gone]


def _convert(graph, op):
    if op.inputs[0] in graph.bytes and graph.encoding(op.output) == p.Encoding(1.0):
        return graph.bytes[op.inputs[0]]
    return _reencoded(graph, op, UNBOUNDED)


def _reencoded(graph, op, clip):
    (name,) = op.inputs
    before, after = graph.encoding(name), graph.encoding(op.output)
    if before == after:
        x = graph.stored[name]
        if after is None:
            return graph.clip(x, clip, np.float32, UNBOUNDED)
        return graph.clip(x, arithmetic.bounds(after, clip), np.uint8, (after.low, after.high))
    # From one encoding to another a Clip stands behind, if only of all that there is: of two bare
    # pairs in a row ONNX Runtime makes one of a third scale, with which the next kernel is wrong.
    within = WHOLE if before is None else (None, None)
    return graph.stored_within(graph.floats(name), op, clip, within)


def _concatenate(graph, op):
    alike = {graph.encoding(name) for name in op.inputs} == {graph.encoding(op.output)}
    values = [graph.stored[name] if alike else graph.floats(name) for name in op.inputs]
    if not graph.single.issuperset(op.inputs):
        rank = len(graph.shape(op.output))
        values = [
            graph.batched(value, rank) if name in graph.single else value
            for value, name in zip(values, op.inputs, strict=True)
        ]
    y = graph.node("Concat", values, axis=graph.places(op.output, [op.axis])[0])
    return y if alike else graph.store(y, op)


def _reshape(graph, op):
    after = graph.shape(op.output)
    x = graph.last_channels(graph.stored[op.inputs[0]], len(graph.shape(op.inputs[0])))
    return graph.first_channels(graph.node("Reshape", [x, np.int64([0, *after])]), len(after))


def _transpose(graph, op):
    rank = len(op.permutation)
    x = graph.last_channels(graph.stored[op.inputs[0]], rank)
    return graph.first_channels(graph.transpose(x, op.permutation), rank)


def _broadcast(graph, op):
    shape = np.int64([1, *arranged(op.shape)])
    return graph.node("Expand", [graph.stored[op.inputs[0]], shape])


def _pad(graph, op):
    encoding = graph.encoding(op.output)
    value = op.fill(encoding)
    return graph.pad(graph.stored[op.inputs[0]], op.padding, _entry(value, encoding))


def _entry(value, encoding):
    return np.float32(value) if encoding is None else np.uint8(value)


def _slice(graph, op):
    axes = range(1, len(op.starts) + 1)
    vectors = arranged(op.starts), arranged(op.stops), axes, arranged(op.strides)
    return graph.node("Slice", [graph.stored[op.inputs[0]], *map(np.int64, vectors)])


def _gather(graph, op):
    rank, (name,) = len(graph.shape(op.output)), op.inputs
    x, indices = graph.stored[name], np.int64(op.indices)
    if op.axis % rank == rank - 1:
        return graph.node("Gather", [x, indices], axis=graph.places(name, [op.axis])[0])
    # Runtimes copy what stands together behind the axis: best if the channels do.
    x = graph.node("Gather", [graph.last_channels(x, rank), indices], axis=1 + op.axis % rank)
    return graph.first_channels(x, rank)


def _function(graph, op):
    encodings = [graph.encoding(name) for name in (*op.inputs, op.output)]
    # Of a sigmoid of integers ONNX Runtime has a kernel; any other is a table.
    if None in encodings or op.kind == "logistic":
        return graph.store(expression(graph, op), op)
    table, shape = arithmetic.table(op.steps, op.constants, *encodings), graph.shape(op.output)
    # Channels last, as ONNX Runtime has them around its convolutions.
    index = graph.cast(graph.last_channels(graph.stored[op.inputs[0]], len(shape)), np.int32)
    if table.ndim == 2:
        index = graph.node("Add", [index, np.int32(256 * np.arange(table.shape[1]))])
    # Along one axis ONNX Runtime looks up faster than with its Gather.
    index = graph.node("Reshape", [index, np.int64([-1])])
    found = graph.node("GatherElements", [table.T.ravel(), index], axis=0)
    return graph.first_channels(graph.node("Reshape", [found, np.int64([-1, *shape])]), len(shape))


def _softmax(graph, op):
    (axis,), x = graph.places(op.output, [op.axis]), graph.floats(op.inputs[0])
    if graph.kind(x) == "DequantizeLinear":
        # Between integers ONNX Runtime would take a kernel that is up to a step off.
        x = graph.node("Clip", [x, np.finfo(np.float32).min])
    return graph.store(graph.node("Softmax", [x], axis=axis), op)


def _normalize(graph, op):
    (name,), shape = op.inputs, graph.shape(op.inputs[0])
    x, axes = graph.floats(name), graph.places(name, op.axes)
    if len(shape) == 2:  # OpenVINO's integer ReduceMean of three axes is wrong
        x = graph.node("Reshape", [x, np.int64([0, *shape, 1])])
    centred = graph.node("Sub", [x, graph.reduce("ReduceMean", x, axes, 1)])
    squares = graph.node("Mul", [centred, centred])
    variance = graph.reduce("ReduceMean", squares, axes, 1)
    variance = graph.node("Add", [variance, np.float32(op.epsilon)])
    y = graph.node("Div", [centred, graph.node("Sqrt", [variance])])
    if len(shape) == 2:
        y = graph.node("Reshape", [y, np.int64([0, *shape])])
    return graph.store(y, op)


def _constant(graph, op):
    encoding = graph.encoding(op.output)
    value = operations.compute(op, [], [], encoding)
    order = [0, *(axis + 1 for axis in axis_order(len(graph.shape(op.output))))]
    return graph.constant(np.asarray(value).transpose(order))


def _refused(graph, op):
    raise op.refused("ONNX")


RULES = {
    p.Conv: _conv,
    p.Dense: _dense,
    p.MatMul: _matmul,
    p.Add: lambda graph, op: _of_floats("Sub" if op.minus else "Add")(graph, op),
    p.Multiply: _of_floats("Mul"),
    p.Maximum: _of_floats("Max"),
    p.Minimum: _of_floats("Min"),
    p.Clip: lambda graph, op: _reencoded(graph, op, (op.low, op.high)),
    p.Function: _function,
    p.Mean: _mean,
    p.Largest: _largest,
    p.MaxPool: _max_pool,
    p.AveragePool: _average_pool,
    p.Concatenate: _concatenate,
    p.Reshape: _reshape,
    p.Transpose: _transpose,
    p.Broadcast: _broadcast,
    p.Pad: _pad,
    p.Slice: _slice,
    p.Gather: _gather,
    p.Softmax: _softmax,
    p.Normalize: _normalize,
    p.Constant: _constant,
    p.Convert: _convert,
    p.Call: _refused,
}
"""{class of operation: rule}."""
