"""What tells whether something is as it was made: a digest of arrays, and JSON with its own."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from hybrid_jax.core import paths
from hybrid_jax.core.files import as_path, write_json


class Damaged(ValueError):
    """What was read is not as it was written."""


def digest(tree: Any) -> str:
    """Returns 64 hexadecimal digits that change with any leaf, its path, dtype, shape or bits.

    Example:
      >>> digest({'w': np.zeros(2)}) == digest({'w': np.zeros(2)}), digest({'w': np.ones(2)})[:8]
      (True, 'dbca9d6c')
    """
    found = hashlib.sha256()
    for path, leaf in sorted(paths.flatten_paths(jax.device_get(tree)).items()):
        found.update(f"{path} {leaf.dtype} {leaf.shape}".lstrip().encode())
        found.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return found.hexdigest()


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what JSON keeps of `value`, with the SHA-256 of its text as 'sha256'."""
    value = json.loads(json.dumps(value))
    return value | {"sha256": _of_text(value)}


def unseal(value: Any) -> dict[str, Any]:
    """Returns what was given to `seal`.

    Raises:
      Damaged: If it is anything else.

    Example:
      >>> unseal(seal({'a': 1}) | {'a': 2})
      Traceback (most recent call last):
      ...
      hybrid_jax.core.sealed.Damaged: the content is not that of its sha256: it was changed
    """
    if not isinstance(value, dict) or "sha256" not in value:
        raise Damaged(f"there must be an object with its sha256, got {value!r:.80}")
    content = {key: own for key, own in value.items() if key != "sha256"}
    if value["sha256"] != _of_text(content):
        raise Damaged("the content is not that of its sha256: it was changed")
    return content


def write_sealed(path: str | os.PathLike, value: Mapping[str, Any]) -> None:
    """Writes an object as JSON with its own digest, whole or not at all."""
    write_json(path, seal(value))


def read_sealed(path: str | os.PathLike) -> dict[str, Any]:
    """Reads what `write_sealed` wrote.

    Raises:
      Damaged: If it was changed since, or is another file.
      OSError: If it cannot be read.
    """
    try:
        return unseal(json.loads(as_path(path).read_bytes()))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} must be as it was written, got: {error}") from None


def _of_text(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
