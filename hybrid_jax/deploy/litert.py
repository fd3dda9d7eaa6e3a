"""LiteRT: a program as a .tflite flatbuffer of int8 operations, for phones and small boards.

`litert_marks` turns the program into a JAX function with marks, `litert-converter` makes a
flatbuffer of its StableHLO: an integer tensor for each mark, one integer operation for what lies
between. The file holds the integers of the program, activations moved into the range of int8.

LiteRT's XNNPACK kernels return the integers of `reference.run` to the bit, with these exceptions of
one step at most: an addition whose sum is all but halfway between two integers; 'exp'; 'logistic'
and 'tanh' in another encoding than LiteRT's own, 1/256 and 1/128 a step; and a range of 255
integers, whose lower end LiteRT takes one lower. An operation from integers to floats, as the last
layer, computes in floats, from a kernel stored in int8.

Kernels of fewer than 8 bits are stored in int8 too. The converter would write those of 4 bits as
int4, but XNNPACK has no convolution of them, and LiteRT's own takes about twice the time and rounds
otherwise.
"""

import importlib.metadata
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core
from hybrid_jax.deploy import artifact
from hybrid_jax.deploy.extras import require
from hybrid_jax.deploy.litert_marks import MARK, evaluate, mark, marked
from hybrid_jax.deploy.program import Mixture, Program, kernel_bits

KIND = "litert"

_PROGRAM, _GATE, _EXPERT = "serving_default", "gate", "expert_{}"


def to_litert(program: Program | Mixture) -> bytes:
    """A flatbuffer of the program, for one image; `litert_session` runs more at a time.

    Its signature is 'serving_default', from 'x' to 'y'. A mixture has one signature for the gate,
    'gate', and one for each expert, 'expert_0', 'expert_1', …: who runs it calls the gate, and then
    the expert of its largest output. (Inside a branch of one graph LiteRT would not use XNNPACK.)

    Args:
      program: In floats, in integers or mixed.

    Returns:
      The contents of a .tflite file, float32 (1, …) to float32 (1, …).

    Raises:
      ImportError: If the extra `litert` is not installed.
      ValueError: If LiteRT's converter refuses the program, with the operation that it refuses; or
        if an accumulator may leave int32.

    Example:
      >>> from hybrid_jax.deploy.program import Convert, Dense, Encoding, Tensor, Weights
      >>> weights = Weights(np.int8([[2], [3]]), np.float32([0.5]), np.float32([1.0]), 8)
      >>> tensors = {'x': Tensor((2,)), 'q': Tensor((2,), Encoding(0.25, 128)), 'y': Tensor((1,))}
      >>> steps = (Convert(('x',), 'q'), Dense(('q',), 'y', 'dense', weights))
      >>> data = to_litert(Program('x', 'y', tensors, steps))
      >>> litert_session(data)(np.float32([[1.0, 2.1]]))
      array([[5.]], dtype=float32)
    """
    parts = _parts(program)
    try:
        return _to_flatbuffer(
            {name: (marked(part), [part.tensors[part.input].shape]) for name, part in parts.items()}
        )
    except _RefusalError as error:
        for part in parts.values():
            for op in part.operations:
                _check_converts(part, op)
        raise ValueError(f"program must be one that LiteRT's converter takes: {error}") from error


def export_litert(path: str | os.PathLike, program: Program | Mixture) -> dict[str, Any]:
    """Writes `to_litert(program)` to `path` and a manifest to `path` + '.json'.

    Returns:
      The manifest: kind, litert_converter (its version), signatures, inputs and outputs (lists of
      shape and dtype, a batch that can be resized written 'b'), kernel_bits, bytes and sha256.

    Raises:
      ImportError, ValueError: As `to_litert`.
      OSError: If it cannot be written; what was there stays.
    """
    data = to_litert(program)
    batch = 1 if isinstance(program, Mixture) else "b"
    x, y = (
        {"shape": [batch, *shape], "dtype": "float32"}
        for shape in (program.input_shape, program.output_shape)
    )
    facts = {
        "kind": KIND,
        "litert_converter": importlib.metadata.version("litert-converter"),
        "signatures": list(_parts(program)),
        "inputs": [x],
        "outputs": [y],
        "kernel_bits": kernel_bits(program),
    }
    return artifact.write(path, data, facts)


def litert_session(
    file: str | os.PathLike | bytes, batch: int = 1, threads: int | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """A flatbuffer as a function, run by LiteRT's interpreter on its XNNPACK kernels.

    Args:
      file: What `to_litert` returned, or the path of what `export_litert` wrote.
      batch: Images of one call of the interpreter; 1 for a mixture.
      threads: That the interpreter may use; None leaves it to the runtime.

    Returns:
      fn(x) -> y, float32 (n · batch, …) to float32 (n · batch, …). As in `reference.run`, a NaN in
      the output of a gate makes the result of its image NaN.

    Raises:
      ImportError: If the extra `litert` is not installed.
      FileNotFoundError: If the file or its manifest is missing.
      ValueError: If the file is damaged or of another kind, or the batch or the shape of x does
        not fit.
    """
    core.check_integer("batch", batch, 1)
    interpreter = interpret(file, threads)
    runners = {
        name: interpreter.get_signature_runner(name) for name in interpreter.get_signature_list()
    }
    if _GATE in runners and batch > 1:
        raise ValueError(f"batch must be 1 for a mixture, got {batch}")
    details = next(iter(runners.values())).get_input_details()
    shape = (batch, *(int(size) for size in details["x"]["shape"][1:]))

    def one_batch(x):
        if _GATE not in runners:
            return runners[_PROGRAM](x=x)["y"]
        (scores,) = runners[_GATE](x=x)["y"]
        y = runners[_EXPERT.format(np.argmax(scores))](x=x)["y"]
        return np.where(np.isnan(scores).any(), np.float32(np.nan), y)

    def fn(x):
        x = np.asarray(x, np.float32)
        if x.shape[1:] != shape[1:] or not len(x) or len(x) % batch:
            raise ValueError(f"x must have shape {shape} or a multiple of its batch, got {x.shape}")
        return np.concatenate([one_batch(part) for part in np.split(x, len(x) // batch)])

    return fn


def interpret(file: str | os.PathLike | bytes, threads: int | None = None) -> Any:
    """The `ai_edge_litert.interpreter.Interpreter` of what `litert_session` takes."""
    if threads is not None:
        core.check_integer("threads", threads, 1)
    if not isinstance(file, bytes):
        file, manifest = artifact.read(path := file)
        if manifest.get("kind") != KIND:
            raise ValueError(f"{path} must be of kind {KIND!r}, got {manifest.get('kind')!r}")
    library = require("ai_edge_litert.interpreter", "litert")
    return library.Interpreter(model_content=file, num_threads=threads)


def _parts(program):
    """{signature: program}."""
    if isinstance(program, Program):
        return {_PROGRAM: program}
    experts = {_EXPERT.format(i): expert for i, expert in enumerate(program.experts)}
    return {_GATE: program.gate, **experts}


class _RefusalError(Exception):
    """What the converter says against a function."""


def _check_converts(program, op):
    """Raises ValueError, naming `op`, if the converter refuses it alone."""

    def fn(*values):
        given = [
            x if (e := program.encoding(name)) is None else mark(x, e)
            for name, x in zip(op.inputs, values)
        ]
        return evaluate(program, op, given)

    try:
        _to_flatbuffer({_PROGRAM: (fn, [program.tensors[name].shape for name in op.inputs])})
    except _RefusalError as error:
        raise ValueError(
            f"program must be of operations that LiteRT's converter takes, got {type(op).__name__} "
            f"of {', '.join(op.inputs)} to {op.output}: {error}"
        ) from error


def _to_flatbuffer(functions):
    """The flatbuffer of {signature: (marked function, shapes of its arrays (1, …))}."""
    ir, passes, api = (
        require(f"litert_converter.{name}", "litert")
        for name in ("mlir.ir", "mlir.passmanager", "converter_api_ext")
    )
    texts = {name: _stablehlo(fn, shapes) for name, (fn, shapes) in functions.items()}
    config = api.ConvertToTFLConfig()
    config.model_origin_framework = "JAX"
    config.qdq_conversion_mode = "STATIC"
    config.strict_qdq_mode = True
    context = ir.Context()
    api.prepare_mlir_context(context)

    def converted(signature, text):
        module = ir.Module.parse(text)
        _each(ir, module, _attach)
        count = len(functions[signature][1])
        api.set_signature(
            module.operation,
            signature_name=signature,
            input_names=[f"x{i or ''}" for i in range(count)],
            output_names=["y"],
        )
        api.run_convert_to_tfl_passes(module, passes.PassManager(), config)
        _each(ir, module, _open_batch)
        _each(ir, module, _name)
        return module

    with context, ir.Location.unknown():
        try:
            modules = [converted(signature, text) for signature, text in texts.items()]
            return api.export_flatbuffer_to_bytes(api.merge_modules(modules).operation)
        except (ValueError, RuntimeError, ir.MLIRError) as error:
            found = re.search("error: (.*)", str(error))
            raise _RefusalError(found[1] if found else str(error).strip()) from error


def _stablehlo(fn, shapes):
    inputs = [jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in shapes]
    lowered = jax.jit(fn).trace(*inputs).lower(lowering_platforms=("cpu",))
    return lowered.as_text(debug_info=True)


def _each(ir, module, change):
    def visit(operation):
        change(ir, operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)


def _attach(ir, operation):
    """Moves what a mark says from the call's options to where the converter looks for it."""
    attributes = operation.attributes
    if (
        operation.name != "stablehlo.custom_call"
        or ir.StringAttr(attributes["call_target_name"]).value != MARK
    ):
        return
    for option in ir.DictAttr(attributes["mhlo.backend_config"]):
        attributes[option.name] = option.attr
    for name in ("mhlo.backend_config", "backend_config", "operand_layouts", "result_layouts"):
        del attributes[name]


def _open_batch(ir, operation):
    """Lets the leading axis of a reshape or slice be what the input's is."""
    if operation.name == "tfl.reshape":
        constant = operation.operands[1].owner.attributes
        shape = np.array(constant["value"])
        shape[:1] = -1
        constant["value"] = ir.DenseElementsAttr.get(shape)
    if operation.name == "tfl.slice":
        operation = _with_strides(ir, operation)
    if operation.name == "tfl.strided_slice":
        attributes = operation.attributes
        for name in ("begin_mask", "end_mask"):
            mask = ir.IntegerAttr(attributes[name])
            attributes[name] = ir.IntegerAttr.get(mask.type, mask.value | 1)


def _with_strides(ir, operation):
    """A slice as one with strides of 1: XNNPACK takes an open axis only by the masks of those."""
    x, begin, size = operation.operands
    starts, sizes = (np.array(value.owner.attributes["value"]) for value in (begin, size))

    def insert(name, kind, operands, attributes):
        place, at = ir.InsertionPoint(operation), operation.location
        return ir.Operation.create(name, [kind], operands, attributes, loc=at, ip=place)

    def constant(array):
        value = ir.DenseElementsAttr.get(array)
        return insert(begin.owner.name, value.type, [], {"value": value}).result

    vectors = map(constant, (starts, starts + sizes, np.ones_like(starts)))
    none = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 0)
    masks = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
    options = {"offset": ir.BoolAttr.get(False)} | dict.fromkeys(masks, none)
    new = insert("tfl.strided_slice", operation.result.type, [x, *vectors], options)
    operation.result.replace_all_uses_with(new.result)
    operation.erase()
    return new


def _name(ir, operation):
    """Names a tensor as the program does, and a constant "#"; long names are a share of a file."""
    found = re.search(r'"jit\(fn\)/([^"]+)/', str(operation.location))  # by its `named_scope`
    if "const" in operation.name:
        operation.location = ir.Location.name("#")
    elif found:
        operation.location = ir.Location.name(found[1])
