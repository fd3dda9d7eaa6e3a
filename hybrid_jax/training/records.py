"""Records of a run: one JSON object a line, appended, and never half a line to the reader."""

import json
import os
import zlib
from typing import Any

from hybrid_jax import core

Path = str | os.PathLike[str]


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Appends one record, with a checksum; of several processes the first one does."""
    core.append(path, _line(record).encode())


def read_records(path: Path, name: str | None = None) -> list[dict[str, Any]]:
    """The records of the run `name`, or of all; [] without a file.

    A line that is not as it was written, as an unfinished one, is left out, and told on stderr.
    """
    path = core.as_path(path)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            written = _line({key: value for key, value in record.items() if key != "crc32"})
        except (ValueError, AttributeError, RecursionError):
            written = ""
        if line == written.encode():
            records.append({key: value for key, value in record.items() if key != "crc32"})
        else:
            told = f"{path} must hold records as they were written: line {number} is left out"
            core.say(told)
    return [record for record in records if name is None or record["name"] == name]


def drop_records(path: Path, name: str, after: int) -> None:
    """Removes what `name` wrote after step `after`: a resumed run will write it again."""
    path = core.as_path(path)
    if path.exists():
        kept = [r for r in read_records(path) if r["name"] != name or r["step"] <= after]
        core.write_atomically({path: "".join(map(_line, kept)).encode()})


def _line(record):
    crc = zlib.crc32(json.dumps(record).encode())
    return json.dumps(record | {"crc32": crc}) + "\n"
