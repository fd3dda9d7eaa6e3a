import errno
import itertools
import json
import os
import random
import re
import struct
import tracemalloc
import zlib

import hypothesis.extra.numpy as st_numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax import core, cost, quantization
from hybrid_jax.deploy import packed, packed_header, packed_record

INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32"]


def split(data):
    """The header of a file as a dict, and its payload."""
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header, payload):
    """A file of them with a right checksum of the header, as someone who means harm makes it."""
    text = (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    )
    text += b" " * (-len(text) % 8)
    zeroed = re.sub(rb"^(.{26}).{8}", rb"\g<1>00000000", text)
    text = zeroed[:26] + b"%08x" % zlib.crc32(zeroed) + zeroed[34:]
    return struct.pack("<Q", len(text)) + text + payload


def same(got, want):
    """Whether two arrays have the same dtype, shape and bits."""
    want = np.asarray(want)
    return (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes())


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert same(got[name].values, tensor.values), name
        assert tuple(got[name].rows) == tuple(tensor.rows)
        for part in ("scale", "zero_point"):
            ours, theirs = getattr(got[name], part), getattr(tensor, part)
            assert (ours is None) == (theirs is None)
            assert theirs is None or same(ours, theirs)


def stream_of(values, bits=None, rows=()):
    """The record and the stored bytes of one array."""
    header, payload = split(packed.encode({"w": packed.Tensor(values, bits, rows)}))
    return header["__metadata__"]["w:values"].split(" ", 1)[1], payload


# What the docstring of the format says, bit by bit and in plain Python: another reader.
def read_by_the_docs(data):
    (length,) = struct.unpack_from("<Q", data)
    head, payload = data[8 : 8 + length], data[8 + length :]
    assert int(head[26:34], 16) == zlib.crc32(head[:26] + b"0" * 8 + head[34:])
    header = json.loads(head)
    fields, found = header.pop("__metadata__"), {}
    # Zero points first.
    for key in sorted(header, key=lambda key: not key.endswith(":zero_point")):
        crc, dtype, bits, shape, rows, layout, stored, coding = fields[key].split(" ")
        first, end = header[key]["data_offsets"]
        data = payload[first:end]
        assert int(crc, 16) == zlib.crc32(data)
        data = zlib.decompress(data) if coding == "zlib" else data
        bits, stored, shape, rows = int(bits), int(stored), json.loads(shape), json.loads(rows)
        place, stream = 0, int.from_bytes(data, "little")

        def number(width, stream=stream):
            nonlocal place
            value, place = stream >> place & (1 << width) - 1, place + width
            return value

        def value(bits=bits, dtype=dtype, number=number):
            n = number(bits)
            return n - (1 << bits) if dtype.startswith("int") and n >> bits - 1 else n

        indices = list(itertools.product(*map(range, shape)))
        columns = [axis for axis in range(len(shape)) if axis not in rows]
        matrix = {}  # row: its indices, by column
        for index in indices:
            row = tuple(index[axis] for axis in rows)
            matrix.setdefault(row, {})[tuple(index[axis] for axis in columns)] = index
        matrix = [[line[c] for c in sorted(line)] for _, line in sorted(matrix.items())]
        if layout == "dense":
            numbers = {index: value() for index in indices}
        elif layout == "bitmap":
            kept = [index for line in matrix for index in line if number(1)]
            numbers = {index: value() for index in kept}
        else:
            values = [value() for _ in range(stored)]
            places = [number((len(matrix[0]) - 1).bit_length()) for _ in range(stored)]
            before = [number(stored.bit_length()) for _ in range(len(matrix) + 1)]
            ranges = enumerate(itertools.pairwise(before))
            numbers = {matrix[r][places[i]]: values[i] for r, ends in ranges for i in range(*ends)}
        zero = found.get(key.replace(":values", ":zero_point"), {(): 0})
        found[key] = {i: numbers.get(i, zero.get(i, zero.get((), 0))) for i in indices}
    return found


def test_streams_worked_out_by_hand():
    # 3 bits, lowest first: 1 = 100, −2 = 110 → 011, 3 = 110; 100 011 11|0 0000000.
    assert stream_of(np.array([1, -2, 3], np.int8), 3) == (
        "int8 3 [3] [] dense 3 raw",
        bytes([0b11110001, 0b00000000]),
    )
    # 8 places, 2 kept, of 8 bits: bitmap 8 + 16 = 24 bits; CSR 2 · (8 + 3) + 2 · 2 = 26; dense 64.
    assert stream_of(np.array([0, 5, 0, 0, 0, 0, 0, 9], np.uint8)) == (
        "uint8 8 [8] [] bitmap 2 raw",
        bytes([0b10000010, 5, 9]),
    )
    # Axis 1 of (4, 2) has the rows: (0 0 7 0) and (0 −1 0 0). CSR: 2 values of 8 bits, columns 2
    # and 1 in 2 bits, offsets 0 1 2 in 2 bits: 26 bits; bitmap 8 + 16 = 24 bits, here 0010 0100.
    values = np.array([[0, 0], [0, -1], [7, 0], [0, 0]], np.int8)
    assert stream_of(values, rows=(1,)) == (
        "int8 8 [4,2] [1] bitmap 2 raw",
        bytes([0b00100100, 7, 255]),
    )
    # The same with 8 zeros more in each row: columns in ⌈log2 12⌉ = 4 bits, 2 · 12 + 6 = 30 bits
    # against 24 + 16. Values 7, −1; columns 2, 1; offsets 0, 1, 2 in 2 bits: 00, 10, 01.
    assert stream_of(np.pad(values, ((0, 8), (0, 0))), rows=(1,)) == (
        "int8 8 [12,2] [1] csr 2 raw",
        bytes([7, 255, 0x12, 0b00100100]),
    )
    # Nothing but zeros needs no byte.
    assert stream_of(np.zeros(9, np.float32)) == ("float32 32 [9] [] csr 0 raw", b"")


@st.composite
def tensor(draw):
    dtype = draw(st.sampled_from(list(packed_record.DTYPES)))
    shape = draw(st_numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    least, most = packed_record.widths(dtype)
    bits = draw(st.integers(least, most))
    rows = tuple(draw(st.permutations(range(len(shape))))[: draw(st.integers(0, len(shape)))])
    codes = rng.integers(0, 2**bits, shape, np.uint64)
    codes = np.where(rng.random(shape) < draw(st.sampled_from([0.02, 0.3, 1])), codes, 0)
    values = codes.astype(f"u{packed_record.np_dtype(dtype).itemsize}")
    scale = zero_point = None
    if dtype in INTEGERS:
        if dtype.startswith("int"):
            values = (codes.astype(np.int64) ^ 1 << bits - 1) - (1 << bits - 1)
        values = values.astype(dtype)
        if draw(st.booleans()):
            grid = [
                draw(st.sampled_from([n, *({1, n // 2} if n % 2 == 0 and n else [])]))
                for n in shape
            ]
            scale = rng.random(grid if draw(st.booleans()) else ()).astype(np.float32)
            low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if dtype[0] == "i" else (0, 2**bits)
            zero_point = rng.integers(low, high, scale.shape).astype(dtype)
            if draw(st.booleans()):  # What is pruned has the zero point.
                wide = np.asarray(quantization.spread(zero_point, shape))
                values = np.where(codes == 0, np.broadcast_to(wide, shape), values)
    else:
        values = values.view(packed_record.np_dtype(dtype))
    return packed.Tensor(values, bits, rows, scale, zero_point)


@settings(deadline=None, max_examples=150)
@given(tensors=st.dictionaries(st.text(st.characters(codec="utf-8")), tensor(), max_size=3))
@pytest.mark.parametrize("small", [False, True])
def test_the_exact_arrays_come_back(tensors, small):
    metadata = {"classes": 10, "names": ["ä", "\ud800"], "x": [1.5e-7, None, True]}
    data = packed.encode(tensors, metadata, compress=tensors if small else ())
    got, read = packed.decode(data)
    assert read == metadata
    assert_same(got, tensors)
    by_the_docs = read_by_the_docs(data)
    for name, want in tensors.items():
        assert got[name].bits == want.bits
        codes = want.values
        if want.values.dtype.name not in INTEGERS:
            codes = codes.view(f"u{codes.dtype.itemsize}")
        expected = {i: int(codes[i]) for i in np.ndindex(codes.shape)}
        blocks = want.zero_point is not None and want.zero_point.shape not in ((), codes.shape)
        assert blocks or by_the_docs[f"{name}:values"] == expected
    safetensors.deserialize(data)  # It is a file of theirs.


def test_other_readers_see_whole_numbers_as_they_are(tmp_path):
    tensors = {
        "bias": packed.Tensor(np.arange(3, 10, dtype=np.int32)),
        "kernel": packed.Tensor(np.arange(-8, 8, dtype=np.int8).reshape(4, 4), 4),
        "mean": packed.Tensor(jnp.linspace(1, 2, 5)),
        "table": packed.Tensor(np.arange(1, 7, dtype=np.uint8).reshape(2, 3)),
    }
    packed.save(tmp_path / "model", tensors)
    found = safetensors.numpy.load_file(tmp_path / "model")
    for name in ("bias", "mean", "table"):
        assert same(found[f"{name}:values"], tensors[name].values)
    # −8 and −7 are 1000 and 1001, the first in the low half of a byte.
    assert found["kernel:values"].shape == (8,)
    assert found["kernel:values"][0] == 0b10011000
    header, _ = split((tmp_path / "model").read_bytes())
    for entry in header.values():  # Items of 4 bytes start at multiples of 4.
        size = {"I32": 4, "F32": 4}.get(entry.get("dtype"), 1)
        assert entry.get("data_offsets", [0])[0] % size == 0


def test_the_order_of_bytes_in_memory_does_not_matter():
    values = np.array([1, 2**20, -3], ">i4")
    (got,) = packed.decode(packed.encode({"t": packed.Tensor(values[::2])}))[0].values()
    assert same(got.values, np.array([1, -3], np.int32))


def test_floats_come_back_to_the_bit():
    floats = np.array([0x7FC00001, 0x80000000, 0, 0xFF800000, 1], np.uint32).view(np.float32)
    signs = packed.Tensor(
        np.array([[1, 0, 0, 0, 0, 0, 0, 0]], np.uint8), 1, (0,), np.float32(2), np.float32(0.5)
    )
    tensors = {"floats": packed.Tensor(floats), "signs": signs}
    assert_same(packed.decode(packed.encode(tensors))[0], tensors)


@pytest.mark.parametrize("kept", [1, 0.5, 0.03])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_payload_is_what_cost_counts(kept, bits):
    rng = np.random.default_rng(bits)
    mask = rng.permutation(1152).reshape(3, 3, 8, 16) < kept * 1152
    values = (rng.integers(1, 2 ** (bits - 1), mask.shape) * mask).astype(np.int8)
    tensors = {"w": packed.Tensor(values, bits, (3,))}
    _, payload = split(packed.encode(tensors))
    assert len(payload) == cost.packed_bytes(16, 72, int(mask.sum()), bits)
    small = packed.encode(tensors, compress=tensors)
    assert_same(packed.decode(small)[0], tensors)
    assert len(split(small)[1]) <= len(payload)


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v2"])
def test_a_quantized_model_comes_back_whole(tmp_path, small_model, name):
    model = small_model(name)
    graph = core.trace(model.fn, model.params, model.images)
    sites = {site.path: site for site in graph.sites}
    params = core.map_with_path(
        lambda path, x: (
            jnp.where(jnp.abs(x) < jnp.median(jnp.abs(x)), 0.0, x) if path in sites else x
        ),
        model.params,
    )
    spec = quantization.spec(graph, rules=[(".*", {"weight": 4, "activation": 32})])
    ranges = quantization.calibrate(model.fn, params, [(model.images,)], spec)
    integers = quantization.integer_kernels(model.fn, spec, params, ranges, model.images)
    tensors = {
        path: packed.Tensor(
            integers[path].values, 4, sites[path].kernel_out_axes, integers[path].grid.scale
        )
        if path in sites
        else packed.Tensor(leaf)
        for path, leaf in core.flatten_paths(params).items()
    }
    manifest = packed.save(tmp_path / "model", tensors)
    got, _ = packed.load(tmp_path / "model")
    assert_same(got, tensors)

    # The bytes of the report: no weight that stays is so small that it rounds to zero here.
    masks = core.map_with_path(lambda path, x: x != 0 if path in sites else None, params)
    bits, scales = dict.fromkeys(sites, 4), quantization.scale_counts(graph, spec)
    counted = cost.count(graph, masks, bits, scales=scales).bytes
    assert manifest["payload_bytes"] == counted
    assert manifest["bytes"] == (tmp_path / "model").stat().st_size
    # Of header some 195 bytes for each array.
    assert manifest["bytes"] - counted < 220 * (len(tensors) + len(sites))

    def number(path):
        tensor = got[path]
        if tensor.scale is None:
            return jnp.asarray(tensor.values)
        return jnp.asarray(tensor.values, jnp.float32) * tensor.scale

    reloaded = core.map_with_path(lambda path, _: number(path), params)
    logits = jax.jit(model.fn)(reloaded, model.images)
    expected = jax.jit(quantization.fake_quantized(model.fn, spec))(params, ranges, model.images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)  # of two programs


def sparse(shape, kept, dtype=np.int8, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.integers(1, 8, shape) * (rng.random(shape) < kept)).astype(dtype)


TENSORS = {
    "../dense": packed.Tensor(sparse((3, 5, 7), 1), 4, (2,), np.ones((1, 1, 7), np.float32)),
    "bitmap": packed.Tensor(sparse((24, 8), 0.4), 4, (1,), np.float32(0.5), np.int8(0)),
    "csr": packed.Tensor(sparse((64, 4), 0.03), 4, (1,)),
    "repeated": packed.Tensor(np.full((4, 50), 3, np.uint8), 5),
    "mean": packed.Tensor(np.linspace(1, 2, 9, dtype=np.float32)),
    "none": packed.Tensor(np.zeros((0, 3), np.int16)),
}
METADATA = {"classes": 10, "layers": ["conv", "dense"]}
PLAIN, COMPRESSED = (packed.encode(TENSORS, METADATA, compress=names) for names in ((), TENSORS))


def test_names_are_never_paths(tmp_path):
    tensors = {
        name: packed.Tensor(np.array([i], np.int8))
        for i, name in enumerate(["../up", "/root", "a/../b", "C:\\x", "", ".", "a:scale", "\0"])
    }
    folder = tmp_path / "in"
    packed.save(folder / "model", tensors)
    assert_same(packed.load(folder / "model")[0], tensors)
    found = {path.name for path in tmp_path.rglob("*")}
    assert found == {"in", "model", "model.json"}


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model"
    packed.save(path, TENSORS, METADATA)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            packed.save(path, {}, None)
    tensors, metadata = packed.load(path)
    assert_same(tensors, TENSORS)
    assert metadata == METADATA
    assert {file.name for file in tmp_path.iterdir()} == {"model", "model.json"}


def test_the_file_alone_is_enough(tmp_path):
    packed.save(tmp_path / "model", TENSORS)
    (tmp_path / "model.json").unlink()
    assert_same(packed.load(tmp_path / "model")[0], TENSORS)
    with pytest.raises(FileNotFoundError, match="absent"):
        packed.load(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"max_bytes must be an integer of at least 0, got -1"):
        packed.load(tmp_path / "model", max_bytes=-1)
    (tmp_path / "model").write_bytes(PLAIN[:-1])
    with pytest.raises(ValueError, match=r"model is no packed file to read: end of"):
        packed.load(tmp_path / "model")


INT8 = np.ones((2, 4), np.int8)
FLOAT = np.float32(1)


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (packed.Tensor(np.ones(3)), r"dtype of 't:values' must be one of .*got 'float64'"),
        (packed.Tensor(np.array(["a"])), r"dtype of 't:values' must be one of .*got 'str32'"),
        (packed.Tensor(None), r"'t' must have values, got \[\]"),
        (packed.Tensor(INT8, 0), r"bits of 't:values' in int8 must be .* in \[1, 8\], got 0"),
        (packed.Tensor(INT8, 9), r"bits of 't:values' in int8 must be .* in \[1, 8\], got 9"),
        (packed.Tensor(INT8, 1), r"'t:values' must have values in \[-1, 0\] .*got 1 to 1"),
        (packed.Tensor(INT8.view(np.uint8) + 15, 4), r"in \[0, 15\] for 4 bits, got 16 to 16"),
        (packed.Tensor(np.ones(2, np.float32), 8), r"bits .* in float32 must be .*got 8"),
        (packed.Tensor(INT8, rows=(2,)), r"axis of the rows of 't:values' .* \[0, 1\], got 2"),
        (packed.Tensor(INT8, rows=(0, 0)), r"rows of 't:values' must be different axes"),
        (packed.Tensor(INT8, scale=np.ones((2, 4))), r"dtype of 't:scale' must be .*float64"),
        (packed.Tensor(INT8, scale=np.ones(2, np.float32)), r"must be \(\) or divide \(2, 4\)"),
        (packed.Tensor(INT8, scale=np.ones((1, 3), np.float32)), r"divide .* got \(1, 3\)"),
        (packed.Tensor(INT8, zero_point=np.int8(1)), r"must have scale and values"),
        (packed.Tensor(INT8, 4, (), FLOAT, np.int32(8)), r"'t:zero_point' .* \[-8, 7\] .*got 8"),
        (packed.Tensor(INT8, 4, (), FLOAT, np.ones((1, 1), np.int8)), r"must be \(\), got \(1, 1"),
        (packed.Tensor(FLOAT, None, (), FLOAT, np.int8(1)), r"zero_point' must be one of float32,"),
    ],
)
def test_refuses_to_save(tensor, match):
    with pytest.raises(ValueError, match=match):
        packed.encode({"t": tensor})


def test_refuses_to_save_other_things():
    with pytest.raises(TypeError, match=r"\{str: Tensor\}, got 't': ndarray"):
        packed.encode({"t": INT8})
    with pytest.raises(TypeError, match=r"\{str: Tensor\}, got 3: Tensor"):
        packed.encode({3: packed.Tensor(INT8)})
    with pytest.raises(ValueError, match=r"names must be Unicode text, got '\\ud800:values'"):
        packed.encode({"\ud800": packed.Tensor(INT8)})
    for metadata in ({1, 2}, float("nan"), {1: 2, "1": 3}):
        with pytest.raises(ValueError, match="metadata must be"):
            packed.encode({}, metadata)
    with pytest.raises(ValueError, match="bytes of the header must be"):
        packed.encode({}, "x" * packed_header.MAX_HEADER)


def edit(change):
    """The plain file after `change(fields, entries)`, with a right checksum of its header."""
    header, payload = split(PLAIN)
    change(header["__metadata__"], header)
    return join(header, payload)


def record(name, old, new):
    def change(fields, entries):
        assert old in fields[name]
        fields[name] = fields[name].replace(old, new)

    return edit(change)


def entry(name, **new):
    return edit(lambda fields, entries: entries[name].update(new))


def text(old, new):
    """The plain file with a piece of its header's text replaced."""
    (length,) = struct.unpack_from("<Q", PLAIN)
    header, payload = PLAIN[8 : 8 + length].rstrip(), PLAIN[8 + length :]
    assert header.count(old) == 1
    return join(header.replace(old, new), payload)


HUGE = 10**17


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", r"bytes of the file must be an integer of at least 8, got 0"),
        (
            struct.pack("<Q", 2**63) + b"{}",
            r"bytes of the header must be .*got 9223372036854775808",
        ),
        (
            struct.pack("<Q", 10) + b"{}",
            r"bytes of the header must be an integer in \[0, 2\], got 10",
        ),
        (struct.pack("<Q", 8) + b"{}      ", r"header must start with"),
        (PLAIN + b"x", r"the file must have \d+ bytes, got \d+"),
        (PLAIN[:-1], r"must be an integer in \[\d+, \d+\], got \d+"),
        (record("csr:values", "[64,4]", f"[{HUGE},4]"), r"layout of|bytes of"),
        (record("none:values", "[0,3]", f"[0,{HUGE}]"), r"entry of 'none:values' must be"),
        (record("csr:values", "csr", "coo"), r"layout of 'csr:values' must be one of"),
        (record("csr:values", " csr ", " dense "), r"layout of 'csr:values' must be csr"),
        (record("csr:values", "int8 4", "int8 5"), r"bytes of 'csr:values' must be"),
        (record("csr:values", "int8 4", "int8 44"), r"bits of 'csr:values' in int8 must be"),
        (record("csr:values", "int8", "int64"), r"dtype of 'csr:values' must be one of"),
        (record("csr:values", "int8", "int08"), r"dtype of 'csr:values' must be one of"),
        (record("csr:values", "[1]", "[2]"), r"axis of the rows"),
        (record("csr:values", "[1]", "[1,1]"), r"rows of .* must be different"),
        (record("csr:values", "[1]", "[-1]"), r"record of 'csr:values' must have 8 fields"),
        (record("csr:values", "[64,4]", "[064,4]"), r"record of .* must have 8 fields"),
        (record("csr:values", "[64,4]", "[" + "1," * 50 + "256]"), r"rank of .*\[0, 32\], got 51"),
        (record("csr:values", "raw", "zlib"), r"bytes of 'csr:values' must be"),
        (record("csr:values", "raw", "lzma"), r"coding of 'csr:values' must be one of"),
        (record("csr:values", "raw", "raw raw"), r"must have 8 fields"),
        (entry("mean:values", dtype="F64"), r"entry of 'mean:values' must be"),
        (entry("mean:values", shape=[9.0]), r"entry of 'mean:values' must be"),
        (entry("mean:values", more=1), r"entry of 'mean:values' must be"),
        (entry("mean:values", data_offsets=[0, -1]), r"end of 'mean:values' must be"),
        (entry("mean:values", data_offsets=[0, HUGE]), r"end of 'mean:values' must be"),
        (entry("mean:values", data_offsets=[0, 37.0]), r"end of 'mean:values' must be"),
        (entry("mean:values", data_offsets=[0]), r"must have data_offsets"),
        (entry("csr:values", data_offsets=[0, 30]), r"end of 'csr:values' must be"),
        (edit(lambda f, e: e.update({"mean:values": [1]})), r"must have data_offsets"),
        (edit(lambda f, e: e.pop("csr:values")), r"a record and an entry, .* 'csr:values'"),
        (edit(lambda f, e: f.pop("csr:values")), r"a record and an entry, .* 'csr:values'"),
        (edit(lambda f, e: f.update(format="hybrid_jax packed 2")), r"format must be one of"),
        (edit(lambda f, e: f.pop("format")), r"format must be one of"),
        (edit(lambda f, e: f.update({"csr:values": 3})), r"must have a string at 'csr:values'"),
        (edit(lambda f, e: f.update(metadata="[" * 100_000)), r"metadata must be JSON"),
        (edit(lambda f, e: f.update(metadata='{"a":1,"a":1}')), r"metadata .*no name twice"),
        (edit(lambda f, e: f.update(metadata="NaN")), r"metadata must be JSON"),
        (
            text(b'"mean:values":{', b'"mean:values":' + b"[" * 100_000 + b"{"),
            r"header must be JSON",
        ),
        (text(b'"shape":[9]', b'"shape":[9' + b"0" * 9000 + b"]"), r"header must be JSON"),
        (text(b'"shape":[9]', b'"shape":[9],"shape":[9]'), r"header must be JSON"),
        (text(b'"shape":[9]', b'"shape":[ 9]'), r"header must be JSON"),
        (text(b'"shape":[9]', b'"sh\\u0061pe":[9]'), r"header must be JSON"),
        (text(b'"shape":[9]', b'"shape":[\xff]'), r"header must be JSON"),
        (text(b'"mean:values":{', b'"csr:values":{},"mean:values":{'), r"header must be JSON"),
    ],
)
def test_refuses_what_was_made_to_harm(data, match):
    with pytest.raises(ValueError, match=match):
        packed.decode(data)


def rebuilt(data, change):
    """The file of one array 't:values' after change(its bytes), with right checksums."""
    header, payload = split(data)
    payload = bytes(change(bytearray(payload)))
    fields = header["__metadata__"]["t:values"].split(" ")
    header["__metadata__"]["t:values"] = " ".join([f"{zlib.crc32(payload):08x}", *fields[1:]])
    header["t:values"].update(shape=[len(payload)], data_offsets=[0, len(payload)])
    return join(header, payload)


def put(place, value):
    def change(payload):
        payload[place] = value
        return payload

    return change


# As in the test by hand: values 7, −1 in 8 bits; columns 2, 1 in 4 bits; offsets 0, 1, 2 in 2 bits.
TWO = np.pad(np.array([[0, 0], [0, -1], [7, 0]], np.int8), ((0, 9), (0, 0)))
CSR = packed.encode({"t": packed.Tensor(TWO, rows=(1,))})
BITMAP = packed.encode({"t": packed.Tensor(np.array([0, 5, 0, 0, 0, 0, 0, 9], np.uint8))})


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (rebuilt(CSR, put(3, 0b00100101)), r"offsets of 't:values' must rise from 0 to 2"),
        (rebuilt(CSR, put(3, 0b00101100)), r"offsets of 't:values' must rise from 0 to 2"),
        (rebuilt(CSR, put(3, 0b00110100)), r"offsets of 't:values' must rise from 0 to 2"),
        (rebuilt(CSR, put(2, 0x1C)), r"columns of 't:values' must rise .* below 12"),
        (rebuilt(CSR, put(3, 0b00101000)), r"columns of 't:values' must rise"),
        (rebuilt(CSR, put(3, 0b01100100)), r"'t:values' must end in zero bits, got 01100100"),
        (rebuilt(BITMAP, put(0, 0b10000011)), r"bitmap of 't:values' must keep 2 values, got 3"),
    ],
)
def test_refuses_contents_that_contradict(data, match):
    with pytest.raises(ValueError, match=match):
        packed.decode(data)


def test_what_would_become_large_is_refused_before(tmp_path):
    tensor, path = packed.Tensor(np.full(9000, 3, np.int8)), tmp_path / "model"
    small = packed.encode({"t": tensor}, compress=["t"])
    bomb = rebuilt(small, lambda _: zlib.compress(bytes(5_000_000), 9))
    cut = rebuilt(small, lambda _: zlib.compress(bytes(9000))[:-1])
    more = rebuilt(small, lambda _: zlib.compress(bytes(9000)) + b"x")
    other = rebuilt(small, lambda _: bytes(10))
    long = rebuilt(small, lambda _: bytes(9000))
    path.touch()
    os.truncate(path, 1 << 36)  # A file of holes.
    header, payload = split(packed.encode({"t": packed.Tensor(np.zeros(1, np.int8))}))
    header["__metadata__"]["t:values"] = "00000000 int8 8 [1000000000000] [] csr 0 raw"
    tracemalloc.start()
    try:
        for contents in (bomb, cut, more):
            with pytest.raises(ValueError, match=r"'t:values' must inflate to 9000 bytes"):
                packed.decode(contents)
        with pytest.raises(ValueError, match=r"'t:values' must be a zlib stream"):
            packed.decode(other)
        with pytest.raises(ValueError, match=r"bytes of 't:values' must be .*8999\], got 9000"):
            packed.decode(long)
        with pytest.raises(ValueError, match=r"bytes of all arrays must be .*got 1000000000000"):
            packed.decode(join(header, payload))
        with pytest.raises(ValueError, match=r"bytes of all arrays must be .*8999\], got 9000"):
            packed.decode(small, max_bytes=8999)
        with pytest.raises(ValueError, match=r"model must have at most \d+ bytes, got 68719476736"):
            packed.load(path)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()
    assert_same(packed.decode(small, max_bytes=9000)[0], {"t": tensor})


def refused_or_loaded(data, max_bytes):
    """The arrays of a file, or None; any other exception than ValueError is a failure."""
    try:
        return packed.decode(data, max_bytes)
    except ValueError:
        return None


def test_a_bit_flipped_anywhere_is_refused():
    for bit in range(8 * len(COMPRESSED)):
        damaged = bytearray(COMPRESSED)
        damaged[bit // 8] ^= 1 << bit % 8
        assert refused_or_loaded(bytes(damaged), 1 << 16) is None, bit


def damage(rng, data):
    """What storage and transfer do: bits flip, bytes get lost, repeated, moved or overwritten."""
    data = bytearray(data)
    i, j = sorted(rng.randrange(len(data) + 1) for _ in "ij")
    kind = rng.randrange(7)
    if kind == 0:
        for _ in range(rng.randint(2, 9)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[i:]
    elif kind == 2:
        del data[i:j]
    elif kind == 3:
        data[i:i] = data[i:j]
    elif kind == 4:
        data[i:j] = bytes(j - i)
    elif kind == 5:
        data[i : i + 4] = rng.randbytes(4)
    else:
        data[:j] = data[i:j] + data[:i]
    return bytes(data)


def test_damaged_files_are_refused():
    rng = random.Random(0)
    for case in range(10_000):
        data = (PLAIN, COMPRESSED)[case % 2]
        damaged = damage(rng, data)
        found = refused_or_loaded(damaged, 1 << 16)
        assert (found is None) == (damaged != data), case


NASTY = [0, 1, 2, 3, 7, 8, 31, 32, 33, 64, 192, 255, 256, 2**16, 2**31, 2**40, 2**62, 2**63, 10**17]
OTHERS = [-1, 1.5, True, None, "", "x", [], {}, [0], [2**62, 2**62], [0, -1], "9" * 5000]


def harm(rng, data):
    """What someone does who knows the format: fields of the header or arrays, checksums right."""
    header, payload = split(data)
    fields = header["__metadata__"]
    for _ in range(rng.choice([1, 1, 2, 4])):
        names = [name for name in header if name != "__metadata__"]
        name, other = rng.choice(names), rng.choice(names)
        part = str(fields.get(name, "")).split(" ")
        kind = rng.randrange(9)
        if kind == 0 and len(part) == 8:  # A field of a record, of another or any.
            place = rng.randrange(1, 8)
            known = str(fields.get(other, "")).split(" ")
            choices = [str(rng.choice(NASTY)), f"[{rng.choice(NASTY)},{rng.choice(NASTY)}]"]
            part[place] = rng.choice([*choices, *known[place : place + 1]])
            fields[name] = " ".join(part)
        elif kind == 1 and len(part) == 8:  # A number in a record.
            numbers = list(re.finditer(r"\d+", fields[name][9:]))
            span = rng.choice(numbers).span()
            text = fields[name][9:]
            fields[name] = (
                part[0] + " " + text[: span[0]] + str(rng.choice(NASTY)) + text[span[1] :]
            )
        elif kind == 2 and isinstance(header[name], dict):
            key = rng.choice(["dtype", "shape", "data_offsets", "more"])
            header[name][key] = rng.choice([*OTHERS, "U8", "F64", [rng.choice(NASTY)]])
        elif kind == 3 and isinstance(header[name], dict):
            offsets = header[name].get("data_offsets")
            if isinstance(offsets, list) and offsets:
                offsets[rng.randrange(len(offsets))] = rng.choice(NASTY)
        elif kind == 4:
            header[name], header[other] = header[other], header[name]
        elif kind == 5:
            fields[rng.choice([*fields])] = rng.choice([*OTHERS, "x:values", fields.get(other, "")])
        elif kind == 6:
            for place in (header, fields):
                if name in place:
                    place[rng.choice(["t:values", "t:scale", "t:zero_point", other])] = place.pop(
                        name
                    )
        elif kind == 7 and payload:
            changed = bytearray(payload)
            changed[rng.randrange(len(changed))] = rng.choice([0, 255, rng.randrange(256)])
            payload = bytes(changed)
        else:
            length = rng.choice([0, 1, len(payload) - 1, len(payload) + 1, 2 * len(payload)])
            payload = (payload * 2)[: max(length, 0)]
        for key, entry in header.items():  # The arrays' checksums are right again, where they can.
            try:
                first, end = entry["data_offsets"]
                checksum = zlib.crc32(payload[first:end])
                fields[key] = f"{checksum:08x}" + fields[key][8:]
            except (KeyError, TypeError, ValueError):
                continue
    text = json.dumps(header, separators=(",", ":")).encode()
    if rng.random() < 0.2:  # One character of the header, too.
        i = rng.randrange(36, len(text))
        text = text[:i] + rng.choice([b"", b" ", b'"', b"9", b"]", text[i : i + 2]]) + text[i + 1 :]
    return join(text, payload)


def harmful(seed, count):
    rng = random.Random(seed)
    return (harm(rng, (PLAIN, COMPRESSED)[case % 2]) for case in range(count))


def test_harmful_files_are_refused_or_say_what_they_hold():
    loaded = [found for data in harmful(0, 10_000) if (found := refused_or_loaded(data, 1 << 15))]
    # With right checksums another value, scale or name is another model, to be trusted or not.
    assert 100 < len(loaded) < 1_000
    for tensors, metadata in loaded:
        assert_same(packed.decode(packed.encode(tensors, metadata))[0], tensors)


def test_harmful_files_take_little_memory():
    most = 1 << 15
    tracemalloc.start()
    try:
        for case, data in enumerate(harmful(1, 1_000)):
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            refused_or_loaded(data, most)
            # Whatever sizes a file claims: a few times `most`, and its header as Python objects.
            assert tracemalloc.get_traced_memory()[1] - before < 8 * most, case
    finally:
        tracemalloc.stop()
