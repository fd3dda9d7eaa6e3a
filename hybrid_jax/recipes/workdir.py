"""The work directory: whose run it holds."""

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from hybrid_jax import core, data
from hybrid_jax.recipes.schema import completed

ON_DISK = 512
"""Of images that stay on disk, as many tell one data set from another."""

RESULTS = ("deploy.", "evaluation.")
"""Keys of the configuration that decide nothing of what is trained."""


def claim(path: pathlib.Path, config: Mapping[str, Any], splits: data.Splits, params: Any) -> None:
    """Makes `path` the directory of a run, or takes up the run that is there.

    A run is its configuration, its images and the weights that it was given. Nothing is changed if
    the directory holds another one, or files that are no run of ours.

    Beside it is written, in splits.json, which images are those of training, validation and test.

    Args:
      path: Absent, empty, or of the same run.
      config: {dotted key: value}.
      splits: The images and labels.
      params: The weights that the run begins with, or None where it makes them.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"workdir must be a directory, got the file {path}")
    ours = {"config": dict(config), "data": _digest(splits), "weights": digest(params)}
    stored = path / "run.json"
    if stored.exists():
        try:
            theirs = json.loads(stored.read_text())
            _compare(path, ours, theirs)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{stored} must say whose run this is, got: {error}") from None
    elif path.exists() and (there := sorted(p.name for p in path.iterdir())):
        raise ValueError(
            f"workdir must be empty or hold a run of the same config, got {path} with {there[0]}"
        )
    try:
        core.write_json(stored, ours)
    except OSError as error:
        raise ValueError(f"workdir must be one that can be written, got {path}: {error}") from error
    where = {part: [of, index.tolist()] for part, (of, index) in splits.indices.items()}
    core.write_json(path / "splits.json", where)


def _compare(path, ours, theirs) -> None:
    a, b = completed(ours["config"]), completed(theirs["config"])
    for key in {**a, **b}:
        if not key.startswith(RESULTS) and a.get(key) != b.get(key):
            raise ValueError(
                f"workdir must be empty or hold a run of the same config, got {path} with "
                f"config.{key}={b.get(key)!r} where this config has {a.get(key)!r}"
            )
    for what, name in (("data", "images and labels"), ("weights", "given weights")):
        if ours[what] != theirs[what]:
            raise ValueError(
                f"workdir must hold a run of the same {what}, got {path}, of other {name}"
            )


def _digest(splits: data.Splits) -> str:
    found = hashlib.sha256(repr((splits.mean, splits.std, splits.class_names)).encode())
    for part in (splits.train, splits.validation, splits.test):
        images = part.images
        if not isinstance(images, np.ndarray):  # on disk: some of them
            images = images[:: -(-len(images) // ON_DISK)]
        for array in map(np.ascontiguousarray, (images, part.labels)):
            found.update(f"{len(part.images)} {array.dtype} {array.shape}".encode())
            found.update(memoryview(array).cast("B"))
    return found.hexdigest()


def digest(tree: Any) -> str:
    """Returns a digest of every leaf of a pytree and of its path; "" of None."""
    if tree is None:
        return ""
    found = hashlib.sha256()
    for path, leaf in core.flatten_paths(jax.device_get(tree)).items():
        found.update(
            f"{path} {leaf.dtype} {leaf.shape}".encode() + np.ascontiguousarray(leaf).tobytes()
        )
    return found.hexdigest()
