"""Files written whole or not at all, and where a machine keeps what later runs can use again."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any


def write_atomically(contents: Mapping[str | os.PathLike, bytes]) -> None:
    """Writes files, {path: content}, so that a reader finds the old ones or the new, never a part.

    All are first written whole beside their targets, on the disk, and then moved over them: with a
    full disk all old ones stay. Missing folders are made.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_atomically({f'{folder}/new/a': b'one', f'{folder}/b': b'two'})
      ...     pathlib.Path(folder, 'new', 'a').read_bytes()
      b'one'
    """
    drafts = {}
    try:
        for path, content in contents.items():
            path = pathlib.Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            drafts[path] = path.with_name(f".{path.name}.{os.getpid()}")
            with open(drafts[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, draft in drafts.items():
            draft.replace(path)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON, as `write_atomically` does."""
    write_atomically({path: (json.dumps(value, indent=1) + "\n").encode()})


def cache_folder() -> pathlib.Path:
    """Returns the folder of compiled programs and measured choices; it need not exist yet.

    It is what the environment variable HYBRID_JAX_CACHE says, otherwise hybrid_jax in the user's
    own cache: in XDG_CACHE_HOME, or in ~/.cache. Nothing is lost but time when it is deleted.

    Source: XDG Base Directory Specification, which has relative paths passed over.

    Example:
      >>> import unittest.mock
      >>> with unittest.mock.patch.dict(os.environ, HYBRID_JAX_CACHE='/scratch/mine'):
      ...     cache_folder().as_posix()
      '/scratch/mine'
    """
    if own := os.environ.get("HYBRID_JAX_CACHE"):
        return pathlib.Path(own).expanduser()
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (
        caches if caches.is_absolute() else pathlib.Path("~/.cache").expanduser()
    ) / "hybrid_jax"
