"""LiteRT: a program as a .tflite flatbuffer of int8 operations, for phones and small boards.

`litert_marks` turns the program into a JAX function with marks, `litert-converter` makes a
flatbuffer of its StableHLO: an integer tensor for each mark, one integer operation for what lies
between. The file holds the integers of the program, activations moved into the range of int8.

LiteRT's XNNPACK kernels return the integers of `program.run` to the bit, with these exceptions of
one step at most: an addition whose sum is all but halfway between two integers; where a value is
all but halfway, what runs in floats between a dequantization and a quantization, as LiteRT has no
integer kernel that is right (functions but for 'logistic' and 'tanh' in LiteRT's own encodings, the
product of two tensors, an average pool that does not count its padding); and a range of 255
integers, whose lower end LiteRT takes one lower. A function that jumps is a table. An operation
from integers to floats, as the last layer, computes in floats, from a kernel stored in int8. An
input of bytes that is quantized is taken as it is.

Kernels of fewer than 8 bits are stored in int8 too. The converter would write those of 4 bits as
int4, but XNNPACK has no convolution of them, and LiteRT's own takes about twice the time and rounds
otherwise.
"""

import collections
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from hybrid_jax import core
from hybrid_jax import program as p
from hybrid_jax.deploy import artifact
from hybrid_jax.deploy.extras import require
from hybrid_jax.deploy.litert_file import RefusalError, Signature, to_flatbuffer
from hybrid_jax.deploy.litert_marks import marked
from hybrid_jax.deploy.litert_operations import evaluate
from hybrid_jax.program import kernel_bits

KIND = "litert"

_PROGRAM, _GATE, _EXPERT, _STAGE = "serving_default", "gate", "expert_{}", "stage_{}"
_OF_STAGE = "x", "before"


def to_litert(program: p.Program | p.Choice) -> bytes:
    """A flatbuffer of the program, for one image or, once its inputs are resized, for any number.

    It is float32 (1, …) to float32 (1, …), or of the dtypes of the program's ends. Its signature is
    'serving_default', from 'x' to 'y'; several inputs or outputs are named as the edges are, with
    '_' for what stands in no name. A choice has a signature for each part: who runs a mixture calls
    'gate', and then of 'expert_0', 'expert_1', … that of its largest output; who runs a cascade
    calls 'stage_0', and the next one where its second output is true, of a cascade with a share
    with the first output as its input 'before'. (Inside a branch of one graph LiteRT would not use
    XNNPACK.)

    Example:
      >>> weights = p.Weights(np.int8([[2], [3]]), np.float32([0.5]), np.float32([1.0]), 8)
      >>> tensors = {'x': p.Tensor((2,)), 'q': p.Tensor((2,), p.Encoding(0.25, 128))}
      >>> tensors['y'] = p.Tensor((1,))
      >>> steps = (p.Convert(('x',), 'q'), p.Dense(('q',), 'y', 'dense', weights))
      >>> data = to_litert(p.Program('x', 'y', tensors, steps))
      >>> litert_session(data)(np.float32([[1.0, 2.1]]))
      array([[5.]], dtype=float32)
    """
    parts = _parts(program)
    try:
        given = () if isinstance(program, p.Program) else _OF_STAGE
        return to_flatbuffer({name: _signature(part, given) for name, part in parts.items()})
    except RefusalError as error:
        for part in parts.values():
            for op in filter(lambda op: op.inputs, part.operations):
                _check_converts(part, op)
        raise ValueError(f"program must be one that LiteRT's converter takes: {error}") from error


def export_litert(path: str | os.PathLike, program: p.Program | p.Choice) -> dict[str, Any]:
    """Writes `to_litert(program)` to `path` and a manifest to `path` + '.json', which is returned.

    It has litert_converter (its version), signatures, inputs and outputs (lists of shape and dtype,
    a batch that can be resized written 'b') and kernel_bits.
    """
    data = to_litert(program)
    batch = "b" if isinstance(program, p.Program) else 1
    part = program if batch == "b" else program.answering[0]
    inputs, outputs = (
        [artifact.described((batch, *own.shape), own.dtype) for own in map(part.tensors.get, names)]
        for names in (part.inputs, part.outputs)
    )
    facts = {
        "kind": KIND,
        "litert_converter": importlib.metadata.version("litert-converter"),
        "signatures": list(_parts(program)),
        "inputs": inputs,
        "outputs": outputs,
        "kernel_bits": kernel_bits(program),
    }
    return artifact.write(path, data, facts)


def litert_session(
    file: str | os.PathLike | bytes, batch: int = 1, threads: int | None = None
) -> Callable[..., Any]:
    """A flatbuffer as a function, run by LiteRT's interpreter on its XNNPACK kernels.

    `file` is what `to_litert` returned, or the path of what `export_litert` wrote; a call of the
    interpreter takes `batch` images, of a choice one, and `threads` are its own choice if None. It
    is fn(*inputs) -> outputs, as `program.run` returns them, (n · batch, …) to (n · batch, …). A
    NaN in the output of a gate makes the result of its image NaN.
    """
    core.check_integer("batch", batch, 1)
    interpreter = interpret(file, threads)
    runners = {
        name: interpreter.get_signature_runner(name) for name in interpreter.get_signature_list()
    }
    if _PROGRAM not in runners and batch > 1:
        raise ValueError(f"batch must be 1 for a mixture or cascade, got {batch}")
    first = next(iter(runners.values()))
    inputs, outputs = _in_order(interpreter, first)
    ends = [(name, d["shape"][1:].tolist(), d["dtype"]) for name, d in inputs.items()]

    def one_batch(*arrays):
        if _PROGRAM in runners:
            found = runners[_PROGRAM](**dict(zip(inputs, arrays, strict=True)))
            return [found[name] for name in outputs]
        if _GATE in runners:
            (scores,) = runners[_GATE](x=arrays[0])["y"]
            y = runners[_EXPERT.format(np.argmax(scores))](x=arrays[0])["y"]
            return [np.where(np.isnan(scores).any(), np.float32(np.nan), y)]
        given = dict(zip(_OF_STAGE, arrays, strict=False))
        for i in range(len(runners)):
            runner = runners[_STAGE.format(i)]
            found = runner(**{name: given[name] for name in runner.get_input_details()}).values()
            (given["before"],) = (value for value in found if value.dtype != bool)
            if not any(value for value in found if value.dtype == bool):
                return [given["before"]]

    def fn(*arrays):
        core.check_arrays(ends, arrays, batch)
        arrays = [np.asarray(x, dtype) for x, (*_, dtype) in zip(arrays, ends, strict=True)]
        split = [np.split(x, len(x) // batch) for x in arrays]
        made = [one_batch(*xs) for xs in zip(*split, strict=True)]
        ys = [np.concatenate(parts) for parts in zip(*made, strict=True)]
        return ys[0] if len(ys) == 1 else tuple(ys)

    return fn


def _in_order(interpreter, runner):
    """{name: details} of a signature's inputs, and of its outputs, as the function has them."""

    def ordered(details, ends):
        places = collections.defaultdict(list)
        for place, end in enumerate(ends):
            places[int(end["index"])].append(place)  # more than one of what is returned twice
        alone = len(details) == 1
        found = {name: 0 if alone else places[d["index"]].pop() for name, d in details.items()}
        return {name: details[name] for name in sorted(found, key=found.get)}

    return (
        ordered(runner.get_input_details(), interpreter.get_input_details()),
        ordered(runner.get_output_details(), interpreter.get_output_details()),
    )


def interpret(file: str | os.PathLike | bytes, threads: int | None = None) -> Any:
    """The `ai_edge_litert.interpreter.Interpreter` of what `litert_session` takes."""
    if threads is not None:
        core.check_integer("threads", threads, 1)
    if not isinstance(file, bytes):
        file, _ = artifact.read(file, KIND)
    library = require("ai_edge_litert.interpreter", "litert")
    return library.Interpreter(model_content=file, num_threads=threads)


def _parts(program):
    if isinstance(program, p.Program):
        return {_PROGRAM: program}
    if isinstance(program, p.Cascade):
        return {_STAGE.format(i): part for i, part in enumerate(program.written)}
    experts = {_EXPERT.format(i): expert for i, expert in enumerate(program.experts)}
    return {_GATE: program.gate, **experts}


def _signature(program, given=()):
    inputs, outputs = artifact.end_names(program.inputs, program.outputs)
    inputs = given[: len(inputs)] or inputs
    kinds = [(t.dtype, t.shape) for t in (program.tensors[name] for name in program.inputs)]
    function = marked(program, evaluate)
    return Signature(function, dict(zip(inputs, kinds, strict=True)), outputs, _longest(program))


def _longest(program):
    sizes = [n for tensor in program.tensors.values() for n in tensor.shape]
    sizes += [n for op in program.weighted for n in op.weights.values.shape]
    sizes += [n for op in program.operations for n in getattr(op, "indices", ())]
    return max(sizes, default=1)


def _check_converts(program, op):
    """Raises ValueError, naming `op`, if the converter refuses it alone."""
    tensors = {name: program.tensors[name] for name in (*op.inputs, op.output)}
    alone = p.Program(tuple(dict.fromkeys(op.inputs)), op.output, tensors, (op,))
    try:
        to_flatbuffer({_PROGRAM: _signature(alone)})
    except RefusalError as error:
        raise ValueError(
            f"program must be of operations that LiteRT's converter takes, got {type(op).__name__} "
            f"of {', '.join(op.inputs)} to {op.output}: {error}"
        ) from error
