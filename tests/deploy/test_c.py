"""The C file against the integer reference, compiled and run: every bit of every output."""

import dataclasses
import errno
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax import core, cost, models, quantization
from hybrid_jax.deploy import c, lowering, memory, reference
from hybrid_jax.deploy.program import (
    UNBOUNDED,
    Add,
    AveragePool,
    Clip,
    Concatenate,
    Conv,
    Convert,
    Dense,
    Encoding,
    Lookup,
    MaxPool,
    Mean,
    Mixture,
    Multiply,
    Pad,
    Program,
    Reshape,
    Slice,
    Softmax,
    Tensor,
    Transpose,
    Weights,
)
from hybrid_jax.quantization import integer_step

STRICT = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
SANITIZED = [
    "-O1",
    "-g",
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
]
COMPILERS = [name for name in ("gcc", "clang") if shutil.which(name)]
Q, RELU, RELU6 = Encoding(0.05, 128), (0.0, math.inf), (0.0, 6.0)

pytestmark = pytest.mark.skipif(not COMPILERS, reason="no C compiler")


class Build:
    """A program under construction; each step reads the last tensor unless it is told others."""

    def __init__(self, shape, encoding=Q, seed=0):
        self.rng = np.random.default_rng(seed)
        self.tensors, self.operations, self.last = {"x": Tensor(shape)}, [], "x"
        self.add(Convert, shape, encoding)

    @property
    def shape(self):
        return self.tensors[self.last].shape

    @property
    def encoding(self):
        return self.tensors[self.last].encoding

    def add(self, kind, shape, encoding, *fields, inputs=None):
        name = f"t{len(self.tensors)}"
        self.operations.append(kind(inputs or (self.last,), name, *fields))
        self.tensors[name] = Tensor(tuple(map(int, shape)), encoding)
        self.last = name
        return self

    def weights(self, shape, bits):
        most = 2 ** (bits - 1) - 1
        values = self.rng.integers(-most, most + 1, shape).astype(np.int8)
        scale = self.rng.uniform(0.5, 1.5, shape[-1]) / (most * math.sqrt(math.prod(shape[:-1])))
        # Scales that are powers of two, as half of them are, make ties.
        scale = np.where(np.arange(shape[-1]) % 2, scale, 2 ** np.rint(np.log2(scale)))
        step, bias = integer_step(bits), np.float32(self.rng.normal(size=shape[-1]))
        return Weights(values * np.int8(step), np.float32(scale / step), bias, bits)

    def conv(self, features, window=(3, 3), strides=(1, 1), padding=((1, 1), (1, 1)), **options):
        options = {"dilation": (1, 1), "groups": 1, "clip": UNBOUNDED, "to": Q, "bits": 8} | options
        encoding, bits, dilation = (options.pop(key) for key in ("to", "bits", "dilation"))
        h, w, channels = self.shape
        weights = self.weights((*window, channels // options["groups"], features), bits)
        size = _sizes((h, w), window, strides, padding, dilation)
        fields = weights, strides, padding, dilation, options["groups"], options["clip"]
        return self.add(Conv, (*size, features), encoding, "site", *fields)

    def dense(self, features, to=None, clip=UNBOUNDED, bits=8):
        weights = self.weights((*self.shape, features), bits)
        return self.add(Dense, (features,), to, "head", weights, clip)

    def pool(self, kind, window, strides, padding=((0, 0), (0, 0)), to=None):
        size = _sizes(self.shape[:2], window, strides, padding, (1, 1))
        to = to or self.encoding
        return self.add(kind, (*size, self.shape[2]), to, window, strides, padding)

    def program(self):
        if self.encoding is not None:
            self.add(Convert, self.shape, None)
        return Program("x", self.last, self.tensors, tuple(self.operations))


def _sizes(shape, window, strides, padding, dilation):
    return [
        (n + sum(p) - (k - 1) * d - 1) // s + 1
        for n, k, s, p, d in zip(shape, window, strides, padding, dilation, strict=True)
    ]


def residual():
    b = Build((6, 5, 4)).conv(6, clip=RELU, to=Encoding(0.03))
    a = b.last
    b.conv(6, to=Encoding(0.07, 100)).add(Add, b.shape, Q, RELU, inputs=(b.last, a))
    return b.add(Mean, (6,), Encoding(0.02, 9)).dense(10)


def squeeze_and_excite():
    b = Build((4, 3, 5))
    x = b.last
    b.add(Mean, (5,), Q).dense(5, to=Q).add(Lookup, (5,), Encoding(1 / 255), "logistic")
    b.add(Reshape, (1, 1, 5), b.encoding)
    return b.add(Multiply, (4, 3, 5), Encoding(0.04, 120), inputs=(x, b.last))


def concatenation(axis):
    b = Build((3, 4, 2))
    x = b.last
    b.add(Convert, b.shape, Encoding(0.08, 60))
    shape = list(b.shape)
    shape[axis] *= 3
    return b.add(Concatenate, shape, Q, axis, inputs=(x, b.last, x))


def sum_of_one():
    b = Build((3, 4, 2))
    return b.add(Add, b.shape, Encoding(0.1, 128), inputs=(b.last, b.last))


def shuffle():
    b = Build((2, 3, 6)).add(Reshape, (2, 3, 2, 3), Q).add(Transpose, (2, 3, 3, 2), Q, (0, 1, 3, 2))
    return b.add(Reshape, (2, 3, 6), Q)


def same(kind, *fields, shape=None, to=Q):
    def build():
        b = Build((4, 5, 3))
        return b.add(kind, shape or b.shape, to, *fields)

    return build


def conv(*args, shape=(6, 7, 4), **options):
    return lambda: Build(shape).conv(*args, **options)


def pool(*args, **options):
    # 18 channels: more than one block of them.
    return lambda: Build((6, 7, 18)).pool(*args, **options)


CASES = {
    "conv": conv(5),
    "conv_relu": conv(5, clip=RELU, to=Encoding(0.02)),
    "conv_relu6": conv(5, clip=RELU6, to=Encoding(0.05, 20)),
    "conv_4_bit_outputs": conv(5, to=Encoding(0.3, 8, 0, 15)),
    "conv_strides": conv(5, (3, 2), (2, 3)),
    "conv_same_even": conv(3, (3, 3), (2, 2), ((0, 1), (1, 0))),
    "conv_wide_padding": conv(3, (2, 3), (1, 2), ((5, 4), (3, 6))),
    "conv_crop": conv(3, (2, 2), (1, 1), ((-1, 2), (0, -2))),
    "conv_dilation": conv(5, (3, 3), dilation=(2, 3), padding=((2, 2), (3, 3))),
    "conv_groups": conv(6, groups=2),
    "conv_float": conv(3, to=None, clip=RELU6),
    "pointwise": conv(9, (1, 1), padding=((0, 0), (0, 0))),
    "depthwise": conv(4, groups=4, clip=RELU6),
    "depthwise_strides": conv(20, groups=20, strides=(2, 2), shape=(5, 4, 20)),
    "depthwise_dilation": conv(4, groups=4, dilation=(2, 1)),
    "depthwise_twice": conv(8, groups=4),
    "depthwise_float": conv(4, groups=4, to=None),
    "one_channel": conv(1, shape=(6, 7, 1)),
    "residual": residual,
    "sum_of_one": sum_of_one,
    "squeeze_and_excite": squeeze_and_excite,
    "multiply_float": lambda: Build((2, 3)).add(Multiply, (2, 3), None, inputs=("t1", "t1")),
    "clip": same(Clip, -1.0, 2.02),
    "max_pool": pool(MaxPool, (2, 3), (2, 2)),
    "max_pool_padding": pool(MaxPool, (3, 3), (2, 2), ((1, 1), (3, 3))),
    "average_pool": pool(AveragePool, (2, 2), (2, 2), to=Encoding(0.04, 9)),
    "average_pool_padding": pool(AveragePool, (3, 3), (2, 1), ((1, 2), (0, 1))),
    "mean": same(Mean, shape=(3,), to=Encoding(0.01, 128)),
    "mean_float": same(Mean, shape=(3,), to=None),
    "concatenate_0": lambda: concatenation(0),
    "concatenate_1": lambda: concatenation(1),
    "concatenate_2": lambda: concatenation(2),
    "shuffle": shuffle,
    "transpose": same(Transpose, (2, 0, 1), shape=(3, 4, 5)),
    "pad": same(Pad, ((1, 2), (0, 3), (2, 0)), shape=(7, 8, 5)),
    "pad_negative": same(Pad, ((-1, 2), (1, -2), (0, 0)), shape=(5, 4, 3)),
    "slice": same(Slice, (1, 0, 1), (4, 5, 3), (2, 3, 1), shape=(2, 2, 2)),
    "logistic": same(Lookup, "logistic", to=Encoding(1 / 256)),
    "tanh": same(Lookup, "tanh", to=Encoding(1 / 128, 128)),
    "exp": same(Lookup, "exp", to=Encoding(0.1)),
    "convert": same(Convert, to=Encoding(0.1, 3, 1, 60)),
    "convert_same": same(Convert),
    "flatten_dense": lambda: Build((3, 2, 4)).add(Reshape, (24,), Q).dense(7, clip=RELU),
    "flatten_input": lambda: flattened_input(),
}  # fmt: skip


def flattened_input():
    tensors = {"x": Tensor((2, 3)), "f": Tensor((6,)), "q": Tensor((6,), Q), "y": Tensor((6,))}
    steps = (Reshape(("x",), "f"), Convert(("f",), "q"), Convert(("q",), "y"))
    return Program("x", "y", tensors, steps)


def programs():
    built = {name: case() for name, case in CASES.items()}
    return {name: b.program() if isinstance(b, Build) else b for name, b in built.items()}


def inputs(program, count=3, seed=1):
    """Normal values, and with them what is beyond every range."""
    first = program.gate if isinstance(program, Mixture) else program
    shape = first.tensors[first.input].shape
    x = np.random.default_rng(seed).normal(scale=3, size=(count, *shape)).astype(np.float32)
    x.reshape(-1)[: min(x.size, 4)] = [np.nan, np.inf, -np.inf, 3e38][: min(x.size, 4)]
    return x


def expected(program, x):
    # One image at a time, as the C function runs; of a mixture each takes its own way.
    fn = jax.jit(reference.run(program))
    return np.concatenate([np.asarray(fn(jnp.asarray(image[None]))) for image in x])


def run_c(folder, programs, flags, compiler="gcc", pack=False):
    """{name: outputs} of all programs, in one process: {name: (program, inputs)}."""
    folder = pathlib.Path(folder)
    main, sizes = [], {}
    for name, (program, x) in programs.items():
        (folder / f"{name}.c").write_text(c.to_c(program, name, pack))
        last = program.experts[0] if isinstance(program, Mixture) else program
        sizes[name] = (len(x), *last.tensors[last.output].shape)
        n, m = x[0].size, math.prod(sizes[name][1:])
        main.append(
            f"for (int i = 0; i < {len(x)}; i++) {{ static float x[{n}], y[{m}]; "
            f"void {name}_run(const float *, float *); "
            "if (!fread(x, sizeof x, 1, stdin)) return 1; "
            f"{name}_run(x, y); fwrite(y, sizeof y, 1, stdout); }}"
        )
    text = "#include <stdio.h>\nint main(void) {\n" + "\n".join(main) + "\nreturn 0; }\n"
    (folder / "all.c").write_text(text)
    files = [f"{name}.c" for name in (*programs, "all")]
    compiled([compiler, *STRICT, *flags, "-o", "all", *files, "-lm"], folder)
    fed = b"".join(x.tobytes() for _, x in programs.values())
    done = subprocess.run([folder / "all"], input=fed, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    ends = np.cumsum([math.prod(size) for size in sizes.values()])
    parts = np.split(np.frombuffer(done.stdout, np.float32), ends[:-1])
    return {name: part.reshape(sizes[name]) for name, part in zip(sizes, parts, strict=True)}


def compiled(command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def assert_same_bits(got, want):
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


@pytest.fixture(scope="module")
def cases():
    """{name: (program, inputs, outputs of the reference)}."""
    built = {name: (program, inputs(program)) for name, program in programs().items()}
    return {name: (program, x, expected(program, x)) for name, (program, x) in built.items()}


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("flags", [["-O2"], ["-O3"], SANITIZED], ids=["O2", "O3", "sanitized"])
def test_every_operation_gives_the_bits_of_the_reference(cases, tmp_path, flags, compiler):
    given = {name: (program, x) for name, (program, x, _) in cases.items()}
    got = run_c(tmp_path, given, flags, compiler)
    for name, (_, _, want) in cases.items():
        assert len(np.unique(want)) > 2, f"{name} is constant: it shows nothing"
        np.testing.assert_array_equal(got[name].view(np.uint32), want.view(np.uint32), name)


@st.composite
def built_programs(draw):
    """A chain of random operations, some of which read an earlier tensor of the same shape."""
    size = st.integers(1, 6)
    b = Build(
        (draw(size), draw(size), draw(st.integers(1, 20))),
        draw(encodings),
        draw(st.integers(0, 99)),
    )
    for _ in range(draw(st.integers(1, 5))):
        draw(st.sampled_from(STEPS))(draw, b)
    draw(st.sampled_from([_leave, _mean, _flatten]))(draw, b)
    return b.program()


@st.composite
def _encodings(draw):
    low = draw(st.sampled_from([0, 0, 3]))
    high = draw(st.sampled_from([255, 255, 100, 15]))
    scale = draw(st.sampled_from([0.02, 0.0625, 0.1, 0.25]))
    return Encoding(scale, draw(st.integers(low, high)), low, high)


encodings = _encodings()
clips = st.sampled_from([UNBOUNDED, RELU, RELU6])
pairs = st.tuples(st.integers(0, 2), st.integers(0, 2))


def _window(draw, b):
    """Window, strides, padding, dilation that leave an output."""
    padding = draw(st.tuples(pairs, pairs))
    room = [n + sum(p) for n, p in zip(b.shape, padding, strict=False)]
    window = tuple(draw(st.integers(1, min(n, 4))) for n in room)
    dilation = tuple(
        draw(st.integers(1, max((n - 1) // (k - 1), 1) if k > 1 else 2))
        for n, k in zip(room, window, strict=True)
    )
    return window, draw(st.tuples(*[st.integers(1, 3)] * 2)), padding, dilation


def _conv(draw, b):
    window, strides, padding, dilation = _window(draw, b)
    channels = b.shape[2]
    groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    features = groups * draw(st.integers(1, 3))
    options = {"dilation": dilation, "groups": groups, "clip": draw(clips), "to": draw(encodings)}
    b.conv(features, window, strides, padding, bits=draw(st.sampled_from([8, 4, 3, 2])), **options)


def _pool(draw, b):
    window, strides, padding, _ = _window(draw, b)
    if draw(st.booleans()):
        b.pool(MaxPool, window, strides, padding)
    else:
        b.pool(AveragePool, window, strides, padding, draw(encodings))


def _earlier(draw, b):
    """A name of a tensor of the last one's shape, itself included."""
    made = [op.output for op in b.operations]
    return draw(st.sampled_from([name for name in made if b.tensors[name].shape == b.shape]))


def _pairwise(draw, b):
    names = (b.last, _earlier(draw, b))[:: draw(st.sampled_from([1, -1]))]
    b.add(
        draw(st.sampled_from([Add, Multiply])), b.shape, draw(encodings), draw(clips), inputs=names
    )


def _join(draw, b):
    axis, shape = draw(st.integers(0, 2)), list(b.shape)
    shape[axis] *= 2
    b.add(Concatenate, shape, draw(encodings), axis, inputs=(_earlier(draw, b), b.last))


def _single(draw, b):
    fields = draw(
        st.sampled_from([(Clip, -0.5, 1.1), (Lookup, "tanh"), (Lookup, "exp"), (Convert,)])
    )
    b.add(fields[0], b.shape, b.encoding if fields[0] is Clip else draw(encodings), *fields[1:])


def _move(draw, b):
    order = tuple(draw(st.permutations(range(3))))
    b.add(Transpose, [b.shape[axis] for axis in order], b.encoding, order)
    padding = draw(st.tuples(pairs, pairs, pairs))
    shape = [n + sum(p) for n, p in zip(b.shape, padding, strict=True)]
    b.add(Pad, shape, b.encoding, padding)
    starts = [draw(st.integers(0, n - 1)) for n in b.shape]
    stops = [draw(st.integers(s + 1, n)) for s, n in zip(starts, b.shape, strict=True)]
    strides = draw(st.tuples(*[st.integers(1, 3)] * 3))
    shape = [-(-(e - s) // k) for s, e, k in zip(starts, stops, strides, strict=True)]
    b.add(Slice, shape, b.encoding, tuple(starts), tuple(stops), strides)


def _leave(draw, b):
    b.add(Convert, b.shape, None)


def _mean(draw, b):
    b.add(Mean, b.shape[2:], draw(st.sampled_from([None, draw(encodings)])))


def _flatten(draw, b):
    b.add(Reshape, (math.prod(b.shape),), b.encoding)
    b.dense(
        draw(st.integers(1, 5)),
        draw(st.sampled_from([None, Q])),
        bits=draw(st.sampled_from([8, 4])),
    )


STEPS = [_conv, _conv, _pool, _pairwise, _join, _single, _move]


@pytest.mark.parametrize("examples", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_random_programs_give_the_bits_of_the_reference(examples):
    @settings(max_examples=examples, deadline=None)
    @given(st.lists(built_programs(), min_size=8, max_size=12), st.booleans())
    def check(drawn, pack):
        given = {f"net_{i}": (program, inputs(program)) for i, program in enumerate(drawn)}
        with tempfile.TemporaryDirectory() as folder:
            got = run_c(folder, given, ["-O1"], pack=pack)
        for name, (program, x) in given.items():
            assert_same_bits(got[name], expected(program, x))

    check()


def low_bits(seed=0, shape=(6, 5, 3), classes=4):
    # Kernels of 27, 5 and 45 entries: an odd number of them must not shift the next kernel.
    b = Build(shape, seed=seed).conv(5, bits=4, clip=RELU, to=Encoding(0.03))
    b.conv(5, (1, 1), padding=((0, 0), (0, 0)), bits=3, to=Q).conv(5, groups=5, bits=2)
    return b.add(Mean, (5,), Encoding(0.02, 128)).dense(classes, bits=4).program()


def test_packed_weights_take_half_the_flash_and_give_the_same(tmp_path):
    program = low_bits()
    x = inputs(program)
    plain, packed = (
        c.export_c(tmp_path / name, program, pack=pack)
        for name, pack in [("plain.c", False), ("packed.c", True)]
    )
    # Bytes: 5 · 27 + 5 · 5 + 45 + 4 · 5 and, with whole bytes for each kernel of a convolution and
    # of the depthwise one, 5 · 14 + 5 · 3 + 23 + 4 · 3.
    assert plain["flash"] - packed["flash"] == (135 + 25 + 45 + 20) - (70 + 15 + 23 + 12)
    assert (plain["kernel_bits"], packed["kernel_bits"]) == ([8], [4])
    for flags in (["-O3"], SANITIZED):
        assert_same_bits(
            run_c(tmp_path, {"net": (program, x)}, flags, pack=True)["net"], expected(program, x)
        )


def test_weights_beyond_4_bits_are_not_packed():
    b = Build((3, 3, 2)).conv(2)
    assert (b.operations[-1].weights.values % 16).any()
    assert c.to_c(b.program()) == c.to_c(b.program(), pack=False)


def mixture():
    """Experts of different depth; their gate's three outputs often tie, as 1 bit steps do."""
    gate = Build((6, 5, 3)).add(Mean, (3,), Encoding(2.0, 2, 0, 3)).add(Convert, (3,), None)
    return Mixture(gate.program(), tuple(low_bits(seed) for seed in (1, 2)) + (residual_4(),))


def residual_4():
    b = Build((6, 5, 3), seed=3).conv(4, clip=RELU)
    return b.conv(4).add(Mean, (4,), Q).dense(4).program()


def test_a_mixture_runs_the_gates_expert(tmp_path):
    program = mixture()
    x = np.random.default_rng(0).normal(size=(40, 6, 5, 3)).astype(np.float32)
    x += np.random.default_rng(1).normal(scale=3, size=(40, 1, 1, 3)).astype(np.float32)
    scores = expected(program.gate, x)
    ties = [(s == s.max()).sum() > 1 for s in scores]
    assert set(scores.argmax(1)) == {0, 1, 2}
    assert 5 < sum(ties) < 35
    got = run_c(tmp_path, {"net": (program, x)}, ["-O2"])["net"]
    assert_same_bits(got, expected(program, x))


def test_a_mixture_takes_the_memory_of_its_largest_part_and_shares_equal_constants(tmp_path):
    gate, a, b, _ = (program := mixture()).gate, *program.experts
    both = c.export_c(tmp_path / "m.c", Mixture(two(gate), (a, b)))
    alone = [c.export_c(tmp_path / "m.c", part) for part in (two(gate), a, b)]
    assert both["ram"] == max(part["ram"] for part in alone)
    assert both["flash"] == sum(part["flash"] for part in alone)
    twice = c.export_c(tmp_path / "m.c", Mixture(two(gate), (a, a)))
    # Descriptors are counted again, arrays are not.
    arrays = 70 + 15 + 23 + 12 + 8 * (5 + 5 + 5 + 4)
    assert twice["flash"] == alone[0]["flash"] + 2 * alone[1]["flash"] - arrays


def two(gate):
    """A gate for two experts: the first two of its outputs."""
    *steps, last = gate.operations
    name = last.inputs[0]
    tensors = gate.tensors | {"cut": Tensor((2,), gate.encoding(name)), "two": Tensor((2,))}
    steps = (*steps, Slice((name,), "cut", (0,), (2,), (1,)), Convert(("cut",), "two"))
    return Program(gate.input, "two", tensors, steps)


def test_softmax_is_that_of_the_c_library(tmp_path):
    program = Build((3, 2, 4)).add(Reshape, (24,), Q).dense(7).add(Softmax, (7,), None).program()
    x = inputs(program)
    got = run_c(tmp_path, {"net": (program, x)}, ["-O2"])["net"]
    np.testing.assert_allclose(got, expected(program, x), rtol=1e-6)
    assert "#include <math.h>" in c.to_c(program)


@pytest.mark.parametrize("name", ["residual", "squeeze_and_excite", "average_pool", "low_bits"])
def test_a_32_bit_object_file_has_the_flash_and_ram_that_are_stated(tmp_path, name):
    program = low_bits() if name == "low_bits" else programs()[name]
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
    assert ram <= int(sections[".bss"]) <= ram + 32
    stack = re.findall(r"(\d+)\s+static", (tmp_path / "m.su").read_text())
    assert sum(map(int, stack)) < 1024


def test_it_is_a_program_that_prints_what_it_needs(tmp_path):
    program = low_bits()
    manifest = c.export_c(tmp_path / "net.c", program, name="net")
    compiled(["gcc", *STRICT, "-DNET_MAIN", "-o", "net", "net.c"], tmp_path)
    x = inputs(program)
    done = subprocess.run([tmp_path / "net"], input=x.tobytes(), capture_output=True, check=True)
    assert_same_bits(np.frombuffer(done.stdout, np.float32).reshape(3, -1), expected(program, x))
    assert done.stderr.decode() == f"flash {manifest['flash']} bytes, RAM {manifest['ram']} bytes\n"


def test_export_writes_a_manifest(tmp_path):
    program = low_bits()
    manifest = c.export_c(tmp_path / "net.c", program, name="net")
    assert manifest == json.loads((tmp_path / "net.c.json").read_text())
    assert (tmp_path / "net.c").read_text() == c.to_c(program, "net")
    # What is live at once is most in the depthwise convolution: 6 · 5 · 5 bytes in, as many out,
    # and its kernel of 45 entries unpacked.
    assert manifest["ram"] == 150 + 150 + 45
    # Weights, two to a byte; bias and multiplier of each channel; Window, Layer and Result of 14, 6
    # and 4 words for each of four layers, Window and Result for the mean.
    assert manifest["flash"] == 70 + 15 + 23 + 12 + 8 * 19 + 4 * (4 * 24 + 18)


def test_the_text_is_the_same_each_time():
    assert c.to_c(mixture()) == c.to_c(mixture())


@pytest.mark.parametrize("name", ["", "1net", "a-b", "_net", "größe", "a b", "net;"])
def test_refuses_a_name_that_is_no_identifier(name):
    with pytest.raises(ValueError, match="name must be a C identifier"):
        c.to_c(low_bits(), name)


def test_a_name_may_be_a_keyword_or_a_kernels(tmp_path):
    program = low_bits()
    x = inputs(program)
    got = run_c(tmp_path, {"int": (program, x), "conv": (program, x)}, ["-O1"])
    assert_same_bits(got["int"], expected(program, x))
    assert_same_bits(got["int"], got["conv"])


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
    x = inputs(program)
    got = run_c(
        tmp_path, {"net": (Program("x", program.output, tensors, tuple(steps)), x)}, ["-O1"]
    )
    assert_same_bits(got["net"], expected(program, x))


def floats(*steps, **shapes):
    """A program of float32 tensors but for those whose name begins with q."""
    tensors = {n: Tensor(shape, Q if n[0] == "q" else None) for n, shape in shapes.items()}
    names = list(shapes)
    return Program(names[0], names[-1], tensors, steps)


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (floats(Clip(("x",), "y", 0.0, 1.0), x=(2,), y=(2,)), "x"),
        (floats(Reshape(("x",), "y"), x=(2,), y=(1, 2)), "x"),
        (floats(Softmax(("x",), "y"), x=(2,), y=(2,)), "x"),
        (floats(x=(2,)), "x"),
        (floats(Convert(("x",), "q"), x=(2,), q=(2,)), "q"),
        (floats(Convert(("q",), "y"), q=(2,), y=(2,)), "q"),
        (
            floats(
                Convert(("x",), "q"), Convert(("q",), "h"), Clip(("h",), "y", 0.0, 1.0),
                x=(2,), q=(2,), h=(2,), y=(2,),
            ),
            "h",
        ),
        (
            floats(
                Convert(("x",), "q"), Convert(("q",), "h"), Convert(("h",), "q2"),
                Convert(("q2",), "y"), x=(2,), q=(2,), h=(2,), q2=(2,), y=(2,),
            ),
            "h",
        ),
        (
            floats(
                Convert(("x",), "q"), Convert(("q",), "h"), Softmax(("h",), "s"),
                Softmax(("h",), "y"), x=(2,), q=(2,), h=(2,), s=(2,), y=(2,),
            ),
            "s",
        ),
        (
            floats(Convert(("x",), "q"), Add(("q", "q"), "y"), x=(2,), q=(2,), y=(2,)),
            "y",
        ),
    ],
)  # fmt: skip
def test_refuses_floats_between_the_ends(program, name):
    with pytest.raises(ValueError, match=f"tensor '{name}' must be"):
        c.to_c(program)


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    c.export_c(tmp_path / "net.c", low_bits())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        c.export_c(tmp_path / "net.c", low_bits(seed=5))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def lowered(fn, params, images, **bits):
    spec = quantization.spec(core.trace(fn, params, images[:1]), **bits)
    ranges = quantization.calibrate(fn, params, [(images,)], spec)
    return lowering.lower(fn, params, spec, ranges, images)


@pytest.fixture(scope="module")
def digits_program(digits):
    return lowered(digits.fn, digits.params, digits.images[:256])


def test_a_trained_network_gives_the_bits_of_the_reference(digits, digits_program, tmp_path):
    x = digits.held_out_images
    got = run_c(tmp_path, {"net": (digits_program, np.asarray(x))}, ["-O3"])["net"]
    assert_same_bits(got, np.asarray(jax.jit(reference.run(digits_program))(x)))
    assert (got.argmax(1) == np.asarray(digits.held_out_labels)).mean() > 0.95


def test_the_block_is_what_the_cost_model_counts(digits, digits_program):
    graph = core.trace(digits.fn, digits.params, digits.images[:1])
    counted = cost.peak_activation_bytes(graph, {site.name: 8 for site in graph.sites})
    # In the project convolution the residual, its input and its output: 64 · (8 + 12 + 8) bytes.
    assert memory.plan(digits_program).size == counted == 64 * 28


@pytest.mark.slow
@pytest.mark.parametrize("name", models.names())
def test_every_model_that_we_ship(small_model, tmp_path, name):
    model = small_model(name)
    program = lowered(model.fn, model.params, model.images, weight_bits=4)
    want = np.asarray(jax.jit(reference.run(program))(model.images))
    for pack in (False, True):
        given = {"net": (program, np.asarray(model.images))}
        assert_same_bits(run_c(tmp_path, given, ["-O2"], pack=pack)["net"], want)
