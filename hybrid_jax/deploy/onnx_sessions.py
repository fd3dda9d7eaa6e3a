"""An ONNX file as a function, run by ONNX Runtime or OpenVINO on this machine's processor."""

import os
from collections.abc import Callable

import numpy as np

from hybrid_jax import core
from hybrid_jax.deploy import artifact
from hybrid_jax.deploy.extras import require
from hybrid_jax.deploy.onnx_writer import KIND


def onnx_session(
    file: str | os.PathLike | bytes, threads: int | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """A file run by ONNX Runtime, in a session without options.

    Args:
      file: The path of what `export_onnx` wrote, or the contents of such a file.
      threads: That it may use, the one option that is set; None leaves it to the runtime.

    Returns:
      fn(x) -> y, float32 (n, …) to float32 (n, …), n >= 1.

    Raises:
      ImportError: If the extra `onnx` is not installed.
      FileNotFoundError: If the file or its manifest is missing.
      ValueError: If the file was changed or damaged, is of another kind, or is none that this
        ONNX Runtime takes, as one of a newer opset; `fn` if the shape of x does not fit.

    Example:
      >>> from hybrid_jax.deploy.onnx_writer import to_onnx
      >>> from hybrid_jax.deploy.program import Convert, Dense, Encoding, Program, Tensor, Weights
      >>> weights = Weights(np.int8([[2], [3]]), np.float32([0.5]), np.float32([1.0]), 8)
      >>> tensors = {'x': Tensor((2,)), 'q': Tensor((2,), Encoding(0.25, 128)), 'y': Tensor((1,))}
      >>> steps = (Convert(('x',), 'q'), Dense(('q',), 'y', 'dense', weights))
      >>> model = to_onnx(Program('x', 'y', tensors, steps))
      >>> onnx_session(model.SerializeToString())(np.float32([[1.0, 2.1]]))
      array([[5.]], dtype=float32)
    """
    runtime, data = require("onnxruntime", "onnx"), _contents(file)
    options = runtime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = core.check_integer("threads", threads, 1)
    try:
        session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class of their own
        raise _refusal(f"ONNX Runtime {runtime.__version__}", error) from error
    (x,) = session.get_inputs()
    return _checked(x.shape[1:], lambda images: session.run(None, {x.name: images})[0])


def openvino_session(
    file: str | os.PathLike | bytes, threads: int | None = None, precision: str | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """A file run by OpenVINO; arguments, result and errors are those of `onnx_session`.

    What is not in integers computes in float32, or in bfloat16 where the processor multiplies
    that: such is OpenVINO's default, unless `precision` is 'f32'. Its package tells its makers of
    its use, unless the variable CI is 'true' or its command `opt_in_out --opt_out` was given.

    Raises:
      ImportError: If the extra `openvino` is not installed.
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
    shape = [axis.get_length() for axis in list(compiled.input(0).partial_shape)[1:]]
    return _checked(shape, lambda images: compiled(images)[0])


def _contents(file):
    if isinstance(file, bytes):
        return file
    data, manifest = artifact.read(file)
    if manifest.get("kind") != KIND:
        raise ValueError(f"{file} must be of kind {KIND!r}, got {manifest.get('kind')!r}")
    return data


def _refusal(runtime, error):
    return ValueError(f"file must be a model that {runtime} takes: {error}")


def _checked(shape, run):
    def fn(x):
        images = np.asarray(x, np.float32)
        if not len(images) or list(images.shape[1:]) != list(shape):
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"x must have shape (n, {wanted}) with n >= 1, got {images.shape}")
        return run(images)

    return fn
