"""ONNX: a program as one file of standard operations, for ONNX Runtime, OpenVINO and their like.

An encoded tensor is a uint8 behind a `QuantizeLinear`. Operations that compute read it through a
`DequantizeLinear`, and runtimes fuse what lies between the two into one integer operation; those
that only move or compare values (maxima, reshapes, slices) work on the uint8 itself. The saturation
of `QuantizeLinear` is the ReLU; other bounds are a `Clip` of the uint8 behind it, which leaves the
fusion as it is. A function of one encoded tensor is a table of 256 entries, but for the sigmoid, of
which ONNX Runtime has a kernel. What has three axes is channels first, as ONNX has images; inputs
and outputs are in the program's order.

A file is right in a session opened with no options, on every processor. x86 without VNNI adds
products of uint8 and int8 in pairs that stop at ±2^15 (`arithmetic.saturates`): kernels of up to 7
bits never reach that, and are stored as int8; those of 8 bits that may are uint8 with zero point
128, for which the runtimes have slower kernels. With `vnni` they are int8, which is right on
processors with VNNI and on Arm alone. Kernels of up to 4 bits are int4 in the file, from opset 21
on, and int8 once it is opened. Kernels that take floats are stored in float32. Where the
runtimes differ from `program.run`: both compute sums, products, concatenations and conversions of
encoded tensors in floats, and may round what lies next to a tie the other way; ONNX Runtime does a
convolution from integers to floats in floats; and OpenVINO leaves a convolution unrounded that it
adds to something, which is where most of its differences in a residual network begin.
"""

import os
from typing import Any

from hybrid_jax import core
from hybrid_jax import program as p
from hybrid_jax.deploy import artifact
from hybrid_jax.deploy.extras import require
from hybrid_jax.deploy.onnx_choice import of_an_image, value_info
from hybrid_jax.deploy.onnx_operations import stored_bits, written

KIND = "onnx"
OLDEST_OPSET = 13  # the first whose QuantizeLinear has a scale for each channel

_BATCH = "N"


def to_onnx(program: p.Program | p.Choice, *, opset: int = 21, vnni: bool = False) -> Any:
    """An ONNX model of the program, for any number of examples.

    It is an `onnx.ModelProto`, checked: input 'x' (N, …) to output 'y' (N, …); of several the names
    are those of the edges, with '_' for what is no letter. Floats are float32, bytes uint8. A
    choice is a loop over the images (`Scan`), which runs for each what that needs. `opset` is from
    13 to the newest that the installed `onnx` knows; with `vnni` kernels of 8 bits are int8, too:
    on x86 faster, and right with VNNI alone.

    Example:
      >>> import numpy as np
      >>> weights = p.Weights(np.int8([[2], [3]]), np.float32([0.5]), np.float32([1.0]), 8)
      >>> tensors = {'x': p.Tensor((2,)), 'q': p.Tensor((2,), p.Encoding(0.25, 128))}
      >>> tensors['y'] = p.Tensor((1,))
      >>> steps = (p.Convert(('x',), 'q'), p.Dense(('q',), 'y', 'dense', weights))
      >>> model = to_onnx(p.Program('x', 'y', tensors, steps))
      >>> [node.op_type for node in model.graph.node if node.op_type != 'DequantizeLinear']
      ['QuantizeLinear', 'Gemm', 'Identity']
    """
    onnx = require("onnx", "onnx")
    core.check_integer("opset", opset, OLDEST_OPSET, onnx.defs.onnx_opset_version())
    options = {"vnni": vnni, "opset": opset}
    first, last = program.parts[0], program.parts[-1]
    names = artifact.end_names(first.inputs, last.outputs)
    if isinstance(program, p.Choice):
        body, constants = of_an_image(onnx, program, options), []
        nodes = [onnx.helper.make_node("Scan", *names, body=body, num_scan_inputs=1)]
    else:
        nodes, constants = written(onnx, program, *names, **options)
    ends = [
        [value_info(onnx, name, part.tensors[edge], (_BATCH,)) for name, edge in zip(titles, edges)]
        for titles, part, edges in zip(names, (first, last), (first.inputs, last.outputs))
    ]
    opsets = [onnx.helper.make_opsetid("", opset)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "program", *ends, constants),
        opset_imports=opsets,
        ir_version=onnx.helper.find_min_ir_version_for(opsets),
        producer_name="hybrid_jax",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def export_onnx(
    path: str | os.PathLike, program: p.Program | p.Choice, *, opset: int = 21, vnni: bool = False
) -> dict[str, Any]:
    """Writes `to_onnx` of the program to `path` and a manifest, returned, to `path` + '.json'.

    It has onnx (its version), opset, vnni, inputs and outputs (lists of shape and dtype, the open
    batch written 'N') and kernel_bits.
    """
    onnx, model = require("onnx", "onnx"), to_onnx(program, opset=opset, vnni=vnni)
    bits = {
        stored_bits(op.weights, part.encoding(op.inputs[0]), opset)
        for part in program.parts
        for op in part.weighted
    }
    facts = {
        "kind": KIND,
        "onnx": onnx.__version__,
        "opset": opset,
        "vnni": vnni,
        "kernel_bits": sorted(bits),
        "inputs": [_describe(onnx, value) for value in model.graph.input],
        "outputs": [_describe(onnx, value) for value in model.graph.output],
    }
    return artifact.write(path, model.SerializeToString(deterministic=True), facts)


def _describe(onnx, value):
    kind = value.type.tensor_type
    shape = [axis.dim_param or axis.dim_value for axis in kind.shape.dim]
    return artifact.described(shape, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
