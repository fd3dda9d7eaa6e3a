r"""The packed file: named arrays in as few bits as they need, in one file that runs no code.

A packed file is a safetensors file, so that any reader of those opens it. All numbers in it are
little-endian:

    8 bytes    N, the length of the header, a multiple of 8
    N bytes    the header: JSON in ASCII, spaces at its end
    the rest   the stored bytes of the arrays, one after the other without gaps

The header is one JSON object, without white space between its tokens:

    {"__metadata__":
       {"crc32": C, "format": "hybrid_jax packed 1", "metadata": M, NAME: RECORD, ...},
     NAME: {"dtype": D, "shape": S, "data_offsets": [FIRST, END]}, ...}

* C is 8 hexadecimal digits in lower case, bytes 26 to 33 of the header counted from 0: the CRC-32
  (that of zlib and PNG) of the N bytes of the header with '00000000' in their place.
* M is JSON, as a string.
* NAME is that of a tensor and of one of its parts. `conv:values` are the numbers q of the tensor
  `conv`; `conv:scale` and `conv:zero_point`, of one shape, say what they stand for:
  scale · (q − zero_point). A tensor may lack both, or the zero point, which is then 0. A name is
  a name and never a path: `../x` and `/x` mean nothing.
* RECORD is 8 fields with one space between them, "5b0fa1c2 int8 4 [3,3,16,32] [3] csr 99 raw": the
  CRC-32 of the stored bytes; the dtype, a name of NumPy or ml_dtypes; the bits of a value; the
  shape; the axes of the rows; the layout; the number of values stored; the coding, 'raw' or 'zlib'.
* FIRST and END are counted from the end of the header. D and S are the array's own if the layout is
  dense, the coding raw and the bits all those of the dtype; else "U8" and [END − FIRST].

An array is taken as a matrix. Its rows are the indices along the axes of the rows (in the order
given, the last one fastest), its columns those along all others. Without axes it is one row.
A coding 'zlib' is undone first. What is then there is a stream of bits, the lowest bit of a byte
first, and so is every number in it; zero bits fill the last byte. With v values stored:

    dense    the v values of the array, in C order of its shape
    bitmap   one bit for each place of the matrix, row by row, 1 where a value is stored;
             the v values
    csr      the v values, row by row; the column of each in ⌈log2 columns⌉ bits;
             rows + 1 numbers of ⌈log2 (v + 1)⌉ bits: how many values lie before each row, then v

The layout is the one of the fewest bits (of equals, the first). A place without a value holds the
tensor's zero point where that is of an integer dtype, else 0. A value is the lowest bits of its
integer in two's complement, so that the highest of them is the sign if the dtype has one. Floats
have all their bits, a bool has one. A scale of shape () is one for all; of another, it has along
each axis one for each of as many equal blocks of consecutive indices as the axis is long.

CRC-32 finds what storage and transfer damage: every change of up to 32 adjacent bits, for sure.
It takes ten lines where there is no library. Against an adversary no checksum inside a file helps;
compare the SHA-256 of the manifest, got from where you trust.
"""

import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from hybrid_jax import core, quantization
from hybrid_jax.deploy import artifact, packed_codec, packed_header, packed_record

MAX_BYTES = 1 << 28
"""Bytes of the arrays that `load` takes unless it is told another number."""

_PARTS = ("values", "scale", "zero_point")


class Tensor(NamedTuple):
    """An array to store, and what its numbers stand for.

    Attributes:
      values: Of a dtype of `packed_record.DTYPES`.
      bits: Width in which an integer is stored; it must fit, signed if its dtype is. None is the
        dtype's own width. Floats keep theirs, and a bool takes 1.
      rows: The axes of the output channels, whose indices are the rows of the layouts 'bitmap' and
        'csr'; () for one row. Axes counted from 0.
      scale: float32, of the shape of a `quantization.Range` for the values; or None.
      zero_point: Of scale's shape, or None where all are 0; what is pruned has its value.
    """

    values: Any
    bits: int | None = None
    rows: tuple[int, ...] = ()
    scale: Any = None
    zero_point: Any = None


def save(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    metadata: Any = None,
    *,
    compress: Collection[str] = (),
) -> dict[str, Any]:
    """Writes tensors to a packed file, and a manifest to `path` + '.json'.

    The file alone is enough to read it. With a full disk the old file stays.

    Args:
      path: Target; its folder is made if it is missing.
      tensors: {name: tensor}.
      metadata: What JSON can hold.
      compress: Names of the tensors to apply zlib to, where it makes them smaller.

    Returns:
      The manifest: 'bytes' of the file, 'payload_bytes' of the arrays in it, and 'sha256'. The
      payload is what `cost.count` counts, less for zeros that no mask tells of, and more for zero
      points that are not 0, which it does not count.

    Raises:
      ValueError: If an array, its bits or `metadata` cannot be stored.
      TypeError: If `tensors` has another name than a string or another value than a `Tensor`.
      OSError: If it cannot be written.

    Example:
      >>> import tempfile
      >>> kernel = Tensor(np.array([[7, -8, 0]], np.int8), bits=4, scale=np.float32(0.5))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     manifest = save(f'{folder}/model', {'kernel': kernel}, {'classes': 3})
      ...     tensors, metadata = load(f'{folder}/model')
      >>> manifest['payload_bytes']  # ⌈3 · 4 / 8⌉ and a scale of 4
      6
      >>> print(tensors['kernel'].values, metadata)
      [[ 7 -8  0]] {'classes': 3}
    """
    data = encode(tensors, metadata, compress=compress)
    payload = len(data) - packed_header.payload_start(data)
    facts = {"kind": packed_header.FORMAT, "payload_bytes": payload}
    return artifact.write(path, data, facts)


def load(path: str | os.PathLike, max_bytes: int = MAX_BYTES) -> tuple[dict[str, Tensor], Any]:
    """Reads a packed file.

    Args:
      path: The file; no manifest is needed.
      max_bytes: Most bytes that the arrays may take. A file that says more, or is longer than they
        could make it, is refused before any is made. Reading takes a few times as much memory.

    Returns:
      ({name: tensor}, metadata): every array with its values, dtype and shape as they were saved.

    Raises:
      FileNotFoundError: If there is no file.
      ValueError: If it is no packed file, was changed or damaged, or is larger.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = save(f'{folder}/model', {'bias': Tensor(np.array([1, -2], np.int32), bits=3)})
      ...     load(f'{folder}/model')[0]['bias'].values
      array([ 1, -2], dtype=int32)
    """
    core.check_integer("max_bytes", max_bytes, 0)
    path, limit = pathlib.Path(path), 8 + packed_header.MAX_HEADER + max_bytes
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{path} must have at most {limit} bytes, got {size}")
        data = file.read(limit)
    try:
        return decode(data, max_bytes)
    except ValueError as error:
        raise ValueError(f"{path} is no packed file to read: {error}") from error


def encode(
    tensors: Mapping[str, Tensor], metadata: Any = None, *, compress: Collection[str] = ()
) -> bytes:
    """The contents of a packed file.

    Args:
      tensors: As for `save`.
      metadata: As for `save`.
      compress: As for `save`.

    Raises:
      ValueError, TypeError: As for `save`.

    Example:
      >>> data = encode({'bias': Tensor(np.array([1, -2], np.int32), bits=3)})
      >>> data[-1:].hex()  # 001 and, above it, 110
      '31'
    """
    records, stored = {}, {}
    for name, tensor in tensors.items():
        arrays, parts = _described(name, tensor)
        fill = _fill(name, parts["values"], arrays.get("zero_point"))
        for part, array in arrays.items():
            key = f"{name}:{part}"
            records[key], stored[key] = packed_codec.encode(
                parts[part], array, fill if part == "values" else 0, name in compress
            )
    lengths = {key: len(data) for key, data in stored.items()}
    header, order = packed_header.format_header(records, lengths, metadata)
    return b"".join([header, *(stored[key] for key in order)])


def decode(data: bytes, max_bytes: int = MAX_BYTES) -> tuple[dict[str, Tensor], Any]:
    """Reads the contents of a packed file.

    The header is checked whole before any array is made. Names or fields given twice or beside
    those of the format, gaps, overlaps and what lies behind the last array are refused.

    Args:
      data: The contents.
      max_bytes: Most bytes that the arrays may take.

    Returns:
      As `load`.

    Raises:
      ValueError: As `load`.

    Example:
      >>> data = encode({'bias': Tensor(np.array([1, -2], np.int32), bits=3)})
      >>> decode(data)[0]['bias'].values
      array([ 1, -2], dtype=int32)
      >>> decode(data[:-1] + b'2')  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ...
      ValueError: 'bias:values' must have crc32 ..., got ...; it was changed or damaged
    """
    core.check_integer("max_bytes", max_bytes, 0)
    records, places, metadata = packed_header.parse_header(data)
    found = _grouped(records)
    total = sum(record.array_bytes for record in records.values())
    core.check_integer("bytes of all arrays", total, 0, max_bytes)
    view, tensors = memoryview(data), {}
    for name, parts in found.items():

        def read(part, fill=0, name=name, parts=parts):
            key = f"{name}:{part}"
            return packed_codec.decode(key, parts[part], view[places[key]], fill)

        values = parts["values"]
        scale, zero_point = (read(part) if part in parts else None for part in _PARTS[1:])
        # What is not stored of the values is the zero point, which is therefore read before.
        array = read("values", _fill(name, values, zero_point))
        tensors[name] = Tensor(array, values.bits, values.rows, scale, zero_point)
    return tensors, metadata


def _described(name, tensor):
    """The arrays of a tensor by its parts, and the record of each before it is encoded."""
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise TypeError(f"tensors must be {{str: Tensor}}, got {name!r}: {type(tensor).__name__}")
    given = ((part, getattr(tensor, part)) for part in _PARTS)
    arrays = {part: _native_order(value) for part, value in given if value is not None}
    bits = {"values": tensor.bits}
    if "zero_point" in arrays:
        bits["zero_point"] = packed_record.narrowest(arrays["zero_point"])
    parts = {
        part: packed_record.describe(
            f"{name}:{part}", array, bits.get(part), tensor.rows if part == "values" else ()
        )
        for part, array in arrays.items()
    }
    _check_parts(name, parts)
    return arrays, parts


def _native_order(value):
    array = np.asarray(value)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _grouped(records):
    """{tensor: {part: record}}, checked."""
    tensors: dict[str, dict[str, packed_record.Record]] = {}
    for key, record in records.items():
        name, _, part = key.rpartition(":")
        core.check_choice(f"part of {key!r}", part, _PARTS)
        tensors.setdefault(name, {})[part] = record
    for name, parts in tensors.items():
        _check_parts(name, parts)
    return tensors


def _check_parts(name, parts):
    """Raises ValueError if the parts do not make a tensor."""
    missing = {"values", "scale"} if "zero_point" in parts else {"values"}
    if not missing <= parts.keys():
        raise ValueError(f"{name!r} must have {' and '.join(sorted(missing))}, got {list(parts)}")
    values, scale = parts["values"], parts.get("scale", parts["values"])
    if "scale" in parts:
        core.check_choice(f"dtype of '{name}:scale'", scale.dtype, ["float32"])
        # As a `quantization.Range`: one for all, or equal blocks along each axis.
        spreads = len(scale.shape) == len(values.shape) and all(
            m == n or (m and n % m == 0) for m, n in zip(scale.shape, values.shape, strict=True)
        )
        if scale.shape and not spreads:
            raise ValueError(
                f"shape of '{name}:scale' must be () or divide {values.shape}, got {scale.shape}"
            )
    zero_point = parts.get("zero_point", scale)
    if zero_point.shape != scale.shape:
        raise ValueError(
            f"shape of '{name}:zero_point' must be {scale.shape}, got {zero_point.shape}"
        )
    if "zero_point" in parts:
        integers = [dtype for dtype in packed_record.DTYPES if "int" in dtype]
        allowed = ["float32", *(integers if values.dtype in integers else [])]
        core.check_choice(f"dtype of '{name}:zero_point'", zero_point.dtype, allowed)


def _fill(name, values, zero_point):
    """What stands in places without a value: the zero point if it is an integer, else 0."""
    if zero_point is None or zero_point.dtype.kind not in "iu":
        return 0
    packed_record.check_fits(f"{name}:zero_point", zero_point, values)
    return np.broadcast_to(np.asarray(quantization.spread(zero_point, values.shape)), values.shape)
