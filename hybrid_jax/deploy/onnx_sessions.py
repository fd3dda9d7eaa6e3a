"""An ONNX file as a function, run by ONNX Runtime or OpenVINO on this machine's processor."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from hybrid_jax import core
from hybrid_jax.deploy import artifact
from hybrid_jax.deploy.extras import require
from hybrid_jax.deploy.onnx_writer import KIND


def onnx_session(file: str | os.PathLike | bytes, threads: int | None = None) -> Callable[..., Any]:
    """A file run by ONNX Runtime, in a session without options but for `threads`, if given.

    `file` is the path of what `export_onnx` wrote, or the contents of such a file. It is
    fn(*inputs) -> outputs, arrays (n, …) of the file's dtypes, n >= 1; a single one alone.
    """
    runtime, data = require("onnxruntime", "onnx"), _contents(file)
    options = runtime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = core.check_integer("threads", threads, 1)
    try:
        session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class of their own
        raise _refusal(f"ONNX Runtime {runtime.__version__}", error) from error
    # A type is written 'tensor(float)', 'tensor(uint8)'.
    ends = [
        (x.name, x.shape[1:], np.dtype(x.type[7:-1].replace("float", "float32")))
        for x in session.get_inputs()
    ]
    return _checked(ends, lambda arrays: session.run(None, arrays))


def openvino_session(
    file: str | os.PathLike | bytes, threads: int | None = None, precision: str | None = None
) -> Callable[..., Any]:
    """A file run by OpenVINO; arguments, result and errors are those of `onnx_session`.

    An input that nothing in the file reads is none of its function's: OpenVINO leaves it out.
    What is not in integers computes in float32, or in bfloat16 where the processor multiplies
    that: such is OpenVINO's default, unless `precision` is 'f32'. Its package tells its makers of
    its use, unless the variable CI is 'true' or its command `opt_in_out --opt_out` was given.
    """
    openvino, data = require("openvino", "openvino"), _contents(file)
    options = {}
    if precision is not None:
        options["INFERENCE_PRECISION_HINT"] = precision
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = core.check_integer("threads", threads, 1)
    engine = openvino.Core()
    try:
        compiled = engine.compile_model(engine.read_model(data), "CPU", options)
    except RuntimeError as error:
        raise _refusal(f"OpenVINO {openvino.__version__}", error) from error
    ends = [
        (
            x.any_name,
            [axis.get_length() for axis in list(x.partial_shape)[1:]],
            np.dtype(x.element_type.to_dtype()),
        )
        for x in compiled.inputs
    ]
    return _checked(ends, lambda arrays: list(compiled(arrays).to_tuple()))


def _contents(file):
    if isinstance(file, bytes):
        return file
    data, _ = artifact.read(file, KIND)
    return data


def _refusal(runtime, error):
    return ValueError(f"file must be a model that {runtime} takes: {error}")


def _checked(ends, run):
    """fn(*arrays) -> what the runtime makes of them by name; `ends` are (name, shape, dtype)."""

    def fn(*arrays):
        core.check_arrays(ends, arrays, 1)
        pairs = zip(ends, arrays, strict=True)
        given = {name: np.asarray(x, dtype) for (name, _, dtype), x in pairs}
        outputs = run(given)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return fn
