"""Programs in packed files: the graph as metadata, the weights in the bits that they need."""

import dataclasses
import json
import math
import os
from typing import Any

import jax
import numpy as np

from hybrid_jax import core
from hybrid_jax.deploy import artifact, packed, packed_header, reference
from hybrid_jax.deploy import program as graph
from hybrid_jax.deploy.program import Conv, Dense, Encoding, Mixture, Program, Weights
from hybrid_jax.quantization import integer_step

_OPERATIONS = {
    kind.__name__: kind
    for kind in vars(graph).values()
    if isinstance(kind, type) and issubclass(kind, graph.Operation) and kind is not graph.Operation
}


_WEIGHTED = (Conv.__name__, Dense.__name__)
_GRAPH, _SCALES, _BIASES = "programs", "scales", "biases"


def save_program(path: str | os.PathLike, program: Program | Mixture) -> dict[str, Any]:
    """Writes a program to a packed file, from which `load_program` gives back the exact integers.

    Its tensors are '0/0', '0/1', …: the kernels of the convolutions and dense layers of program 0
    (of a mixture the gate; 1 is the first expert) in running order, each in its bits; 'scales' and
    'biases', those of all output channels in the same order; and 'programs', the graphs as JSON
    under zlib. Header and graph are a small part of the file: a kernel is named by its place.

    Args:
      path: Target; the manifest is `path` + '.json'. With a full disk the old file stays.
      program: In floats, in integers or mixed.

    Returns:
      The manifest: kind, kernel_bits, bytes and sha256.
    """
    kernels, scales, biases = {}, [], []
    for place, part in enumerate(program.parts):
        for number, op in enumerate(part.weighted):
            kernels[f"{place}/{number}"] = _packed_kernel(op.weights)
            scales.append(_steps(op.weights))
            biases.append(op.weights.bias)
    graphs = json.dumps([_description(part) for part in program.parts], separators=(",", ":"))
    tensors = kernels | {
        _SCALES: packed.Tensor(np.concatenate([np.zeros(0, np.float32), *scales])),
        _BIASES: packed.Tensor(np.concatenate([np.zeros(0, np.float32), *biases])),
        _GRAPH: packed.Tensor(np.frombuffer(graphs.encode(), np.uint8)),
    }
    bits = {kernel.bits or 8 * kernel.values.dtype.itemsize for kernel in kernels.values()}
    facts = {"kind": packed_header.FORMAT, "kernel_bits": sorted(bits)}
    return artifact.write(path, packed.encode(tensors, compress=[_GRAPH]), facts)


def load_program(path: str | os.PathLike, max_bytes: int = packed.MAX_BYTES) -> Program | Mixture:
    """Reads what `save_program` wrote.

    Args:
      path: The file; no manifest is needed.
      max_bytes: As for `packed.load`.

    Raises:
      FileNotFoundError: If there is none.
      ValueError: If it is damaged, hostile, or holds no program.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from hybrid_jax.deploy import lower
      >>> program = lower(lambda w, x: x @ w, jnp.eye(2), None, None, jnp.ones((1, 2)))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = save_program(f'{folder}/model.safetensors', program)
      ...     loaded = load_program(f'{folder}/model.safetensors')
      >>> print(next(loaded.weighted).weights.values)
      [[1. 0.]
       [0. 1.]]
    """
    tensors, _ = packed.load(path, max_bytes)
    try:
        graphs = json.loads(tensors[_GRAPH].values.tobytes())
        weights = _all_weights(tensors, graphs)
        programs = [_program(text, weights) for text in graphs]
        for part in programs:
            _check(part)
        return programs[0] if len(programs) == 1 else Mixture(programs[0], tuple(programs[1:]))
    except (
        KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        raise ValueError(f"{path} must hold a program as save_program writes it: {error}") from None


def _packed_kernel(weights):
    rows = (weights.values.ndim - 1,)
    if weights.scale is None:
        return packed.Tensor(weights.values, rows=rows)
    if weights.bits == 1:  # signs are −1 and 1, which no integer of one bit has
        return packed.Tensor(weights.values > 0, 1, rows)
    return packed.Tensor(weights.values // integer_step(weights.bits), weights.bits, rows)


def _steps(weights):
    """The scales of a kernel as it is packed; none of a float one."""
    if weights.scale is None:
        return np.zeros(0, np.float32)
    return weights.scale * np.float32(integer_step(weights.bits))


def _all_weights(tensors, graphs):
    """Iterates over the weights of all programs, in running order."""
    counts = [sum(op["kind"] in _WEIGHTED for op in text["operations"]) for text in graphs]
    kernels = [tensors[f"{place}/{i}"] for place, count in enumerate(counts) for i in range(count)]
    channels = np.array([kernel.values.shape[-1] for kernel in kernels], int)
    quantized = np.array([kernel.values.dtype != np.float32 for kernel in kernels], int)
    scales = _split(tensors, _SCALES, channels * quantized)
    return map(_weights, kernels, scales, _split(tensors, _BIASES, channels))


def _split(tensors, name, sizes):
    values = np.asarray(tensors[name].values)
    if values.dtype != np.float32 or values.shape != (sum(sizes),):
        raise ValueError(
            f"{name} must be float32 of shape ({sum(sizes)},), got {values.dtype} {values.shape}"
        )
    return np.split(values, np.cumsum(sizes)[:-1])


def _weights(kernel, scale, bias):
    values = np.asarray(kernel.values)
    if values.dtype == np.float32:
        return Weights(values, None, bias)
    if values.dtype == bool:
        values = 2 * values.astype(np.int8) - 1
    bits = core.check_integer("bits of a kernel", kernel.bits, 1, 8)
    step = integer_step(bits)
    return Weights(values * np.int8(step), scale / np.float32(step), bias, bits)


def _description(program):
    """The graph as JSON values."""
    return {
        "input": program.input,
        "output": program.output,
        "tensors": {
            name: [list(t.shape), t.encoding and dataclasses.astuple(t.encoding)]
            for name, t in program.tensors.items()
        },
        "operations": [
            {"kind": type(op).__name__}
            | {
                field.name: _plain(getattr(op, field.name))
                for field in dataclasses.fields(op)
                if field.name != "weights"
            }
            for op in program.operations
        ],
    }


def _plain(value):
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return value.item() if isinstance(value, np.generic) else value


def _restored(value):
    if isinstance(value, list):
        return tuple(_restored(entry) for entry in value)
    return float(value) if value in ("inf", "-inf") else value


def _program(text, weights):
    operations = []
    for entry in text["operations"]:
        fields = {name: _restored(value) for name, value in entry.items() if name != "kind"}
        kind = _OPERATIONS[entry["kind"]]
        if kind.__name__ in _WEIGHTED:
            fields["weights"] = next(weights)
        operations.append(kind(**fields))
    described = {
        name: graph.Tensor(tuple(shape), encoding and Encoding(*encoding))
        for name, (shape, encoding) in text["tensors"].items()
    }
    return Program(text["input"], text["output"], described, tuple(operations))


def _check(program):
    """Refuses a graph that cannot run, or whose shapes are not those stated; runs nothing."""
    known = {program.input}
    for op in program.operations:
        if not known.issuperset(op.inputs) or op.output in known:
            raise ValueError(f"operations must read what was made before, got {op.output!r}")
        known.add(op.output)
    x = jax.ShapeDtypeStruct((1, *program.input_shape), np.float32)
    made = jax.eval_shape(lambda x: reference.trace_tensors(program, x), x)
    for name, value in made.items():
        if value.shape[1:] != program.tensors[name].shape:
            raise ValueError(f"tensor {name!r} must have the shape that its operation makes")
