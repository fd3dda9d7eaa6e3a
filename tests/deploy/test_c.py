"""The C file as a whole: what it takes and states, and trained networks in it, compiled and run."""

import dataclasses
import re
import subprocess

import choices
import jax
import numpy as np
import pytest
from built import RELU, Build, Q, floats
from compiled import (
    COMPILERS,
    SANITIZED,
    STRICT,
    assert_same,
    compiled,
    expected,
    inputs,
    run_c,
)
from lowered import deployed

from hybrid_jax import models
from hybrid_jax.deploy import c, c_statements, c_text
from hybrid_jax.program import (
    Add,
    Convert,
    Encoding,
    Mean,
    Mixture,
    Program,
    Reshape,
    Slice,
    Tensor,
    memory,
    run,
)

pytestmark = pytest.mark.skipif(not COMPILERS, reason="no C compiler")


def assert_right(folder, program, flags, **options):
    """One program, compiled and run, gives what the reference gives."""
    xs = inputs(program)
    got = run_c(folder, {"net": (program, xs)}, flags, **options)["net"]
    assert_same(got, expected(program, xs), program)


def test_requantization_without_a_unit_for_floats_has_the_same_bits(tmp_path):
    kernels = "\n".join(c._called("requantize("))
    main = """
        int main(void) {
            struct { float multiplier; int32_t sum, zero, low, high; } x;
            while (fread(&x, sizeof x, 1, stdin) == 1)
                putchar(requantize(x.sum, x.multiplier, x.low, x.high, x.zero));
            return 0;
        }"""
    (tmp_path / "main.c").write_text(f"#include <stdint.h>\n#include <stdio.h>\n{kernels}{main}")
    rng, n = np.random.default_rng(0), 400_000
    fields = [("multiplier", "<f4"), *((k, "<i4") for k in ("sum", "zero", "low", "high"))]
    rows = np.zeros(n, fields)
    rows["multiplier"] = 2.0 ** rng.uniform(-26, 3, n)
    rows["multiplier"][::3] = 2.0 ** rng.integers(-26, 3, len(rows[::3]))  # which make ties
    # Half of them next to a half, the others of all sizes.
    halves = np.rint((rng.integers(-300, 300, n) + 0.5) / rows["multiplier"].astype(np.float64))
    sums = np.where(rng.integers(2, size=n), halves, rng.integers(-(2**25), 2**25, n))
    rows["sum"] = np.clip(sums, -(2**31) + 1, 2**31 - 1)
    rows["zero"] = rng.integers(0, 256, n)
    rows["low"], rows["high"] = -rows["zero"], 255 - rows["zero"]
    found = []
    for flags in ([], ["-D__arm__"]):
        compiled([COMPILERS[0], *STRICT, *SANITIZED, *flags, "-o", "all", "main.c"], tmp_path)
        done = subprocess.run(
            tmp_path / "all", input=rows.tobytes(), capture_output=True, check=True
        )
        found.append(np.frombuffer(done.stdout, np.uint8))
    np.testing.assert_array_equal(*found)
    assert len(found[0]) == n
    assert len(np.unique(found[0])) == 256


def low_bits(seed=0, shape=(6, 5, 3), classes=4):
    # Kernels of 27, 5 and 45 entries: an odd number of them must not shift the next kernel.
    b = Build(shape, seed=seed).conv(5, bits=4, clip=RELU, to=Encoding(0.03))
    b.conv(5, (1, 1), padding=((0, 0), (0, 0)), bits=3, to=Q).conv(5, groups=5, bits=2)
    return b.add(Mean, (5,), Encoding(0.02, 128)).dense(classes, bits=4).program()


def test_packed_weights_take_half_the_flash_and_give_the_same(tmp_path):
    program = low_bits()
    plain, packed = (
        c.export_c(tmp_path / name, program, pack=pack)
        for name, pack in [("plain.c", False), ("packed.c", True)]
    )
    # Bytes: 5 · 27 + 5 · 5 + 45 + 4 · 5 and, of two features a byte for each entry, with whole
    # bytes for a fifth, 2 · 27 + 14 + 2 · 5 + 3 + 4 · 9 / 2 + 5 + 2 · 5.
    assert plain["flash"] - packed["flash"] == (135 + 25 + 45 + 20) - (68 + 13 + 23 + 10)
    assert (plain["kernel_bits"], packed["kernel_bits"]) == ([8], [4])
    for flags in (["-O3"], SANITIZED):
        assert_right(tmp_path, program, flags, pack=True)


def test_weights_beyond_4_bits_are_not_packed():
    b = Build((3, 3, 2)).conv(2)
    assert (b.operations[-1].weights.values % 16).any()
    assert c.to_c(b.program()) == c.to_c(b.program(), pack=False)


def test_packed_weights_whose_sums_are_too_large_twice_are_not_packed(tmp_path):
    # Many of them are no reason: each sum is of one kernel.
    b = Build((64,)).dense(2000, bits=4)
    assert c.export_c(tmp_path / "many.c", b.program())["kernel_bits"] == [4]
    op = b.operations[-1]
    step = np.float32(Q.scale) * op.weights.scale
    large = dataclasses.replace(op.weights, bias=np.float32(1.1 * 2**30 * step))
    b.operations[-1] = dataclasses.replace(op, weights=large)
    assert c.export_c(tmp_path / "large.c", b.program())["kernel_bits"] == [8]


def residual_4():
    b = Build((6, 5, 3), seed=3).conv(4, clip=RELU)
    return b.conv(4).add(Mean, (4,), Q).dense(4).program()


def test_a_mixture_takes_the_memory_of_its_largest_part_and_shares_equal_constants(tmp_path):
    gate, a, b = choices.coarse_gate(), low_bits(1), low_bits(2)
    both = c.export_c(tmp_path / "m.c", Mixture(two(gate), (a, b)))
    alone = [c.export_c(tmp_path / "m.c", part) for part in (two(gate), a, b)]
    assert both["ram"] == max(part["ram"] for part in alone)
    twice = c.export_c(tmp_path / "m.c", Mixture(two(gate), (a, a)))
    for made, parts in ((both, (two(gate), a, b)), (twice, (two(gate), a))):
        constants = c_text.Constants()
        for part in parts:
            c_statements.body(part, constants, pack=True)
        assert made["flash"] == constants.flash
    # Of equal shape, the kernels and what describes them differ, and the windows do not.
    arrays = 68 + 13 + 23 + 10 + 8 * (5 + 5 + 5 + 4)
    assert both["flash"] - twice["flash"] == arrays + 4 * 4 * 6


def two(gate):
    """A gate for two experts: the first two of its outputs."""
    *steps, last = gate.operations
    name = last.inputs[0]
    tensors = gate.tensors | {"cut": Tensor((2,), gate.encoding(name)), "two": Tensor((2,))}
    steps = (*steps, Slice((name,), "cut", (0,), (2,), (1,)), Convert(("cut",), "two"))
    return Program(gate.input, "two", tensors, steps)


@pytest.mark.parametrize(
    "program", [low_bits(), residual_4(), floats(residual_4())], ids=["low", "whole", "floats"]
)
def test_a_32_bit_object_file_has_the_flash_and_ram_that_are_stated(tmp_path, program):
    code = c.to_c(program)
    (tmp_path / "m.c").write_text(code)
    flash, ram = (int(re.search(rf"MODEL_{n} (\d+)", code)[1]) for n in ("FLASH", "RAM"))
    target = ["-m32", "-msse2", "-mfpmath=sse", "-ffreestanding", "-fno-pie"]
    compiled(
        ["gcc", *STRICT, *target, "-Os", "-fno-merge-constants", "-fstack-usage", "-c", "m.c"],
        tmp_path,
    )
    sizes = subprocess.run(
        ["size", "-A", tmp_path / "m.o"], capture_output=True, text=True, check=True
    )
    sections = dict(re.findall(r"^(\.\w+)\S*\s+(\d+)", sizes.stdout, re.M))
    # The compiler aligns large arrays, and puts the numbers of the code with them.
    assert flash <= int(sections[".rodata"]) <= flash + 200
    assert ram <= int(sections[".bss"]) <= ram + 32  # from where a large array is aligned
    stack = re.findall(r"(\d+)\s+static", (tmp_path / "m.su").read_text())
    assert sum(map(int, stack)) < 1024


def test_it_is_a_program_that_prints_what_it_needs(tmp_path):
    program = low_bits()
    manifest = c.export_c(tmp_path / "net.c", program, name="net")
    compiled(["gcc", *STRICT, "-DNET_MAIN", "-o", "net", "net.c"], tmp_path)
    (x,) = inputs(program)
    done = subprocess.run([tmp_path / "net"], input=x.tobytes(), capture_output=True, check=True)
    got = np.frombuffer(done.stdout, np.float32).reshape(3, -1)
    assert_same([got], expected(program, (x,)), program)
    assert done.stderr.decode() == f"flash {manifest['flash']} bytes, RAM {manifest['ram']} bytes\n"


def test_the_manifest_says_what_it_needs(tmp_path):
    program = low_bits()
    manifest = c.export_c(tmp_path / "net.c", program, name="net")
    assert (tmp_path / "net.c").read_text() == c.to_c(program, "net")
    # What is live at once is most in the depthwise convolution: 6 · 5 · 5 bytes in, as many out,
    # and for each of nine taps two places and five bytes of a window; whole words of them.
    assert manifest["ram"] == 150 + 2 + 150 + 9 * (8 + 5) + 1
    # Weights, two to a byte; bias and multiplier of each channel; Window and Layer of 14 and 6
    # words for each of four layers; Result of 4 for ReLU, for Q and for floats.
    assert manifest["flash"] == 68 + 13 + 23 + 10 + 8 * 19 + 4 * (4 * 20 + 3 * 4)


@pytest.mark.parametrize("name", ["", "1net", "a-b", "_net", "größe", "a b", "net;"])
def test_refuses_a_name_that_is_no_identifier(name):
    with pytest.raises(ValueError, match="name must be a C identifier"):
        c.to_c(low_bits(), name)


def test_a_name_may_be_a_keyword_or_a_kernels(tmp_path):
    program = low_bits()
    xs = inputs(program)
    got = run_c(tmp_path, {"int": (program, xs), "conv": (program, xs)}, ["-O1"])
    for name in got:
        assert_same(got[name], expected(program, xs), program)


def test_names_of_tensors_cannot_break_the_text(tmp_path):
    program = low_bits()
    [first, *others] = program.operations
    evil = "*/ \\\n ü /* conv("
    renamed = {"t1": evil}
    steps = [dataclasses.replace(first, output=evil)]
    steps += [
        dataclasses.replace(op, inputs=tuple(renamed.get(n, n) for n in op.inputs)) for op in others
    ]
    tensors = {renamed.get(name, name): tensor for name, tensor in program.tensors.items()}
    # An output of that name, and a second that has the same letters and digits.
    outputs = (evil, program.output, "__ \\n ü __ conv(")
    steps.append(Convert((program.output,), outputs[2]))
    tensors[outputs[2]] = Tensor(tensors[program.output].shape)
    assert_right(tmp_path, Program(("x",), outputs, tensors, tuple(steps)), ["-O1"])


def test_an_input_may_be_seen_in_another_shape(tmp_path):
    tensors = {"x": Tensor((2, 3)), "f": Tensor((6,)), "q": Tensor((6,), Q), "y": Tensor((6,))}
    steps = (Reshape(("x",), "f", (6,)), Convert(("f",), "q"), Convert(("q",), "y"))
    assert_right(tmp_path, Program("x", "y", tensors, steps), SANITIZED)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_inputs_may_be_stored_in_any_encoding(tmp_path, dtype):
    tensors = {"x": Tensor((40,), Encoding(1.5, 3), dtype), "b": Tensor((40,), dtype=dtype)}
    tensors |= {"q": Tensor((40,), Q), "f": Tensor((40,)), "y": Tensor((40,)), "z": Tensor((40,))}
    steps = (
        Convert(("x",), "q"),
        Convert(("q",), "f"),
        Add(("f", "b"), "y"),
        Add(("b", "b"), "z"),
    )
    program = Program(("x", "b"), ("y", "z", "x", "b"), tensors, steps)
    assert_right(tmp_path, program, SANITIZED)


def test_a_trained_network_gives_the_bits_of_the_reference(digits, lowered, tmp_path):
    x = np.asarray(digits.held_out_images)
    (got,) = run_c(tmp_path, {"net": (lowered.integers, (x,))}, ["-O3"])["net"]
    assert_same([got], [np.asarray(jax.jit(run(lowered.integers))(x))], lowered.integers)
    assert (got.argmax(1) == np.asarray(digits.held_out_labels)).mean() > 0.95


def test_a_trained_network_in_floats_is_the_function(digits, lowered, tmp_path):
    x = np.asarray(digits.held_out_images)
    (got,) = run_c(tmp_path, {"net": (lowered.floats, (x,))}, ["-O3"])["net"]
    want = lowered.float_logits[-len(x) :]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_the_block_is_what_lives_at_one_time(lowered):
    # In the project convolution the residual, its input and its output: 64 · (8 + 12 + 8) bytes.
    assert memory.plan(lowered.integers).size == 64 * 28


@pytest.mark.slow
@pytest.mark.parametrize("name", models.names())
def test_every_model_that_we_ship(small_model, tmp_path, name):
    model = small_model(name)
    program = deployed(model.fn, model.params, model.images, weight_bits=4).integers
    x = np.asarray(model.images)
    want = [np.asarray(jax.jit(run(program))(x))]
    for pack in (False, True):
        got = run_c(tmp_path, {"net": (program, (x,))}, ["-O2"], pack=pack)["net"]
        assert_same(got, want, program)
