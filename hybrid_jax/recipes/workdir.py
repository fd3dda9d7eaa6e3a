"""The work directory: whose run it holds, what is done in it, and how long each stage took."""

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator

from ml_collections import ConfigDict

from hybrid_jax import core
from hybrid_jax.recipes import config as configuration


def claim(path: str | pathlib.Path, config: ConfigDict) -> pathlib.Path:
    """Makes `path` the directory of a run of `config`, or takes up the run of it that is there.

    Nothing is changed if it holds another config's run, or files that are no run of ours.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"workdir must be a directory, got the file {path}")
    ours, stored = configuration.flatten(config), path / "config.json"
    if stored.exists():
        theirs = json.loads(stored.read_text())
        for key in {**ours, **theirs}:
            if ours.get(key) != theirs.get(key):
                raise ValueError(
                    f"workdir must be empty or hold a run of the same config, got {path} with "
                    f"config.{key}={theirs.get(key)!r} where this config has {ours.get(key)!r}"
                )
        return path
    if path.exists() and (there := sorted(p.name for p in path.iterdir())):
        raise ValueError(
            f"workdir must be empty or hold a run of the same config, got {path} with {there[0]}"
        )
    core.write_json(stored, ours)
    return path


@contextlib.contextmanager
def stage(path: pathlib.Path, name: str) -> Iterator[None]:
    """Times a stage; a stage that was done in an earlier process keeps its time."""
    start = time.perf_counter()
    yield
    done = seconds(path)
    if name not in done:
        core.write_json(path / "seconds.json", done | {name: round(time.perf_counter() - start, 2)})


def seconds(path: pathlib.Path) -> dict[str, float]:
    """Returns the seconds of each stage that is done."""
    file = path / "seconds.json"
    return json.loads(file.read_text()) if file.exists() else {}
