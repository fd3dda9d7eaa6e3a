"""Bytes of kernels with zeros: the smallest of three encodings, each written out here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from hybrid_jax import contrib, core, cost, pruning


def bits_of(values, width):
    """Each value in `width` bits."""
    return [(int(value) >> i) & 1 for value in values for i in range(width)]


def encoded(mask, values, bits):
    """The three layouts of a matrix, as bytes without gaps."""
    csr = scipy.sparse.csr_array(mask)
    csr.sort_indices()
    return {
        "dense": bits_of(np.where(mask, values, 0).ravel(), bits),
        "bitmap": [*mask.ravel(), *bits_of(values[mask], bits)],
        "csr": [
            *bits_of(values[mask], bits),
            *bits_of(csr.indices, int(mask.shape[1] - 1).bit_length()),
            *bits_of(csr.indptr, int(csr.nnz).bit_length()),
        ],
    }


def decoded(layout, stream, shape, bits, nonzero):
    """The matrix that such bytes stand for."""
    rows, columns = shape

    def number(start, width):
        return sum(int(bit) << i for i, bit in enumerate(stream[start : start + width]))

    matrix = np.zeros(rows * columns, int)
    if layout == "dense":
        where, start = np.arange(rows * columns), 0
    elif layout == "bitmap":
        where, start = np.flatnonzero(stream[: rows * columns]), rows * columns
    else:
        width, wide = (columns - 1).bit_length(), nonzero.bit_length()
        columns_start, rows_start = nonzero * bits, nonzero * (bits + width)
        ends = [number(rows_start + i * wide, wide) for i in range(rows + 1)]
        row = np.repeat(np.arange(rows), np.diff(ends))
        column = [number(columns_start + i * width, width) for i in range(nonzero)]
        where, start = row * columns + np.array(column, int), 0
    matrix[where] = [number(start + i * bits, bits) for i in range(len(where))]
    return matrix.reshape(shape)


@settings(deadline=None, max_examples=60)
@given(
    mask=st_numpy.arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 40))),
    bits=st.integers(1, 8),
    seed=st.integers(0, 9),
)
def test_packed_bytes_are_those_of_the_smallest_encoding(mask, bits, seed):
    values = np.random.default_rng(seed).integers(1, 2**bits, mask.shape)
    streams = encoded(mask, values, bits)
    nonzero = int(mask.sum())
    sizes = {name: np.packbits(np.array(stream, bool)).size for name, stream in streams.items()}
    assert cost.packed_bytes(*mask.shape, nonzero, bits) == min(sizes.values())
    for layout, stream in streams.items():
        got = decoded(layout, stream, mask.shape, bits, nonzero)
        np.testing.assert_array_equal(got, np.where(mask, values, 0))


@pytest.mark.parametrize(
    ("granularity", "sparsity", "smallest"),
    [
        # Kernel (3, 3, 8, 16): 16 rows of 72, 1152 weights of 8 bits, 1152 bytes dense.
        # 2:4 keeps 576: bitmap 144 + 576 = 720 bytes.
        (lambda kernels: contrib.n_m(kernels, 2, 4), 0.5, 144 + 576),
        # floor(0.97 · 1152 + ½) = 1117 leave, 35 stay: CSR 35 · (8 + 7) + 17 · 6 = 627 bits.
        (lambda kernels: pruning.unstructured(), 0.97, 79),
        # floor(0.03 · 128 + ½) = 4 of 128 kernels leave, 1116 weights stay: no layout but dense.
        (contrib.kernels, 0.03, 1152),
        # 144 of 9 · 8/2 · 16/2 = 288 blocks of 2×2 stay: 576 weights, as above.
        (lambda kernels: contrib.blocks(kernels, 2, 2), 0.5, 144 + 576),
    ],
    ids=["n_m", "unstructured", "kernels", "blocks"],
)
def test_packed_bytes_of_masks(granularity, sparsity, smallest, key):
    scores, x = {"w": jax.random.uniform(key, (3, 3, 8, 16))}, jnp.ones((1, 4, 4, 8))
    numbers = ("NHWC", "HWIO", "NHWC")
    conv = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=numbers)
    kernels = core.trace(lambda p, x: conv(x, p["w"], (1, 1), "SAME"), scores, x).kernels
    mask = pruning.masks(scores, sparsity, granularity(kernels))["w"]
    matrix = np.asarray(mask).reshape(-1, 16).T
    sizes = [-(-len(s) // 8) for s in encoded(matrix, matrix.astype(int), 8).values()]
    assert cost.packed_bytes(16, 72, int(matrix.sum()), 8) == min(sizes) == smallest
