"""The header of a packed file: what its arrays are and where they lie, checked before any is read.

A header of safetensors, parsed here and not by that library, which takes of two entries of one name
the last, passes over unknown fields, accepts a shape like [0, 2^62], and has no checksum.
"""

import itertools
import json
import re
import struct
import zlib
from collections.abc import Mapping
from typing import Any

from hybrid_jax import core
from hybrid_jax.deploy import packed_record

FORMAT = "hybrid_jax packed 1"
MAX_HEADER = 1 << 22
"""Bytes of the longest header: some 20,000 arrays."""

_START = b'{"__metadata__":{"crc32":"'
_CHECKSUM = re.compile(re.escape(_START) + rb"([0-9a-f]{8})\"")
_LENGTH = struct.Struct("<Q")


def format_header(
    records: Mapping[str, packed_record.Record], lengths: Mapping[str, int], metadata: Any
) -> tuple[bytes, list[str]]:
    """The bytes before the arrays, and the names of these in the order in which they follow.

    Args:
      records: {name: what the array is}.
      lengths: {name: its stored bytes}.
      metadata: What JSON can hold.

    Raises:
      ValueError: If `metadata` is something else, a name is no text, or the header too long.
    """
    _check_names(records)
    # What has the largest items comes first, so that each starts at a multiple of its own.
    order = sorted(records, key=lambda name: -_item_bytes(records[name]))
    ends = itertools.accumulate((lengths[name] for name in order), initial=0)
    fields = {
        "crc32": "0" * 8,
        "format": FORMAT,
        "metadata": _metadata_text(metadata),
        **{name: packed_record.text(record) for name, record in records.items()},
    }
    entries = {
        name: _entry(records[name], first, end)
        for name, (first, end) in zip(order, itertools.pairwise(ends), strict=True)
    }
    header = _padded(_dump({"__metadata__": fields, **entries}))
    core.check_integer("bytes of the header", len(header), 0, MAX_HEADER)
    checksum = f"{zlib.crc32(header):08x}".encode()
    header = header.replace(_START + b"0" * 8, _START + checksum, 1)
    return _LENGTH.pack(len(header)) + header, order


def payload_start(data: bytes) -> int:
    """Where the arrays start.

    Raises:
      ValueError: If the file is shorter, or its header longer than `MAX_HEADER`.
    """
    core.check_integer("bytes of the file", len(data), _LENGTH.size)
    (length,) = _LENGTH.unpack_from(data)
    most = min(MAX_HEADER, len(data) - _LENGTH.size)
    return _LENGTH.size + core.check_integer("bytes of the header", length, 0, most)


def parse_header(data: bytes) -> tuple[dict[str, packed_record.Record], dict[str, slice], Any]:
    """Reads and checks a header.

    The header has one form: with white space, other escapes, names or fields given twice or beside
    those of the format it is refused.

    Args:
      data: The whole file.

    Returns:
      {name: what the array is}, {name: its place in the file}, and the metadata.

    Raises:
      ValueError: If it is no header of a packed file, or not of this one.
    """
    start = payload_start(data)
    header = data[_LENGTH.size : start]
    _check_checksum(header)
    entries = _parse("header", header.rstrip(b" ").decode("latin-1"))
    if _padded(_dump(entries)) != header:
        raise ValueError("header must be JSON without spaces inside, padded to 8 bytes")
    # By the place of the checksum it is there, and an object.
    fields = entries.pop("__metadata__")
    del fields["crc32"]
    for name, text in fields.items():
        if not isinstance(text, str):
            raise ValueError(f"__metadata__ must have a string at {name!r}, got {text!r:.80}")
    core.check_choice("format", fields.pop("format", ""), [FORMAT])
    metadata = _parse("metadata", fields.pop("metadata", ""))
    records = {name: packed_record.parse(name, text) for name, text in fields.items()}
    _check_names(records)
    if records.keys() != entries.keys():
        wrong = sorted(records.keys() ^ entries.keys())
        raise ValueError(
            f"each array must have a record and an entry, got one only of {wrong[0]!r}"
        )
    places, first = {}, start
    for name, entry in entries.items():
        end = start + _end(name, entry, first - start, len(data) - start)
        expected = _entry(records[name], first - start, end - start)
        if _dump(entry) != _dump(expected):
            raise ValueError(f"entry of {name!r} must be {expected}, got {entry!r:.200}")
        packed_record.check_length(name, records[name], end - first)
        places[name], first = slice(first, end), end
    if first != len(data):
        raise ValueError(f"the file must have {first} bytes, got {len(data)}")
    return records, places, metadata


def _check_checksum(header):
    found = _CHECKSUM.match(header)
    if not found:
        raise ValueError(f"header must start with {_START.decode()!r}, got {header[:40]!r}")
    checksum = zlib.crc32(header[: found.start(1)] + b"0" * 8 + header[found.end(1) :])
    if int(found[1], 16) != checksum:
        raise ValueError(
            f"header must have crc32 {found[1].decode()}, got {checksum:08x}; "
            "it was changed or damaged"
        )


def _check_names(names):
    """Raises ValueError if a name holds half of a surrogate pair, which other readers refuse."""
    for name in names:
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(f"names must be Unicode text, got {name!r}")


def _metadata_text(metadata):
    try:
        text = _dump(metadata)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"metadata must be what JSON can hold: {error}") from error
    _parse("metadata", text)
    return text


def _parse(what, text):
    """The value of a text that `_dump` wrote."""
    try:
        value = json.loads(text)
        again = _dump(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} must be JSON: {error}") from error
    if again != text:
        raise ValueError(f"{what} must be JSON in its one form: no name twice, no spaces between")
    return value


def _dump(value):
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _padded(text):
    return text.encode() + b" " * (-len(text) % 8)


def _entry(record, first, end):
    """What safetensors needs to know of an array."""
    dtype, shape = packed_record.DTYPES[record.dtype], list(record.shape)
    if not record.native:
        dtype, shape = "U8", [end - first]
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}


def _end(name, entry, first, most):
    """Where the bytes of an array end, that start at `first`."""
    try:
        _, end = entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"entry of {name!r} must have data_offsets, got {entry!r:.80}") from None
    return core.check_integer(f"end of {name!r}", end, first, most)


def _item_bytes(record):
    return packed_record.np_dtype(record.dtype).itemsize if record.native else 1
