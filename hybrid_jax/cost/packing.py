"""The size of a pruned, quantized matrix in the layout that stores it smallest."""

from hybrid_jax import core


def packed_bytes(rows: int, columns: int, nonzero: int, bits: int) -> int:
    """Bytes of a matrix in the smallest of the layouts of `layout_bits`.

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
    return -(-min(layout_bits(rows, columns, nonzero, bits).values()) // 8)


def layout_bits(rows: int, columns: int, nonzero: int, bits: int) -> dict[str, int]:
    """Bits of a matrix in each of three layouts, each packed without gaps.

    * dense: rows · columns values;
    * bitmap: one bit for each place, then the values that are not zero;
    * CSR: the values that are not zero, the column of each in ⌈log2 columns⌉ bits, and rows + 1
      offsets in ⌈log2 (nonzero + 1)⌉ bits.

    Args:
      rows: As for `packed_bytes`, and so are the others.
      columns: See there.
      nonzero: See there.
      bits: See there.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> layout_bits(4, 16, nonzero=2, bits=8)
      {'dense': 512, 'bitmap': 80, 'csr': 34}
    """
    core.check_integer("rows", rows, 0)
    core.check_integer("columns", columns, 0)
    core.check_integer("nonzero", nonzero, 0, rows * columns)
    core.check_integer("bits", bits, 1)
    column_bits, offset_bits = csr_widths(columns, nonzero)
    return {
        "dense": rows * columns * bits,
        "bitmap": rows * columns + nonzero * bits,
        "csr": nonzero * (bits + column_bits) + (rows + 1) * offset_bits,
    }


def csr_widths(columns: int, nonzero: int) -> tuple[int, int]:
    """Bits of one column, ⌈log2 columns⌉, and of one row's offset, ⌈log2 (nonzero + 1)⌉, in CSR.

    Example:
      >>> csr_widths(16, nonzero=2)
      (4, 2)
    """
    return max(columns - 1, 0).bit_length(), nonzero.bit_length()
