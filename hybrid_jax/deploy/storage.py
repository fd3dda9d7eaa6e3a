"""Programs in packed files: the graph as metadata, the weights in the bits that they need."""

import dataclasses
import math
import os
from typing import Any

import jax
import numpy as np

from hybrid_jax import core
from hybrid_jax.deploy import packed, reference
from hybrid_jax.deploy import program as graph
from hybrid_jax.deploy.program import Conv, Dense, Encoding, Mixture, Program, Weights
from hybrid_jax.quantization import integer_step

_OPERATIONS = {
    kind.__name__: kind
    for kind in vars(graph).values()
    if isinstance(kind, type) and issubclass(kind, graph.Operation) and kind is not graph.Operation
}


def save_program(
    path: str | os.PathLike, program: Program | Mixture, *, compress: bool = False
) -> dict[str, Any]:
    """Writes a program to a packed file, from which `load_program` gives back the exact integers.

    The file's metadata is the graph; its tensors are '0/<site>/kernel', '0/<site>/bias' and so on,
    the number being that of the program: of a mixture 0 is the gate, 1 the first expert.

    Args:
      path: Target; the manifest is `path` + '.json'. With a full disk the old file stays.
      program: In floats, in integers or mixed.
      compress: Whether to apply zlib to what it makes smaller.

    Returns:
      The manifest of `packed.save`.
    """
    tensors = {}
    for place, part in enumerate(program.parts):
        for op in part.weighted:
            tensors[f"{place}/{op.name}/kernel"] = _packed_kernel(op.weights)
            tensors[f"{place}/{op.name}/bias"] = packed.Tensor(op.weights.bias)
    metadata = {"programs": [_description(part) for part in program.parts]}
    return packed.save(path, tensors, metadata, compress=compress)


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
    tensors, metadata = packed.load(path, max_bytes)
    try:
        programs = [
            _program(text, tensors, place) for place, text in enumerate(metadata["programs"])
        ]
        for part in programs:
            _check(part)
        return programs[0] if len(programs) == 1 else Mixture(programs[0], tuple(programs[1:]))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path} must hold a program as save_program writes it: {error}") from None


def _packed_kernel(weights):
    rows = (weights.values.ndim - 1,)
    if weights.scale is None:
        return packed.Tensor(weights.values, rows=rows)
    step = integer_step(weights.bits)
    scale = weights.scale.reshape((1,) * (weights.values.ndim - 1) + (-1,)) * np.float32(step)
    # Signs are −1 and 1, which no integer of one bit has.
    values = weights.values > 0 if weights.bits == 1 else weights.values // step
    return packed.Tensor(values, weights.bits, rows, scale)


def _kernel(kernel, bias):
    values, scale = np.asarray(kernel.values), kernel.scale
    if scale is None:
        return Weights(values, None, np.asarray(bias.values))
    if values.dtype == bool:
        values = 2 * values.astype(np.int8) - 1
    bits = core.check_integer("bits of a kernel", kernel.bits or 8, 1, 8)
    step = integer_step(bits)
    scale = np.asarray(scale).reshape(-1) / np.float32(step)
    return Weights(values * np.int8(step), scale, np.asarray(bias.values), bits)


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


def _program(text, tensors, place):
    operations = []
    for entry in text["operations"]:
        fields = {name: _restored(value) for name, value in entry.items() if name != "kind"}
        kind = _OPERATIONS[entry["kind"]]
        if kind in (Conv, Dense):
            own = f"{place}/{fields['name']}"
            fields["weights"] = _kernel(tensors[f"{own}/kernel"], tensors[f"{own}/bias"])
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
