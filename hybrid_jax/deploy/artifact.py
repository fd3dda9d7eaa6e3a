"""A deployed file and the manifest beside it, written so that a failure leaves the old ones."""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybrid_jax import core


def write(path: str | os.PathLike, data: bytes, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes `data` to `path` and its manifest to `path` + '.json'; returns the manifest.

    With a full disk the old pair stays. The folder is made if it is missing. `facts` are what the
    manifest says besides `bytes` and `sha256`, in JSON values.
    """
    manifest = {**facts, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(manifest, indent=2) + "\n"
    core.write_atomically({path: data, manifest_path(path): text.encode()})
    return manifest


def read(
    path: str | os.PathLike, kind: str | None = None, keys: Sequence[str] = ()
) -> tuple[bytes, dict[str, Any]]:
    """Reads what `write` wrote, checked against its manifest: the contents and the manifest.

    The manifest must have the `keys`; of inputs and outputs each has a shape and a dtype.
    """
    path = pathlib.Path(path)
    beside = manifest_path(path)
    data, text = path.read_bytes(), beside.read_bytes()
    try:
        manifest = json.loads(text)
        expected = {"bytes": manifest["bytes"], "sha256": manifest["sha256"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{beside} must be a JSON object with bytes and sha256") from error
    got = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for name, value in expected.items():
        if got[name] != value:
            raise ValueError(
                f"{path} must have {name} {value}, got {got[name]}; it was changed or damaged"
            )
    if kind is not None and manifest.get("kind") != kind:
        raise ValueError(f"{path} must be of kind {kind!r}, got {manifest.get('kind')!r}")
    for key in keys:
        value = manifest.get(key)
        ends = [_is_end(end) for end in value] if isinstance(value, list) else []
        if not (ends and all(ends) if key in ("inputs", "outputs") else isinstance(value, str)):
            raise ValueError(f"{beside} must have {key}, as it was written, got {value!r:.80}")
    return data, manifest


def examples(inputs: Sequence[Any], facts: Sequence[dict[str, Any]]) -> list[np.ndarray]:
    """The inputs (n, …) as arrays, if they have the shapes and dtypes that a manifest says."""
    inputs = [np.asarray(x) for x in inputs]
    wanted = [(tuple(fact["shape"][1:]), fact["dtype"]) for fact in facts]
    alike = [(x.shape[1:], x.dtype.name) for x in inputs] == wanted
    if not alike or len({len(x) for x in inputs}) > 1 or not len(inputs[0]):
        wanted = " and ".join(str(("n", *shape)) + f" {dtype}" for shape, dtype in wanted)
        got = " and ".join(f"{x.shape} {x.dtype}" for x in inputs)
        raise ValueError(f"inputs must be {wanted}, got {got or 'none'}".replace("'n'", "n"))
    return inputs


def _is_end(value):
    """Whether it describes an array of a leading batch axis."""
    if not isinstance(value, dict) or not isinstance(value.get("dtype"), str):
        return False
    shape = value.get("shape")
    return isinstance(shape, list) and bool(shape) and all(type(n) is int for n in shape[1:])


def described(shape: Sequence[Any], dtype: Any) -> dict[str, Any]:
    """What a manifest says of an input or output; a length that is open is a name."""
    lengths = [n if isinstance(n, int) else str(n) for n in shape]
    return {"shape": lengths, "dtype": str(dtype)}


def end_names(
    inputs: Sequence[str],
    outputs: Sequence[str],
    alone: tuple[str, str] = ("x", "y"),
    several: tuple[str, str] = ("", ""),
) -> tuple[list[str], list[str]]:
    """Names in a file of a program's ends: one alone has its own, several those of the edges.

    These follow what is given of several. What is no letter, digit or underscore becomes an
    underscore, and each name stands once.

    Example:
      >>> end_names(['image'], ['a b', 'a_b'])
      (['x'], ['a_b', 'a_b_'])
    """
    found: list[str] = []
    for edges, single, start in zip((inputs, outputs), alone, several, strict=True):
        for edge in edges:
            name = start + edge if len(edges) > 1 else single
            name = re.sub(r"\W|^(?=\d)", "_", name, flags=re.ASCII)
            while name in found:
                name += "_"
            found.append(name)
    return found[: len(inputs)], found[len(inputs) :]


def manifest_path(path: str | os.PathLike) -> pathlib.Path:
    """Where the manifest of `path` lies: beside it, with '.json' behind its name."""
    return pathlib.Path(f"{os.fspath(path)}.json")
