"""The record of an array in a packed file: its dtype, bits, shape and layout, checked.

See `deploy.packed` for the format in full.
"""

import json
import math
import re
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from hybrid_jax import core, cost

DTYPES = {
    "bool": "BOOL",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""What an array may be of: {its dtype: the name that safetensors has for it}."""

CODINGS = ("raw", "zlib")
_MAX_RANK = 32
_NUMBER = r"(?:0|[1-9][0-9]{0,17})"
_LIST = rf"\[(?:{_NUMBER}(?:,{_NUMBER})*)?\]"
_RECORD = re.compile(
    rf"([0-9a-f]{{8}}) (\w+) ({_NUMBER}) ({_LIST}) ({_LIST}) (\w+) ({_NUMBER}) (\w+)"
)


class Record(NamedTuple):
    """What the header says of one array.

    Attributes:
      crc32: CRC-32 of the stored bytes.
      dtype: One of `DTYPES`.
      bits: Width of one value.
      shape: The array's shape.
      rows: The axes whose indices are the rows of the matrix; all others are its columns.
      layout: 'dense', 'bitmap' or 'csr'.
      stored: How many values are stored.
      coding: 'raw' or 'zlib'.
    """

    crc32: int
    dtype: str
    bits: int
    shape: tuple[int, ...]
    rows: tuple[int, ...]
    layout: str
    stored: int
    coding: str

    @property
    def size(self) -> int:
        """How many values the array has."""
        return math.prod(self.shape)

    @property
    def array_bytes(self) -> int:
        """Bytes of the array in memory; an axis of length 0 counts as 1, for NumPy's sake."""
        return math.prod(max(n, 1) for n in self.shape) * np_dtype(self.dtype).itemsize

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the array as a matrix."""
        columns = math.prod(n for axis, n in enumerate(self.shape) if axis not in self.rows)
        return math.prod(self.shape[axis] for axis in self.rows), columns

    @property
    def stream_bits(self) -> int:
        """Bits of the array before 'zlib'."""
        return cost.layout_bits(*self.matrix, self.stored, self.bits)[self.layout]

    @property
    def stream_bytes(self) -> int:
        """Bytes of the array before 'zlib'."""
        return -(-self.stream_bits // 8)

    @property
    def native(self) -> bool:
        """Whether the stored bytes are those of the array itself."""
        whole = self.bits == 8 * np_dtype(self.dtype).itemsize
        return whole and self.layout == "dense" and self.coding == "raw"


def np_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a name of `DTYPES`."""
    return np.dtype(getattr(jnp, "bool_" if name == "bool" else name))


def text(record: Record) -> str:
    """A record as the header has it.

    Example:
      >>> text(Record(10, 'int8', 4, (3, 16), (1,), 'csr', 2, 'raw'))
      '0000000a int8 4 [3,16] [1] csr 2 raw'
    """
    crc, dtype, bits, shape, rows, *rest = record
    axes = (json.dumps(list(numbers), separators=(",", ":")) for numbers in (shape, rows))
    return " ".join(map(str, (f"{crc:08x}", dtype, bits, *axes, *rest)))


def parse(name: str, written: str) -> Record:
    """Reads a record and checks that it is one; nothing of the sizes that it says is allocated.

    Args:
      name: The array's name, for the message.
      written: As `text` writes it.

    Raises:
      ValueError: If it is another text, or its fields contradict each other.

    Example:
      >>> parse('w', '0000000a int8 4 [3,16] [1] csr 2 raw').matrix
      (16, 3)
    """
    found = _RECORD.fullmatch(written)
    if not found:
        raise ValueError(f"record of {name!r} must have 8 fields, got {written[:80]!r}")
    crc, dtype, bits, shape, rows, layout, stored, coding = found.groups()
    core.check_choice(f"dtype of {name!r}", dtype, DTYPES)
    shape, rows = (tuple(json.loads(numbers)) for numbers in (shape, rows))
    record = Record(int(crc, 16), dtype, int(bits), shape, rows, layout, int(stored), coding)
    check(name, record)
    return record


def check(name: str, record: Record) -> None:
    """Raises ValueError if fields of a record contradict each other."""
    of = f"of {name!r}"
    least, most = widths(record.dtype)
    core.check_integer(f"bits {of} in {record.dtype}", record.bits, least, most)
    core.check_integer(f"rank {of}", len(record.shape), 0, _MAX_RANK)
    for axis in record.rows:
        core.check_integer(f"axis of the rows {of}", axis, 0, len(record.shape) - 1)
    if len(set(record.rows)) < len(record.rows):
        raise ValueError(f"rows {of} must be different axes, got {record.rows}")
    core.check_choice(f"coding {of}", record.coding, CODINGS)
    core.check_integer(f"values stored {of}", record.stored, 0, record.size)
    sizes = cost.layout_bits(*record.matrix, record.stored, record.bits)
    core.check_choice(f"layout {of}", record.layout, sizes)
    # Of the three the least, and so no more than the array itself is: no short file stands for a
    # long stream.
    least_layout = min(sizes, key=sizes.__getitem__)
    if record.layout != least_layout or (record.layout == "dense" and record.stored < record.size):
        raise ValueError(
            f"layout {of} must be {least_layout} for {record.stored} of {record.size} values, "
            f"got {record.layout}"
        )


def check_length(name: str, record: Record, length: int) -> None:
    """Raises ValueError if an array of that record cannot be stored in `length` bytes."""
    least, most = record.stream_bytes, record.stream_bytes
    if record.coding == "zlib":
        least, most = 0, most - 1  # Where it is not shorter, it is not applied.
    core.check_integer(f"bytes of {name!r}", length, least, most)


def widths(dtype: str) -> tuple[int, int]:
    """The fewest and the most bits that a value of that dtype may be stored in."""
    full = 1 if dtype == "bool" else 8 * np_dtype(dtype).itemsize
    return (1 if "int" in dtype else full), full


def describe(name: str, values: np.ndarray, bits: int | None, rows: tuple[int, ...]) -> Record:
    """The record of an array, dense and raw, after a check that it can be stored.

    Args:
      name: Its name, for the message.
      values: The array.
      bits: Width of one value; None for its dtype's own.
      rows: The axes of the rows.

    Raises:
      ValueError: If its dtype is none of `DTYPES`, its values do not fit in `bits`, or `rows` are
        no axes of it.

    Example:
      >>> describe('w', np.array([7, -9], np.int8), 4, ())
      Traceback (most recent call last):
      ...
      ValueError: 'w' must have values in [-8, 7] for 4 bits, got -9 to 7
    """
    dtype = core.check_choice(f"dtype of {name!r}", values.dtype.name, DTYPES)
    bits = widths(dtype)[1] if bits is None else bits
    record = Record(0, dtype, bits, values.shape, tuple(rows), "dense", values.size, "raw")
    check(name, record)
    record = record._replace(bits=int(bits), rows=tuple(map(int, rows)))
    check_fits(name, values, record)
    return record


def check_fits(name: str, values: np.ndarray, record: Record) -> None:
    """Raises ValueError if integers do not fit in the dtype and bits of a record."""
    if "int" in record.dtype and values.size:
        low, high = -(1 << record.bits - 1), (1 << record.bits - 1) - 1
        if record.dtype.startswith("uint"):
            low, high = 0, (1 << record.bits) - 1
        least, most = int(values.min()), int(values.max())
        if least < low or most > high:
            raise ValueError(
                f"{name!r} must have values in [{low}, {high}] for {record.bits} bits, "
                f"got {least} to {most}"
            )


def narrowest(values: np.ndarray) -> int | None:
    """The fewest bits that hold all of some integers, in their dtype; None for other numbers.

    Example:
      >>> narrowest(np.array([-8, 7], np.int32)), narrowest(np.array([9], np.uint8))
      (4, 4)
    """
    if values.dtype.kind not in "iu":
        return None
    ends = (int(values.min()), int(values.max())) if values.size else (0,)
    # Of a negative number, ~n has the bits that its two's complement needs besides the sign.
    widest = max(max(n, ~n).bit_length() for n in ends)
    return max(widest + (values.dtype.kind == "i"), 1)
