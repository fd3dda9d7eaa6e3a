"""Files written whole or not at all, and where a machine keeps what later runs can use again."""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from hybrid_jax.core import processes

DRAFT = ".draft"
"""How the name of a file ends that is being written; a killed process leaves it."""

Path = pathlib.Path | epath.Path
"""Of this machine, or of a bucket: what both can do is asked of it, and no more."""


def as_path(path: str | os.PathLike, name: str = "path") -> Path:
    """Returns a path of this machine, or, of gs://BUCKET/NAME, in a bucket of Google Cloud Storage.

    Raises:
      ValueError: If it is in a bucket of another kind, where Orbax writes none; says `name`.

    Example:
      >>> as_path('gs://mine/run').parent, in_bucket('gs://mine/run'), in_bucket('run')
      (PosixGPath('gs://mine'), True, False)
    """
    scheme, apart, _ = os.fspath(path).partition("://")
    if apart and scheme != "gs":
        raise ValueError(f"{name} must be on this machine or in a gs:// bucket, got {path}")
    return epath.Path(path) if apart else pathlib.Path(path).expanduser()


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket: there is no lock, nothing to append to, no folder to rename.

    A file appears there whole, in one request, but each by itself.
    """
    return os.fspath(path).startswith("gs://")


def write_atomically(contents: Mapping[str | os.PathLike, bytes]) -> None:
    """Writes {path: content}, all or none: drafts beside their targets first, then moved.

    Of several processes the first one does. In a bucket each is whole or absent, one by one.
    """
    if not processes.is_first():
        return
    drafts = {}
    try:
        for path, content in contents.items():
            path = as_path(path)
            if in_bucket(path):
                path.write_bytes(content)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            drafts[path] = path.with_name(f".{path.name}.{os.getpid()}{DRAFT}")
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


def append(path: str | os.PathLike, content: bytes) -> None:
    """Appends to a file, which in a bucket is written anew; of several processes the first does."""
    path = as_path(path)
    if not processes.is_first():
        return
    if in_bucket(path):
        write_atomically({path: (path.read_bytes() if path.exists() else b"") + content})
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(content)


@contextlib.contextmanager
def on_this_machine(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a folder that other programs can open: this one, or what is in the bucket afterwards.

    That is empty, and comes to be in the bucket when the block ends well.
    """
    if not in_bucket(folder):
        yield pathlib.Path(folder)
        return
    with tempfile.TemporaryDirectory() as own:
        yield pathlib.Path(own)
        made = [file for file in pathlib.Path(own).rglob("*") if file.is_file()]
        bucket = as_path(folder)
        write_atomically({bucket / file.relative_to(own): file.read_bytes() for file in made})


def cache_folder() -> pathlib.Path:
    """Returns the folder of compiled programs and measured choices; it need not exist yet.

    It is what the environment variable HYBRID_JAX_CACHE says, otherwise hybrid_jax in the user's
    own cache, as the XDG Base Directory Specification says where: in XDG_CACHE_HOME, or ~/.cache.
    """
    if own := os.environ.get("HYBRID_JAX_CACHE"):
        return pathlib.Path(own).expanduser()
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (
        caches if caches.is_absolute() else pathlib.Path("~/.cache").expanduser()
    ) / "hybrid_jax"
