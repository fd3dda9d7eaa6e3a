"""Records of a run: one JSON object a line, appended, and never half a line to the reader."""

import json
import os
import pathlib
from typing import Any

from hybrid_jax import core

Path = str | os.PathLike[str]


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Appends one record and flushes it."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_records(path: Path, name: str | None = None) -> list[dict[str, Any]]:
    """The records of the run `name`, or of all, but for an unfinished line; [] without a file."""
    path = pathlib.Path(path)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if name is None or record["name"] == name]


def drop_records(path: Path, name: str, after: int) -> None:
    """Removes what `name` wrote after step `after`: a resumed run will write it again."""
    path = pathlib.Path(path)
    if not path.exists():
        return
    kept = [r for r in read_records(path) if r["name"] != name or r["step"] <= after]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    core.write_atomically({path: text.encode()})
