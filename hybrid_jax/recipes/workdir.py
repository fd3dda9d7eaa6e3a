"""The work directory: whose run it holds, and that one process alone works in it."""

import contextlib
import fcntl
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np

from hybrid_jax import core, data
from hybrid_jax.recipes.schema import completed

ON_DISK = 512
"""Of images that stay on disk, as many tell one data set from another."""

RESULTS = ("deploy.", "evaluation.", "teacher.answers")
"""Keys of the configuration that decide nothing of what is trained."""

FOLDERS = ("stages", "checkpoints", "deploy")
FILES = ("run.json", "splits.json", "choices.json", "records.jsonl", "results.json")
LOCK = ".lock"


def claim(
    path: core.Path, config: Mapping[str, Any], splits: data.Splits, params: Any
) -> contextlib.ExitStack:
    """Makes `path` the directory of a run, or takes up the run that is there.

    A run is its configuration, its images and the weights that it was given. Nothing is changed if
    the directory holds another one, or files that are no run of ours. What a killed process left
    half written is removed.

    Beside it is written, in splits.json, which images are those of training, validation and test.

    Args:
      path: Absent, empty, or of the same run.
      config: {dotted key: value}.
      splits: The images and labels.
      params: The weights that the run begins with, or None where it makes them.

    Returns:
      The lock: until it is closed, or the process ends, no other process can claim the directory.
      In a bucket there is none, and a line says so.

    Raises:
      ValueError: If the directory is not as said, or another process works in it.
    """
    there = _names(path)
    if there and "run.json" not in there:
        raise ValueError(
            f"workdir must be empty or hold a run of the same config, got {path} with {there[0]}"
        )
    with contextlib.ExitStack() as lock:
        try:
            _lock(path, lock)
            _check_kinds(path)
            ours = {
                "config": dict(config),
                "data": digest(splits),
                "weights": "" if params is None else core.digest(params),
            }
            theirs = _compared(path, ours) if there else {"id": uuid.uuid4().hex}
            _check_choices(path / "choices.json")
            for draft in () if core.in_bucket(path) else path.rglob(f".*{core.DRAFT}"):
                draft.unlink()
            core.write_sealed(path / "run.json", ours | {"id": theirs["id"]})
            where = {part: [of, index.tolist()] for part, (of, index) in splits.indices.items()}
            core.write_json(path / "splits.json", where)
        except OSError as error:
            message = f"workdir must be one that can be written, got {path}: {error}"
            raise ValueError(message) from error
        return lock.pop_all()


def _names(path: core.Path) -> list[str]:
    """What is in a work directory, which may be absent, but for drafts that a kill has left."""
    try:
        if not path.exists():
            return []
        if path.is_dir():
            names = sorted(own.name for own in path.iterdir() if own.name != LOCK)
            return [name for name in names if not name.endswith(core.DRAFT)]
    except Exception as error:  # whatever the library of a bucket raises: no access, no such bucket
        raise ValueError(f"workdir must be one that can be read, got {path}: {error}") from error
    raise ValueError(f"workdir must be a directory, got the file {path}")


def _lock(path: core.Path, lock: contextlib.ExitStack) -> None:
    """Makes the directory, and locks it for as long as `lock` lasts."""
    if core.in_bucket(path):
        core.say(f"a bucket has no lock: that no other run works in {path} is yours to see to")
        return
    path.mkdir(parents=True, exist_ok=True)
    file = lock.enter_context((path / LOCK).open("a"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"workdir must be of no run that goes on, got {path}, locked") from None


def whose(path: core.Path) -> str:
    """Returns what tells the run in a directory from others; "" where there is none."""
    try:
        return core.read_sealed(path / "run.json")["id"]
    except (OSError, core.Damaged):
        return ""


def _check_kinds(path):
    """Raises ValueError where there is a file instead of a folder of ours, or the other way."""
    for name in (*FOLDERS, *FILES):
        own, folder = path / name, name in FOLDERS
        if own.exists() and own.is_dir() != folder:
            expected, got = ("folder", "file") if folder else ("file", "folder")
            raise ValueError(f"{own} must be a {expected}, got a {got}: move it away")


def _check_choices(file):
    try:
        if file.exists():
            core.read_sealed(file)
    except core.Damaged as error:
        raise core.Damaged(
            f"{error}; without it the run goes on, with what is measured to be fastest now"
        ) from None


def _compared(path, ours):
    """The run that is there, if it is ours."""
    try:
        theirs = core.read_sealed(path / "run.json")
    except core.Damaged as error:
        raise core.Damaged(f"{error}; whose run this is cannot be told: begin in another") from None
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
    return theirs


def digest(splits: data.Splits) -> str:
    """Returns what tells the images and labels of a run from others."""
    facts = [splits.mean, splits.std, splits.class_names]
    for part in (splits.train, splits.validation, splits.test):
        images = part.images
        if not isinstance(images, np.ndarray):  # on disk: some of them
            images = images[:: -(-len(images) // ON_DISK)]
        facts += [len(part.images), core.digest([images, part.labels])]
    return core.seal({"facts": facts})["sha256"]
