"""The packed file: a program in a safetensors file, each integer array in the bits that it needs.

Any reader of safetensors opens it, and reading runs no code of the file. It holds three tensors:

* 'graph', uint8: JSON under zlib. A dataclass or named tuple is {"is": its class, field: value, …};
  a dict {"is": "dict", "items": [[key, value], …]}; a tuple a list; infinity is Infinity, as Python
  writes it. An array of floats is {"is": "float32", "shape": […]}, one of integers has beside its
  dtype and shape "bits" b, "low" and "step", and stands for low + step · q with q of b bits.
* 'float32': the entries of all float arrays, in C order, array after array as the graph has them.
* 'bits', uint8: likewise the q of all integer arrays, as `pack_bits` lays them.

Its metadata is {FORMAT: SHA-256 of the file with 64 zeros in the digest's place}, so that whatever
byte is damaged, reading is an error. Against an adversary no checksum inside a file helps; compare
the SHA-256 of the manifest, got from where you trust.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import types
import typing
import zlib
from typing import Any

import jax
import numpy as np
from safetensors import numpy as safetensors

from hybrid_jax import core
from hybrid_jax import program as p
from hybrid_jax.deploy import artifact
from hybrid_jax.program import edges

FORMAT = "hybrid_jax packed 2"

_DTYPES = ("float32", "int8", "uint8", "int16", "int32", "int64")
_MAX_EDGE = 1 << 28  # entries of a tensor between operations
_hints = functools.cache(typing.get_type_hints)
_DIGEST = re.compile(f'"{FORMAT}":"([0-9a-f]{{64}})"'.encode())


def save_program(path: str | os.PathLike, program: p.Program | p.Choice) -> dict[str, Any]:
    """Writes a program to a packed file, from which `load_program` gives back the exact arrays.

    Returned is the manifest beside it, with kind, kernel_bits, bytes and sha256.
    """
    pools = {"float32": [np.zeros(0, np.float32)], "bits": [np.zeros(0, np.uint8)]}
    text = json.dumps(_plain(program, _classes(), pools), separators=(",", ":")).encode()
    stored = zlib.compress(text, 9)
    core.check_integer("bytes of the graph as JSON", len(text), 0, _most_text(stored))
    tensors = {name: np.concatenate(arrays) for name, arrays in pools.items()}
    tensors["graph"] = np.frombuffer(stored, np.uint8)
    data = safetensors.save(tensors, {FORMAT: "0" * 64})
    start, end = _DIGEST.search(data).span(1)
    data = data[:start] + hashlib.sha256(data).hexdigest().encode() + data[end:]
    kernels = (op.weights.values for part in program.parts for op in part.weighted)
    bits = sorted({32 if kernel.dtype == np.float32 else _grid(kernel)[2] for kernel in kernels})
    return artifact.write(path, data, {"kind": FORMAT, "kernel_bits": bits})


def load_program(path: str | os.PathLike) -> p.Program | p.Choice:
    """Reads what `save_program` wrote; no manifest is needed.

    What the file says is checked before it is believed: arrays take at most 64 times the file's
    bytes, values have the types of their fields, and the graph the shapes that it states. All else
    is a ValueError.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from hybrid_jax.program import lower
      >>> program = lower(lambda w, x: x @ w, jnp.eye(2), jnp.ones((1, 2)))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = save_program(f'{folder}/model.safetensors', program)
      ...     loaded = load_program(f'{folder}/model.safetensors')
      >>> print(next(loaded.weighted).weights.values)
      [[1. 0.]
       [0. 1.]]
    """
    path = pathlib.Path(path)
    data = path.read_bytes()
    try:
        _check_digest(data)
        return _program(safetensors.load(data))
    except Exception as error:  # A stranger's file may fail in any way.
        reason = f"{type(error).__name__}: {error}"[:500].removeprefix("ValueError: ")
        raise ValueError(f"{path} must be a file of save_program: {reason}") from None


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """The lowest `bits` of integers (…, n) without gaps, the lowest bit of the first value first.

    It is uint8 (…, ⌈n · bits / 8⌉): each row starts in a byte of its own; zero bits fill its last
    byte.

    Example:
      >>> pack_bits(np.int8([[1, -2, 3]]), 4).tolist()  # 1 is the low half, −2 = 14 the high one
      [[225, 3]]
    """
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    planes = np.unpackbits(little[..., None].view(np.uint8), -1, bits, "little")
    return np.packbits(planes.reshape(*values.shape[:-1], -1), -1, "little")


def _unpack_bits(data, bits, count):
    """The uint32 values, of at most 32 bits, that `pack_bits` packed in one row."""
    planes = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    octets = np.packbits(planes, -1, "little")
    return np.pad(octets, ((0, 0), (0, 4 - octets.shape[1]))).view("<u4").ravel()


def _classes() -> dict[str, type]:
    """{name: class} of all that a program consists of: of its fields, and of theirs."""
    found, new = {}, [p.Program, p.Choice]
    for kind in new:
        described = dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")
        if described and kind.__name__ not in found:
            found[kind.__name__] = kind
            new += [*kind.__subclasses__(), *_types(_hints(kind).values())]
    return found


def _types(hints):
    for hint in hints:
        yield from _types(typing.get_args(hint)) if typing.get_args(hint) else [hint]


def _plain(value, classes, pools):
    """A value as JSON has it; the arrays in it are appended to the pools."""
    kind = type(value)
    if classes.get(kind.__name__) is kind:
        names = getattr(kind, "_fields", None) or [field.name for field in dataclasses.fields(kind)]
        fields = {name: _plain(getattr(value, name), classes, pools) for name in names}
        return {"is": kind.__name__} | fields
    if kind is dict:
        return {"is": "dict", "items": _plain(list(value.items()), classes, pools)}
    if kind in (tuple, list):
        return [_plain(part, classes, pools) for part in value]
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "__array__"):
        return _described(np.asarray(value), pools)
    if isinstance(value, str | int | float | None):
        return value
    raise ValueError(f"a packed program must be of numbers, names and arrays, got {kind.__name__}")


def _described(array, pools):
    kind = core.check_choice("dtype of an array", array.dtype.name, _DTYPES)
    described = {"is": kind, "shape": list(array.shape)}
    if kind == "float32":
        pools[kind].append(array.ravel())
        return described
    low, step, bits = _grid(array)
    pools["bits"].append(pack_bits((array.ravel().astype(np.int64) - low) // step, bits))
    return described | {"bits": bits, "low": low, "step": step}


def _grid(array) -> tuple[int, int, int]:
    """The least of some integers, the step and the bits of the coarsest grid that holds all."""
    if not array.size:
        return 0, 1, 1
    low, high = int(array.min()), int(array.max())
    core.check_integer("span of the integers of an array", high - low, 0, (1 << 32) - 1)
    step = int(np.gcd.reduce(array.ravel().astype(np.int64) - low)) or 1
    return low, step, max(((high - low) // step).bit_length(), 1)


def _check_digest(data):
    found = _DIGEST.search(data)
    if not found:
        raise ValueError(f"its metadata must have a SHA-256 under {FORMAT!r}")
    start, end = found.span(1)
    digest = hashlib.sha256(data[:start] + b"0" * 64 + data[end:]).hexdigest()
    if digest != (said := found[1].decode()):
        raise ValueError(f"its SHA-256 must be {said}, got {digest}; it was changed or damaged")


def _most_text(stored):
    """Bytes of JSON to inflate: some 10,000 operations; of a real graph they are 10 to 50 times."""
    return min(1 << 22, 256 * len(stored))


def _program(tensors):
    for name, dtype in {"graph": "uint8", "float32": "float32", "bits": "uint8"}.items():
        if name not in tensors or (tensors[name].dtype, tensors[name].ndim) != (dtype, 1):
            raise ValueError(f"there must be a vector {name!r} of {dtype}")
    stored, stream = tensors.pop("graph").tobytes(), zlib.decompressobj()
    text = stream.decompress(stored, most := _most_text(stored))
    if not stream.eof:
        raise ValueError(f"the graph must be a zlib stream of at most {most} bytes")
    program = _restored(json.loads(text), _classes(), tensors)
    if not isinstance(program, p.Program | p.Choice):
        raise ValueError(f"the graph must be a Program or a choice, got {type(program).__name__}")
    if left := sum(pool.size for pool in tensors.values()):
        raise ValueError(f"every entry must be that of an array, got {left} more")
    for part in program.written:
        _check_graph(part)
    return program


def _restored(value, classes, pools):
    """What `_plain` described; the arrays are taken from the front of the pools."""
    if isinstance(value, list):
        return tuple(_restored(part, classes, pools) for part in value)
    if not isinstance(value, dict):
        return value
    kind = value.pop("is", None)
    core.check_choice("'is' in the graph", kind, [*classes, *_DTYPES, "dict"])
    if kind in _DTYPES:
        return _array(kind, pools, **value)
    fields = {name: _restored(part, classes, pools) for name, part in value.items()}
    if kind == "dict":
        return dict(fields["items"])
    hints = _hints(classes[kind])
    for name, part in fields.items():
        if name in hints and not _fits(part, hints[name]):
            raise ValueError(f"{name} of {kind} must be {hints[name]}, got {part!r:.80}")
    return classes[kind](**fields)


def _array(kind, pools, shape, bits=32, low=0, step=1):
    core.check_integer("axes of an array", len(shape), 0, 32)
    for number, least in [*((n, 0) for n in shape), (low, None), (step, 1)]:
        core.check_integer("numbers of an array", number, least)
    size = math.prod(shape)
    if kind == "float32":
        return _taken(pools, kind, size).reshape(shape).copy()
    core.check_integer("bits of an array", bits, 1, 32)
    codes = _unpack_bits(_taken(pools, "bits", -(-size * bits // 8)), bits, size)
    high, limits = low + step * int(codes.max(initial=0)), np.iinfo(kind)
    for end in (low, high):
        core.check_integer("integers of an array", end, limits.min, limits.max)
    return (low + step * codes.astype(np.int64)).astype(kind).reshape(shape)


def _taken(pools, name, count):
    core.check_integer(f"entries of an array in {name!r}", count, 0, pools[name].size)
    taken, pools[name] = np.split(pools[name], [count])
    return taken


def _fits(value, hint) -> bool:
    """Whether a value is of the type of a field."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in parts)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    if hint is Any or not isinstance(value, kind or hint):
        return hint is Any
    if kind is dict:
        return all(_fits(key, parts[0]) and _fits(part, parts[1]) for key, part in value.items())
    if kind is tuple:
        parts = parts[:1] * len(value) if parts[1:] == (...,) else parts
        return len(parts) == len(value) and all(map(_fits, value, parts))
    return True


def _check_graph(program):
    """Refuses a graph that cannot run, or whose shapes are not those stated; runs nothing."""
    known = set(program.inputs)
    for op in program.operations:
        if not known.issuperset(op.inputs) or op.output in known:
            raise ValueError(f"operations must read what was made before, got {op.output!r}")
        known.add(op.output)
    for name in [*program.outputs, *known]:
        entries = math.prod(program.tensors[name].shape)
        core.check_integer(f"entries of tensor {name!r}", entries, 0, _MAX_EDGE)
    given = [program.tensors[name] for name in program.inputs]
    inputs = [jax.ShapeDtypeStruct((1, *own.shape), own.dtype) for own in given]
    made = jax.eval_shape(lambda *inputs: edges(program, inputs), *inputs)
    for name, value in made.items():
        if value.shape[1:] != program.tensors[name].shape:
            raise ValueError(f"tensor {name!r} must have the shape that its operation makes")
