"""What each operation of a program becomes in an ONNX graph.

A rule is rule(graph, operation) -> the value that holds the operation's output as it is stored.
Computing operations read their inputs in floats; those that move or compare values, as stored.
"""

from typing import Any

import numpy as np

from hybrid_jax.deploy import arithmetic
from hybrid_jax.deploy.onnx_graph import WHOLE, Graph, arranged, axis_order, pads
from hybrid_jax.deploy.program import (
    UNBOUNDED,
    Add,
    AveragePool,
    Clip,
    Concatenate,
    Conv,
    Convert,
    Dense,
    Encoding,
    Lookup,
    MaxPool,
    Mean,
    Multiply,
    Pad,
    Program,
    Reshape,
    Slice,
    Softmax,
    Transpose,
    Weights,
)
from hybrid_jax.quantization import integer_step

OF_HALVES = 21  # the first opset that casts an int4


def stored_bits(weights: Weights, x: Encoding | None, opset: int) -> int:
    """Bits of each entry of a kernel in the file; what multiplies floats is stored in floats."""
    if x is None:
        return 32
    # Three nodes that make an int8 of it take some 150 bytes.
    pays = weights.values.size >= 512
    return 4 if pays and weights.bits <= 4 and opset >= OF_HALVES else 8


def written(
    onnx: Any, program: Program, x: str, y: str, prefix: str = "", **options: Any
) -> tuple[list, list]:
    """The nodes and constants that make a program's output of its input.

    Args:
      onnx: The module.
      program: The program.
      x: Name of the value that is the input.
      y: Name of the value that will be the output.
      prefix: Of every other name.
      **options: Of `Graph`.

    Raises:
      ValueError: If an operation has no rule, or its rule refuses it.
    """
    graph = Graph(onnx, program, x, prefix, **options)
    for op in program.operations:
        if type(op) not in _RULES:
            known = ", ".join(kind.__name__ for kind in _RULES)
            raise ValueError(
                f"program must be of operations that ONNX is written for ({known}), "
                f"got {type(op).__name__} {op.output!r}"
            )
        graph.stored[op.output] = _RULES[type(op)](graph, op)
    last = onnx.helper.make_node("Identity", [graph.result()], [y])
    return [*graph.nodes, last], graph.constants


def _conv(graph, op):
    kernel, bias = _weights(graph, op, (3, 2, 0, 1))
    y = graph.node(
        "Conv",
        [graph.floats(op.inputs[0]), kernel, bias],
        name=op.name,
        kernel_shape=op.weights.values.shape[:2],
        strides=op.strides,
        pads=pads(op.padding),
        dilations=op.dilation,
        group=op.groups,
    )
    return graph.store(y, op)


def _dense(graph, op):
    kernel, bias = _weights(graph, op, (0, 1))
    x = graph.floats(op.inputs[0])
    return graph.store(graph.node("Gemm", [x, kernel, bias], name=op.name), op)


def _weights(graph, op, order):
    """Kernel and bias in floats; those of an encoded input are stored as integers.

    A kernel whose products with an int8 would saturate on some processors is a uint8.
    """
    weights, encoding = op.weights, graph.encoding(op.inputs[0])
    if encoding is None:
        kernel = weights.values if weights.scale is None else weights.values * weights.scale
        return graph.constant(kernel.transpose(order)), graph.constant(weights.bias)
    kernel, zero = weights.values.transpose(order), np.int8(0)
    if not graph.vnni and arithmetic.saturates(weights, encoding):
        kernel, zero = (kernel.astype(np.int16) + 128).astype(np.uint8), np.uint8(128)
    if stored_bits(weights, encoding, graph.opset) == 4:
        kernel = graph.halves(kernel, integer_step(4))
    else:
        kernel = graph.constant(kernel)
    zeros = graph.constant(np.full(weights.scale.shape, zero))
    step = graph.constant(np.float32(encoding.scale) * weights.scale)
    kernel = [kernel, graph.constant(weights.scale), zeros]
    bias = [graph.constant(arithmetic.integer_bias(weights, encoding)), step]
    return (
        graph.node("DequantizeLinear", kernel, axis=order.index(len(order) - 1)),
        graph.node("DequantizeLinear", bias, axis=0),
    )


def _of_floats(kind):
    def rule(graph, op):
        return graph.store(graph.node(kind, [graph.floats(name) for name in op.inputs]), op)

    return rule


def _max_pool(graph, op):
    if any(max(pair) >= size for pair, size in zip(op.padding, op.window)):
        raise ValueError(
            f"MaxPool {op.output!r} must have padding below its window in ONNX, "
            f"got {op.padding} around {op.window}"
        )
    return _pool(graph, op, "MaxPool", graph.stored[op.inputs[0]], pads=pads(op.padding))


def _average_pool(graph, op):
    name, encoding = op.inputs[0], graph.encoding(op.inputs[0])
    if any(map(any, op.padding)):
        # Padding of the pool itself is the integer 0 in OpenVINO, whatever the zero point.
        padded = graph.pad(graph.stored[name], (*op.padding, (0, 0)), encoding)
        x = graph.dequantize(padded, encoding)
    else:
        x = graph.floats(name)
    return graph.store(_pool(graph, op, "AveragePool", x), op)


def _pool(graph, op, kind, x, **attributes):
    return graph.node(kind, [x], kernel_shape=op.window, strides=op.strides, **attributes)


def _mean(graph, op):
    pooled = graph.node("GlobalAveragePool", [graph.floats(op.inputs[0])])
    # ONNX Runtime's kernels have the channels last: turned so here, it turns nothing.
    return graph.node("Flatten", [graph.transpose(graph.store(pooled, op), (1, 2, 0))])


def _clip(graph, op):
    x, encoding, clip = graph.stored[op.inputs[0]], graph.encoding(op.output), (op.low, op.high)
    if encoding is None:
        return graph.clip(x, clip, np.float32, UNBOUNDED)
    bounds = arithmetic.bounds(encoding, clip)
    return graph.clip(x, bounds, np.uint8, (encoding.low, encoding.high))


def _concatenate(graph, op):
    axis = _place(graph, op, op.axis)
    if {graph.encoding(name) for name in op.inputs} == {graph.encoding(op.output)}:
        return graph.node("Concat", [graph.stored[name] for name in op.inputs], axis=axis)
    floats = [graph.floats(name) for name in op.inputs]
    return graph.store(graph.node("Concat", floats, axis=axis), op)


def _softmax(graph, op):
    return graph.node("Softmax", [graph.stored[op.inputs[0]]], axis=_place(graph, op, -1))


def _place(graph, op, axis):
    """Where an axis of an example of the output stands in ONNX, behind the batch."""
    shape = graph.shape(op.output)
    return 1 + axis_order(shape).index(axis % len(shape))


def _reshape(graph, op):
    x, after = graph.stored[op.inputs[0]], graph.shape(op.output)
    if len(graph.shape(op.inputs[0])) == 3:
        x = graph.transpose(x, (1, 2, 0))
    shape = graph.constant(np.int64([0, *after]))
    return graph.transpose(graph.node("Reshape", [x, shape]), axis_order(after))


def _transpose(graph, op):
    before, after = (axis_order(graph.shape(name)) for name in (op.inputs[0], op.output))
    order = [before.index(op.permutation[axis]) for axis in after]
    return graph.transpose(graph.stored[op.inputs[0]], order)


def _pad(graph, op):
    return graph.pad(graph.stored[op.inputs[0]], op.padding, graph.encoding(op.output))


def _slice(graph, op):
    axes = range(1, len(op.starts) + 1)
    vectors = arranged(op.starts), arranged(op.stops), axes, arranged(op.strides)
    constants = [graph.constant(np.int64(vector)) for vector in vectors]
    return graph.node("Slice", [graph.stored[op.inputs[0]], *constants])


_FUNCTIONS = {"logistic": "Sigmoid", "tanh": "Tanh", "exp": "Exp"}


def _lookup(graph, op):
    return _of_floats(_FUNCTIONS[op.function])(graph, op)


def _convert(graph, op):
    before, after = graph.encoding(op.inputs[0]), graph.encoding(op.output)
    if before == after:
        return graph.stored[op.inputs[0]]
    # From one encoding to another a Clip stands behind, if only of all that there is: of two bare
    # pairs in a row ONNX Runtime makes one of a third scale, with which the next kernel is wrong.
    within = WHOLE if before is None else (None, None)
    return graph.store(graph.floats(op.inputs[0]), op, within)


_RULES = {
    Conv: _conv,
    Dense: _dense,
    Add: _of_floats("Add"),
    Multiply: _of_floats("Mul"),
    Clip: _clip,
    MaxPool: _max_pool,
    AveragePool: _average_pool,
    Mean: _mean,
    Concatenate: _concatenate,
    Reshape: _reshape,
    Transpose: _transpose,
    Pad: _pad,
    Slice: _slice,
    Lookup: _lookup,
    Softmax: _softmax,
    Convert: _convert,
}
