"""The targets: for each how a program is written to a file, and how the file is run here."""

import ctypes
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from hybrid_jax import cost
from hybrid_jax.deploy import artifact, c, c_windows, litert, packed, stablehlo
from hybrid_jax.deploy.onnx_sessions import onnx_session, openvino_session
from hybrid_jax.deploy.onnx_writer import export_onnx
from hybrid_jax.program import fastest, run

Session = Callable[[np.ndarray], np.ndarray]


class Target(NamedTuple):
    """A runtime of devices."""

    suffix: str  # of its files
    # export(path, program, **options) -> manifest. Its 'kernel_bits' are those in which the file
    # holds kernels, [4, 8] where some take 4; what a runtime only computes in integers from more
    # bits is stored in more
    export: Callable[..., dict[str, Any]]
    # session(path, batch, threads) -> fn(*inputs (batch, …)) -> outputs, one array or a tuple, of
    # the dtypes that the file takes and makes. The file is opened as its user opens it, with no
    # option but the number of threads, and not even that where `threads` is None
    session: Callable[..., Session]
    # How its file holds a program, by which bits are chosen within a budget of bytes. C's is exact
    # but for descriptors, of which equal ones are there once and bands of rows have some more; the
    # others are those of ResNets. What they miss is measured
    holds: cost.File = cost.File()


def _stablehlo_export(path, program, **options):
    # The file keeps the forms that its convolutions have: here those that are fastest.
    options = {"forms": fastest(program)} | options
    return stablehlo.export_program(path, program, **options)


def _stablehlo_session(path, batch, threads):
    fn = stablehlo.load(path)
    return lambda *inputs: jax.tree.map(np.asarray, fn(*inputs))


def _of_any_batch(open_session):
    return lambda path, batch, threads: open_session(path, threads)


def _tflite_session(path, batch, threads):
    _, manifest = artifact.read(path, keys=["inputs"])
    fixed = manifest["inputs"][0]["shape"][0] == 1
    return litert.litert_session(path, 1 if fixed else batch, threads)


def _packed_session(path, batch, threads):
    program = packed.load_program(path)
    fn = jax.jit(run(program, fastest(program)))
    return lambda *inputs: jax.tree.map(np.asarray, fn(*inputs))


def _c_session(path, batch, threads):
    """The file compiled for this machine, and called image by image."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise ImportError("a C compiler must be installed to run a C file, got none")
    _, manifest = artifact.read(path, keys=["name", "inputs", "outputs"])
    with tempfile.TemporaryDirectory() as folder:
        library = str(pathlib.Path(folder, "model.so"))
        flags = ["-x", "c", "-O3", "-march=native"]
        command = [compiler, *flags, "-shared", "-fPIC", os.fspath(path), "-o", library, "-lm"]
        subprocess.run(command, check=True, capture_output=True)
        function = getattr(ctypes.CDLL(library), f"{manifest['name']}_run")
    taken = [facts["dtype"] for facts in manifest["inputs"]]
    made = [(facts["shape"][1:], facts["dtype"]) for facts in manifest["outputs"]]

    def fn(*inputs):
        inputs = [np.ascontiguousarray(x, dtype) for x, dtype in zip(inputs, taken, strict=True)]
        outputs = [np.empty((len(inputs[0]), *shape), dtype) for shape, dtype in made]
        for i in range(len(inputs[0])):
            rows = (array[i : i + 1] for array in (*inputs, *outputs))
            function(*(ctypes.c_void_p(row.ctypes.data) for row in rows))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return fn


_FEW = (4, 8)
_ONNX = cost.File(_FEW, layer=480, channel=2, overhead=850)
_TFLITE = cost.File((8,), layer=440, channel=18, overhead=4100)
_C = cost.File(_FEW, layer=96, scratch=c_windows.scratch)

TARGETS: dict[str, Target] = {
    "stablehlo": Target(
        ".stablehlo", _stablehlo_export, _stablehlo_session, cost.File((8,), layer=1800)
    ),
    "onnx": Target(".onnx", export_onnx, _of_any_batch(onnx_session), _ONNX),
    "openvino": Target(".openvino.onnx", export_onnx, _of_any_batch(openvino_session), _ONNX),
    "tflite": Target(".tflite", litert.export_litert, _tflite_session, _TFLITE),
    "packed": Target(
        ".safetensors", packed.save_program, _packed_session, cost.File(layer=40, overhead=940)
    ),
    "c": Target(".c", c.export_c, _c_session, _C),
}
"""The targets by name, open to users; 'openvino' is an ONNX file, run by OpenVINO."""
