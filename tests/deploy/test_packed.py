"""Programs in packed files: what comes back, in how many bytes, and what is refused."""

import dataclasses
import hashlib
import json
import time
import tracemalloc
import zlib
from typing import Any

import choices
import hypothesis.extra.numpy as st_numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from built import Build, Q
from hypothesis import given
from hypothesis import strategies as st
from operation_cases import CASES
from safetensors import numpy as safetensors

from hybrid_jax import deploy
from hybrid_jax import program as graph
from hybrid_jax import program as p
from hybrid_jax.deploy import packed


def same(ours, theirs):
    """Whether two values are equal, arrays to the bit."""
    if dataclasses.is_dataclass(ours):
        fields = [field.name for field in dataclasses.fields(ours)]
        return type(ours) is type(theirs) and all(
            same(getattr(ours, name), getattr(theirs, name)) for name in fields
        )
    if isinstance(ours, np.ndarray):
        ends = [(a.dtype, a.shape, a.tobytes()) for a in (ours, theirs)]
        return ends[0] == ends[1]
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def dense(values, scale, bias, bits):
    """A program of one layer of integers, (C,) to (O,)."""
    tensors = {
        "x": p.Tensor(values.shape[:1]),
        "q": p.Tensor(values.shape[:1], p.Encoding(0.1, 128)),
        "y": p.Tensor(bias.shape),
    }
    weights = p.Weights(values, scale, bias, bits)
    steps = (graph.Convert(("x",), "q"), graph.Dense(("q",), "y", "dense", weights))
    return p.Program("x", "y", tensors, steps)


def test_a_program_comes_back_exactly(tmp_path, lowered):
    for program in (lowered.floats, lowered.integers):
        deploy.save_program(tmp_path / "model", program)
        (tmp_path / "model.json").unlink()  # The file alone is enough.
        loaded = deploy.load_program(tmp_path / "model")
        assert same(loaded, program)
        images = lowered.images[:32]
        run, again = (jax.jit(p.run(each)) for each in (program, loaded))
        np.testing.assert_array_equal(run(images), again(images))


@pytest.mark.parametrize("made", [choices.mixture, choices.cascade])
def test_a_choice_comes_back(tmp_path, made):
    program = made()
    deploy.save_program(tmp_path / "model", program)
    assert same(deploy.load_program(tmp_path / "model"), program)


def again(value, *classes):
    """What comes back of a value, through JSON and bits."""
    pools = {"float32": [np.zeros(0, np.float32)], "bits": [np.zeros(0, np.uint8)]}
    classes = {kind.__name__: kind for kind in [*packed._classes().values(), *classes]}
    described = json.loads(json.dumps(packed._plain(value, classes, pools)))
    left = {name: np.concatenate(arrays) for name, arrays in pools.items()}
    found = packed._restored(described, classes, left)
    assert not any(pool.size for pool in left.values())
    return found


def test_every_operation_comes_back():
    for name, case in CASES.items():
        assert same(again(case.op), case.op), name


@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    steps: tuple[graph.Step, ...]
    constants: tuple[np.ndarray, ...]
    encodings: dict[str, graph.Encoding | None]
    value: Any


def test_what_operations_may_come_to_hold_comes_back():
    steps = (
        graph.Step("exp", (0,)),
        graph.Step("convert", (1, 2), (("dtype", "int8"), ("axis", -1))),
    )
    constants = (np.arange(3), np.float32([0.1]), np.full((2, 0), 3, np.int32))
    encodings = {"is": graph.Encoding(0.1, 3), "x": None}
    whole = Whole(steps, constants, encodings, {(1, "a"): (float("-inf"), np.uint8([7]))})
    found = again(whole, Whole)
    assert same(found, whole)
    assert [type(step) for step in found.steps] == [graph.Step] * 2
    # jax's arrays are NumPy's, and NumPy's numbers Python's.
    assert same(again((jnp.arange(3), np.float32(0.5))), (np.arange(3, dtype=np.int32), 0.5))


def test_the_classes_are_those_that_fields_of_a_program_hold():
    names = {"Program", "Mixture", "Cascade", "Tensor", "Encoding", "Weights", "Conv", "Softmax"}
    assert names <= packed._classes().keys()


@pytest.mark.parametrize("bits", [1, 2, 4, 7, 8])
def test_a_kernel_takes_its_bits(tmp_path, bits):
    most = max(2 ** (bits - 1) - 1, 1)
    q = np.resize([-most, most, *([most - 1, 1 - most] if bits > 1 else [])], (5, 3))
    step = {1: 32, 2: 32, 4: 8, 7: 1, 8: 1}[bits]
    scale, bias = np.float32([0.1, 0.2, 0.3]), np.float32([1, 2, 3])
    program = dense((q * step).astype(np.int8), scale / np.float32(step), bias, bits)
    manifest = deploy.save_program(tmp_path / "model", program)
    assert manifest["kernel_bits"] == [bits]
    # 15 weights, and a scale and a bias of 4 bytes for each of 3 channels.
    stored = safetensors.load_file(tmp_path / "model")
    assert stored["bits"].nbytes == -(-15 * bits // 8)
    np.testing.assert_array_equal(
        stored["float32"], [*program.operations[1].weights.scale, 1, 2, 3]
    )
    assert same(deploy.load_program(tmp_path / "model"), program)


def test_the_bytes_of_a_kernel_by_hand(tmp_path):
    # −56, −48, 56 are −56 + 8 · (0, 1, 14): 4 bits each, the first in the low half of a byte.
    ones = np.ones(1, np.float32)
    deploy.save_program(tmp_path / "model", dense(np.int8([[-56], [-48], [56]]), ones, ones, 4))
    stored = safetensors.load_file(tmp_path / "model")
    assert stored["bits"].tolist() == [0x10, 0x0E]
    dense_layer = json.loads(zlib.decompress(stored["graph"]))["operations"][1]
    described = {"is": "int8", "shape": [3, 1], "bits": 4, "low": -56, "step": 8}
    assert dense_layer["weights"]["values"] == described


WIDEST = 2**62 - 2**31, 2**62 + 2**31 - 1


@given(
    st.sampled_from(packed._DTYPES[1:]).flatmap(
        lambda kind: st_numpy.arrays(
            kind,
            st_numpy.array_shapes(min_dims=0, min_side=0),
            elements=st.integers(*WIDEST) if kind == "int64" else None,
        )
    )
)
def test_integers_of_any_kind_come_back(array):
    assert same(again(array), array)


def test_integers_take_the_bits_of_their_steps():
    for values, grid in [
        ([7, 7, 7], (7, 1, 1)),
        ([-32, 32], (-32, 64, 1)),
        ([-127, 127, 0, 1], (-127, 1, 8)),
        ([-5, 3, 11], (-5, 8, 2)),
        ([2**31 - 1, -(2**31)], (-(2**31), 2**32 - 1, 1)),
        ([], (0, 1, 1)),
    ]:
        assert packed._grid(np.array(values, np.int32)) == grid


@given(st_numpy.arrays(np.int8, st.tuples(st.integers(1, 3), st.integers(1, 9))), st.integers(1, 8))
def test_bits_are_laid_as_the_docstring_says(values, bits):
    rows = packed.pack_bits(values, bits)
    for row, octets in zip(values.tolist(), rows, strict=True):
        number = sum((value & (1 << bits) - 1) << i * bits for i, value in enumerate(row))
        assert int.from_bytes(octets.tobytes(), "little") == number
        assert len(octets) == -(-len(row) * bits // 8)


def chain(kernels, channels, seed=0):
    """A float image to integers, convolutions 3×3 of 4 bits, a mean to floats."""
    b = Build((4, 4, 16), seed=seed)
    b.add(p.Slice, (4, 4, channels), Q, (0, 0, 0), (4, 4, channels), (1, 1, 1))
    for _ in range(kernels):
        b.conv(channels, bits=4)
    return b.add(p.Mean, (channels,), Q).program()


def test_header_and_graph_are_a_small_part_of_a_file(tmp_path):
    mixture = p.Mixture(chain(1, 4), tuple(chain(10, 16, seed) for seed in range(4)))
    size = deploy.save_program(tmp_path / "model", mixture)["bytes"]
    assert size == (tmp_path / "model").stat().st_size
    # Four experts of ten kernels in half bytes and 16 scales and biases each, and a gate of one.
    weights = 4 * 10 * (9 * 16 * 16 // 2 + 8 * 16) + 9 * 4 * 4 // 2 + 8 * 4
    assert weights < size < 1.05 * weights
    assert same(deploy.load_program(tmp_path / "model"), mixture)


def test_what_would_not_be_read_back_is_not_written(tmp_path):
    weights = graph.Weights(np.ones((2, 2)), None, np.ones(2))
    wide = graph.Weights(np.int64([0, 2**32]), None, np.ones(2, np.float32))
    for op, reason in [
        (dataclasses.make_dataclass("Other", [])(), "numbers, names and arrays, got Other"),
        (graph.Mean((len,), "y"), "numbers, names and arrays, got builtin_function_or_method"),
        (graph.Dense(("x",), "y", "dense", weights), "dtype of an array must be .* got 'float64'"),
        (graph.Dense(("x",), "y", "dense", wide), "span of the integers of an array must be"),
    ]:
        program = p.Program("x", "y", {}, (op,))
        with pytest.raises(ValueError, match=reason):
            deploy.save_program(tmp_path / "model", program)
    assert not list(tmp_path.iterdir())


def test_a_bit_flipped_anywhere_is_refused(tmp_path):
    path = tmp_path / "model"
    deploy.save_program(
        path, dense(np.int8([[8]]), np.ones(1, np.float32), np.ones(1, np.float32), 4)
    )
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path} must be a file of save_program"):
            deploy.load_program(path)
    for damaged in (b"", data[:-1], data + b"x", data[1:], data * 2):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path} must be a file of save_program"):
            deploy.load_program(path)


def forged(path, text, **tensors):
    """Writes a file of a right checksum, as someone makes it who means harm."""
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    own = {"graph": zlib.compress(text, 0), "float32": b"", "bits": b""}
    own = {name: np.frombuffer(data, np.uint8) for name, data in own.items()}
    own["float32"] = own["float32"].view(np.float32)
    own = {name: array for name, array in (own | tensors).items() if array is not None}
    data = safetensors.save(own, {packed.FORMAT: "0" * 64})
    digest = hashlib.sha256(data).hexdigest().encode()
    path.write_bytes(data.replace(b"0" * 64, digest, 1))


def described(operation=None, **changes):
    tensors = [["x", [4]], ["y", [3]], ["z", [4]], ["wide", [10**6, 10**6]]]
    tensors = [[name, {"is": "Tensor", "shape": shape}] for name, shape in tensors]
    operations = [] if operation is None else [operation]
    fields = {"is": "Program", "inputs": ["x"], "outputs": ["z"], "operations": operations}
    return fields | {"tensors": {"is": "dict", "items": tensors}} | changes


def op(kind, output="z", **fields):
    return {"is": kind, "inputs": ["x"], "output": output} | fields


def layer(values):
    weights = {"is": "Weights", "values": values, "scale": None, "bias": values}
    return described(op("Dense", name="dense", weights=weights))


HUGE = 10**15
NESTED = b"[" * 900 + b"]" * 900  # below the limit of the parser
HOSTILE = [
    (NESTED, "RecursionError|must be a Program or a choice, got tuple"),
    (described(op("Pad", "large", padding=[[0, 0]])), "KeyError: 'large'"),
    (
        described(tensors={"is": "dict", "items": [["x", {"is": "Tensor", "shape": [2**31] * 2}]]})
        | {"outputs": ["x"]},
        "entries of tensor 'x' must be an integer in .*, got 4611686018427387904",
    ),
    (b"[" * 10**5, "RecursionError"),
    (b'{"is":"dict","items":' * 10**4, "RecursionError"),
    (b"[" + b"[]," * 10**5 + b"[]]", "must be a Program or a choice, got tuple"),
    (b"\xff", "UnicodeDecodeError"),
    (b"9" * 5000, "Exceeds the limit"),
    ([], "must be a Program or a choice, got tuple"),
    ({}, "'is' in the graph must be one of Program, .* got None"),
    ({"is": []}, r"'is' in the graph must be one of Program, .* got \[\]"),
    ({"is": "dict"}, "KeyError: 'items'"),
    ({"is": "Program", "inputs": ["x"]}, "missing 3 required positional arguments"),
    (described(op("System")), "'is' in the graph must be one of .*got 'System'"),
    (described(op("Operation")), "NotImplementedError"),
    (described(op("Mean", call=1)), "unexpected keyword argument 'call'"),
    (described(op("Mean", inputs=["nowhere"])), "read what was made before, got 'z'"),
    (described(op("Mean", output="x")), "read what was made before, got 'x'"),
    (described(op("Mean", inputs="x")), r"inputs of Mean must be tuple\[str, \.\.\.\], got 'x'"),
    (described(op("Concatenate", axis=True)), "axis of Concatenate must be .*int.*, got True"),
    (described(op("Concatenate", axis=0.5)), "axis of Concatenate must be .*int.*, got 0.5"),
    (described(op("MaxPool", window=[1], strides=[1, 1])), r"window of MaxPool must .* got \(1,\)"),
    (described(op("Reshape", "y", shape=[3])), "cannot reshape"),
    (described(op("Clip", "y", low=0, high=1)), "'y' must have the shape that its operation makes"),
    (
        described(op("Pad", "wide", padding=[[0, 0]])),
        "entries of tensor 'wide' must be an integer in .*, got 1000000000000",
    ),
    (described(op("Softmax", "none")), "KeyError: 'none'"),
    (described(outputs=["none"]), "KeyError: 'none'"),
    (described(tensors=[]), r"tensors of Program must be dict\[str, .*, got \(\)"),
    (layer(3), "values of Weights must be <class 'numpy.ndarray'>, got 3"),
    (layer({"is": "float32", "shape": [4, HUGE]}), f"must be an integer in .*, got {4 * HUGE}"),
    (layer({"is": "float32", "shape": [-1, -4]}), "numbers of an array .* at least 0, got -1"),
    (layer({"is": "float32", "shape": [1] * 99}), r"axes of an array .* \[0, 32\], got 99"),
    (layer({"is": "int8", "shape": [HUGE], "bits": 1}), "entries of an array in 'bits' must be"),
    (layer({"is": "int8", "shape": [0], "bits": 0}), r"bits of an array .* \[1, 32\], got 0"),
    (layer({"is": "int8", "shape": [0], "low": 128}), r"integers .* \[-128, 127\], got 128"),
    (layer({"is": "int8", "shape": [0], "step": 0}), "numbers of an array .* at least 1, got 0"),
    (layer({"is": "int8", "shape": [0], "more": 0}), "unexpected keyword argument 'more'"),
    (layer({"is": "object", "shape": []}), "'is' in the graph must be one of .*got 'object'"),
]


@pytest.mark.parametrize(("text", "reason"), HOSTILE)
def test_what_was_made_to_harm_is_refused_within_a_second(tmp_path, text, reason):
    forged(tmp_path / "model", text)
    start = time.process_time()
    with pytest.raises(
        ValueError, match=f"model must be a file of save_program: .*{reason}"
    ) as info:
        deploy.load_program(tmp_path / "model")
    assert time.process_time() - start < 1
    assert len(str(info.value)) < 800


def test_tensors_that_are_not_those_of_the_format_are_refused(tmp_path):
    path, vector = tmp_path / "model", np.zeros(3, np.uint8)
    for tensors, reason in [
        ({"bits": None}, "there must be a vector 'bits' of uint8"),
        ({"float32": vector}, "there must be a vector 'float32' of float32"),
        ({"graph": vector.reshape(1, 3)}, "there must be a vector 'graph' of uint8"),
        ({"graph": vector}, "Error -3 while decompressing data"),
        ({"bits": vector}, "every entry must be that of an array, got 3 more"),
        ({"other": vector}, "every entry must be that of an array, got 3 more"),
        ({"graph": np.frombuffer(zlib.compress(b"[]")[:-1], np.uint8)}, "must be a zlib stream"),
    ]:
        forged(path, described(), **tensors)
        with pytest.raises(ValueError, match=f"model must be a file of save_program: .*{reason}"):
            deploy.load_program(path)
    path.write_bytes(safetensors.save({"bits": vector}))
    with pytest.raises(
        ValueError, match="metadata must have a SHA-256 under 'hybrid_jax packed 2'"
    ):
        deploy.load_program(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        deploy.load_program(tmp_path / "absent")


def test_a_graph_that_would_become_large_is_refused_before(tmp_path):
    bomb = zlib.compress(b" " * (1 << 28))
    forged(tmp_path / "model", b"", graph=np.frombuffer(bomb, np.uint8))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="must be a zlib stream of at most 4194304 bytes"):
            deploy.load_program(tmp_path / "model")
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()
