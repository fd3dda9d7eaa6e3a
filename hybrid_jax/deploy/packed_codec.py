"""Arrays as bits and back: the layouts of a packed file, in the bytes that `cost` counts.

See `deploy.packed` for the format in full.
"""

import zlib
from typing import Any

import numpy as np

from hybrid_jax import cost
from hybrid_jax.deploy.packed_record import Record, np_dtype

# Values taken at once, so that the single bits of all of them never lie in memory together.
_BLOCK = 1 << 16


def encode(record: Record, values: np.ndarray, fill: Any, compress: bool) -> tuple[Record, bytes]:
    """The smallest of the layouts of an array, with its record.

    Args:
      record: As `packed_record.describe` gives it.
      values: The array.
      fill: What is not stored in the layouts 'bitmap' and 'csr': broadcasts to `values`.
      compress: Whether to apply zlib where that is smaller.

    Example:
      >>> from hybrid_jax.deploy import packed_record
      >>> values = np.array([[7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1]], np.int8)
      >>> record, data = encode(packed_record.describe('w', values, 4, (0,)), values, 0, False)
      >>> record.layout, data.hex()  # 7, −1 in 4 bits each; columns 0, 15 in 4; offsets 0, 2 in 2
      ('csr', 'f7f008')
    """
    codes = _codes(values)
    kept = codes != _codes(np.asarray(fill, values.dtype))
    stored = int(np.count_nonzero(kept))
    sizes = cost.layout_bits(*record.matrix, stored, record.bits)
    layout = min(sizes, key=sizes.__getitem__)
    if layout != "dense":
        record = record._replace(layout=layout, stored=stored)
    data = values.tobytes() if record.native else _pack(record, codes, kept)
    short = zlib.compress(data, 9) if compress else data
    if len(short) < len(data):
        record, data = record._replace(coding="zlib"), short
    return record._replace(crc32=zlib.crc32(data)), data


def decode(name: str, record: Record, data: memoryview, fill: Any) -> np.ndarray:
    """Reads what `encode` wrote.

    Args:
      name: The array's name, for the message.
      record: A record that `packed_record.parse` or `encode` gave.
      data: The stored bytes, of a length that `packed_record.check_length` passed.
      fill: As given to `encode`.

    Raises:
      ValueError: If checksum or contents of `data` are not those of the record.

    Example:
      >>> from hybrid_jax.deploy import packed_record
      >>> values = np.array([[5, 0], [-8, 1]], np.int8)
      >>> record, data = encode(packed_record.describe('w', values, 4, (0,)), values, 0, False)
      >>> print(decode('w', record, memoryview(data), 0))
      [[ 5  0]
       [-8  1]]
    """
    if zlib.crc32(data) != record.crc32:
        raise ValueError(
            f"{name!r} must have crc32 {record.crc32:08x}, got {zlib.crc32(data):08x}; "
            "it was changed or damaged"
        )
    if record.coding == "zlib":
        data = _inflate(name, data, record.stream_bytes)
    if record.stream_bits % 8 and data[-1] >> (record.stream_bits % 8):
        raise ValueError(f"{name!r} must end in zero bits, got {data[-1]:08b}")
    if record.native:
        return np.frombuffer(data, np_dtype(record.dtype)).reshape(record.shape).copy()
    stream = np.frombuffer(data, np.uint8)
    if record.layout == "dense":
        return _values(_read(stream, 0, record.size, record), record).reshape(record.shape)
    order = _row_order(record)
    fill = np.broadcast_to(np.asarray(fill, np_dtype(record.dtype)), record.shape).transpose(order)
    first, places = _places(name, record, stream)
    matrix = fill.flatten()
    matrix[places] = _values(_read(stream, first, record.stored, record), record)
    return np.asarray(matrix.reshape(fill.shape).transpose(np.argsort(order)), order="C")


def _pack(record, codes, kept):
    """The stream of a record's layout."""
    stream = np.zeros(record.stream_bytes, np.uint8)
    if record.layout == "dense":
        _write(stream, 0, codes.ravel(), record.bits)
        return stream.tobytes()
    rows, columns = record.matrix
    order = _row_order(record)
    kept = kept.transpose(order).reshape(rows, columns)
    codes = codes.transpose(order).reshape(rows, columns)[kept]
    if record.layout == "bitmap":
        _write(stream, 0, kept.ravel().view(np.uint8), 1)
        _write(stream, kept.size, codes, record.bits)
        return stream.tobytes()
    column_bits, offset_bits = cost.csr_widths(columns, record.stored)
    offsets = np.concatenate([[0], np.cumsum(np.count_nonzero(kept, axis=1))])
    start = 0
    for numbers, width in (
        (codes, record.bits),
        (np.nonzero(kept)[1], column_bits),
        (offsets, offset_bits),
    ):
        _write(stream, start, numbers, width)
        start += numbers.size * width
    return stream.tobytes()


def _places(name, record, stream):
    """The first bit of the values, and where in the flat matrix they are: a mask or indices."""
    (rows, columns), stored = record.matrix, record.stored
    if record.layout == "bitmap":
        kept = _numbers(stream, 0, record.size, 1, np.uint8).view(bool)
        if np.count_nonzero(kept) != stored:
            raise ValueError(
                f"bitmap of {name!r} must keep {stored} values, got {np.count_nonzero(kept)}"
            )
        return record.size, kept
    if not stored:
        return 0, np.zeros(0, np.int64)
    column_bits, offset_bits = cost.csr_widths(columns, stored)
    start = stored * record.bits
    column = _numbers(stream, start, stored, column_bits, np.int64)
    offsets = _numbers(stream, start + stored * column_bits, rows + 1, offset_bits, np.int64)
    counts = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != stored or (counts < 0).any():
        raise ValueError(f"offsets of {name!r} must rise from 0 to {stored}")
    places = np.repeat(np.arange(rows), counts) * columns + column
    if (column >= columns).any() or (np.diff(places) <= 0).any():
        raise ValueError(f"columns of {name!r} must rise in each row and be below {columns}")
    return 0, places


def _row_order(record):
    """The axes, those of the rows first."""
    return (*record.rows, *(i for i in range(len(record.shape)) if i not in record.rows))


def _codes(values):
    """The bits of each value as an unsigned integer."""
    return values.view(f"u{values.dtype.itemsize}")


def _values(codes, record):
    """The values that codes of `bits` bits stand for: a signed one's highest bit is its sign."""
    dtype = np_dtype(record.dtype)
    if dtype.kind == "i":
        spare = 8 * dtype.itemsize - record.bits
        return (codes << spare).view(dtype) >> spare
    return codes.view(dtype)


def _read(stream, start, count, record):
    return _numbers(stream, start, count, record.bits, f"u{np_dtype(record.dtype).itemsize}")


def _numbers(stream, start, count, width, dtype):
    """`count` unsigned numbers of `width` bits each, from bit `start` on, lowest bits first."""
    numbers = np.zeros(count, dtype)
    octets = numbers.view(np.uint8).reshape(count, numbers.itemsize)
    for i in range(0, count if width else 0, _BLOCK):
        n = min(_BLOCK, count - i)
        first, last = start + i * width, start + (i + n) * width
        bits = np.unpackbits(stream[first // 8 : -(-last // 8)], bitorder="little")
        bits = bits[first % 8 :][: n * width].reshape(n, width)
        octets[i : i + n, : -(-width // 8)] = np.packbits(bits, axis=1, bitorder="little")
    return numbers


def _write(stream, start, numbers, width):
    """Writes what `_numbers` reads; the bits must have been zero."""
    octets = np.ascontiguousarray(numbers).view(np.uint8).reshape(numbers.size, numbers.itemsize)
    for i in range(0, numbers.size if width else 0, _BLOCK):
        block = octets[i : i + _BLOCK, : -(-width // 8)]
        first, last = start + i * width, start + (i + len(block)) * width
        bits = np.unpackbits(block, axis=1, bitorder="little")[:, :width].ravel()
        bits = np.concatenate([np.zeros(first % 8, np.uint8), bits])
        stream[first // 8 : -(-last // 8)] |= np.packbits(bits, bitorder="little")


def _inflate(name, data, length):
    """Decompresses at most `length` bytes: what would become more is refused before it does."""
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(data, length + 1)
    except zlib.error as error:
        raise ValueError(f"{name!r} must be a zlib stream, got another ({error})") from None
    if len(found) != length or not stream.eof or stream.unused_data:
        raise ValueError(f"{name!r} must inflate to {length} bytes exactly")
    return found
