"""Files written whole or not at all, and where a machine keeps what later runs can use again."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

DRAFT = ".draft"
"""How the name of a file ends that is being written; a killed process leaves it."""


def write_atomically(contents: Mapping[str | os.PathLike, bytes]) -> None:
    """Writes {path: content}, all or none: drafts beside their targets first, then moved."""
    drafts = {}
    try:
        for path, content in contents.items():
            path = pathlib.Path(path)
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
