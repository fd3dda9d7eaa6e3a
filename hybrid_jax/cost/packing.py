"""The size of a pruned, quantized matrix in the layout that stores it smallest."""

from hybrid_jax import core


def packed_bytes(rows: int, columns: int, nonzero: int, bits: int) -> int:
    """Bytes of a matrix in the smallest of three layouts, each packed without gaps.

    * dense: rows · columns values;
    * bitmap: one bit for each place, then the values that are not zero;
    * CSR: the values that are not zero, the column of each in ⌈log2 columns⌉ bits, and rows + 1
      offsets in ⌈log2 (nonzero + 1)⌉ bits.

    Args:
      rows: Number of rows; of a kernel, its output channels.
      columns: Number of columns; of a kernel, the weights of one output channel.
      nonzero: How many values are kept, in [0, rows · columns].
      bits: Width of one value.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> packed_bytes(4, 16, nonzero=64, bits=8)  # dense: 64 · 8 bits
      64
      >>> packed_bytes(4, 16, nonzero=32, bits=8)  # bitmap: 64 + 32 · 8 bits
      40
      >>> packed_bytes(4, 16, nonzero=2, bits=8)  # CSR: 2 · 8 + 2 · 4 + 5 · 2 = 34 bits
      5
    """
    core.check_integer("rows", rows, 0)
    core.check_integer("columns", columns, 0)
    core.check_integer("nonzero", nonzero, 0, rows * columns)
    core.check_integer("bits", bits, 1)
    dense = rows * columns * bits
    bitmap = rows * columns + nonzero * bits
    column_bits = max(columns - 1, 0).bit_length()
    csr = nonzero * (bits + column_bits) + (rows + 1) * nonzero.bit_length()
    return -(-min(dense, bitmap, csr) // 8)
