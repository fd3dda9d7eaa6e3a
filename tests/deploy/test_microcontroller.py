"""A C file on emulated microcontrollers: its answers, and what is counted there."""

import importlib.util
import sys

import choices
import numpy as np
import pytest
from built import RELU, Build
from compiled import COMPILERS

from hybrid_jax import deploy
from hybrid_jax.deploy import artifact, microcontroller
from hybrid_jax.program import UNBOUNDED, Encoding

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec(name), reason=f"no {name}")
    for name in ("ziglang", "unicorn")
]

WARNED = ("-Werror", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wsign-conversion")

# Two words are pushed and popped, one is read and written a hundred times.
LOOP = """void loop_run(const float *input, float *output);
__attribute__((naked)) void loop_run(const float *input, float *output)
{
    __asm__("push {r4, lr}\\n movs r2, #100\\n 1: ldr r3, [r0]\\n str r3, [r1]\\n"
            "subs r2, #1\\n bne 1b\\n pop {r4, pc}");
}
"""
ENDS = """#include <math.h>
#include <stdint.h>
void ends_run(const float *a, const uint8_t *b, const float *c, float *y, float *z);
void ends_run(const float *a, const uint8_t *b, const float *c, float *y, float *z)
{
    static const float table[4] = {1.0f, 2.0f, 4.0f, 8.0f};
    static volatile float kept[10];
    kept[*b] = *a;
    *y = *c + kept[*b];
    z[0] = table[*b];
    z[1] = rintf(*a);
}
"""


def written(path, text, inputs, outputs):
    def facts(ends):
        return [{"shape": [1, *shape], "dtype": dtype} for shape, dtype in ends]

    name = path.stem
    manifest = {"kind": "c", "name": name, "inputs": facts(inputs), "outputs": facts(outputs)}
    artifact.write(path, text.encode(), manifest)
    return path


@pytest.fixture
def loop(tmp_path):
    return written(tmp_path / "loop.c", LOOP, [((1,), "float32")], [((1,), "float32")])


@pytest.mark.parametrize("processor", ["Cortex-M4F", "Cortex-M0+"])
def test_what_is_counted_is_what_is_written(loop, processor):
    x = np.float32([[1.5], [-2.0]])
    ran = deploy.emulate(loop, x, processor=processor, accesses=True)
    np.testing.assert_array_equal(ran.outputs[0], x)
    assert ran.instructions == (403, 403)
    assert (ran.accesses, ran.stack) == ((102, 102), 8)
    assert (ran.code, ran.library, ran.constants, ran.ram) == (14, 0, 0, 0)


def test_ends_beyond_the_registers_and_of_other_dtypes(tmp_path):
    path = written(
        tmp_path / "ends.c",
        ENDS,
        [((), "float32"), ((), "uint8"), ((), "float32")],
        [((), "float32"), ((2,), "float32")],
    )
    a, b, c = np.float32([2.5, -3.5, 8388609]), np.uint8([0, 3, 1]), np.float32([1, 2, 0.5])
    ran = deploy.emulate(path, a, b, c)
    y, z = ran.outputs
    np.testing.assert_array_equal(y, a + c)
    np.testing.assert_array_equal(z, np.stack([np.float32([1, 8, 2]), np.rint(a)], 1))
    assert (ran.constants, ran.ram) == (16, 40)
    assert ran.flash == ran.code + ran.library + 16


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """(path, manifest, images, what this machine answers) of a mixture and of a cascade."""
    if not COMPILERS:
        pytest.skip("no C compiler")
    found, x = [], choices.images(4)
    for program in (choices.mixture(), choices.cascade()):
        path = tmp_path_factory.mktemp("networks") / "model.c"
        manifest = deploy.export_to("c", path, program)
        found.append((path, manifest, x, deploy.TARGETS["c"].session(path, 1, 1)(x)))
    return found


@pytest.mark.parametrize(
    ("processor", "optimize"),
    [
        ("Cortex-M4F", "-O2"),
        ("Cortex-M7", "-O3"),
        ("Cortex-M33", "-Os"),
        ("Cortex-M3", "-O2"),
        ("Cortex-M0+", "-Os"),
    ],
)
def test_networks_answer_with_the_bits_of_this_machine(networks, processor, optimize, monkeypatch):
    """Compiled by Clang, which has nothing to warn of."""
    zig = microcontroller._zig
    monkeypatch.setattr(microcontroller, "_zig", lambda *given: zig(*given, *WARNED))
    for path, manifest, x, want in networks:
        ran = deploy.emulate(path, x, processor=processor, optimize=optimize)
        assert ran.outputs[0].tobytes() == want.tobytes()
        assert ran.ram == manifest["ram"]
        # Arrays are aligned, and the compiler takes some numbers into the code.
        assert ran.constants == pytest.approx(manifest["flash"], abs=200)
        assert 0 < ran.stack < 2048
        assert len(set(ran.instructions)) > 1  # not every image takes the same way


def drawn(seed):
    """A chain of convolutions of all kinds, whose last returns floats."""
    rng = np.random.default_rng(seed)
    b = Build((*rng.integers(6, 12, 2).tolist(), 6), seed=seed)
    for i in range(5):
        groups = int(rng.choice([1, 1, 2, 3]))
        window = tuple(rng.integers(1, 4, 2).tolist())
        b.conv(
            6 * int(rng.integers(1, 5)),
            window,
            tuple(rng.integers(1, 3, 2).tolist()) if i == 1 else (1, 1),
            tuple((int(rng.integers(2)), k - 1) for k in window),
            dilation=(1, int(rng.integers(1, 3)) if window[1] > 1 else 1),
            groups=groups,
            clip=RELU if rng.integers(2) else UNBOUNDED,
            to=None if i == 4 else Encoding(0.03, int(rng.integers(256))),
            bits=int(rng.choice([8, 4])),
        )
    return b.program()


@pytest.mark.skipif(not COMPILERS, reason="no C compiler")
@pytest.mark.parametrize("seed", range(4))
def test_drawn_layers_have_the_same_bits_with_the_dsp_extension_and_without(tmp_path, seed):
    program = drawn(seed)
    x = np.random.default_rng(seed).normal(size=(2, *program.input_shape)).astype(np.float32)
    deploy.export_to("c", tmp_path / "model.c", program)
    want = deploy.TARGETS["c"].session(tmp_path / "model.c", 1, 1)(x)
    assert len(np.unique(want)) > 20
    runs = {
        processor: deploy.emulate(tmp_path / "model.c", x, processor=processor)
        for processor in ("Cortex-M4F", "Cortex-M3")
    }
    for ran in runs.values():
        assert ran.outputs[0].tobytes() == want.tobytes()
    assert runs["Cortex-M4F"].instructions < runs["Cortex-M3"].instructions


def test_bad_input(loop, tmp_path):
    x = np.zeros((1, 1), np.float32)
    with pytest.raises(ValueError, match=r"processor must be one of Cortex-M4F, .*'Cortex-M55'"):
        deploy.emulate(loop, x, processor="Cortex-M55")
    with pytest.raises(ValueError, match=r"optimize must be one of .*, got '-Ofast'"):
        deploy.emulate(loop, x, optimize="-Ofast")
    for bad in ([np.zeros((1, 2), np.float32)], [np.zeros((1, 1))], [x, x], [x[:0]], []):
        with pytest.raises(ValueError, match=r"inputs must be \(n, 1\) float32, got"):
            deploy.emulate(loop, *bad)
    ends = [((1,), "float32")]
    path = written(tmp_path / "none.c", "void f(", ends, ends)
    with pytest.raises(ValueError, match=r"none.c must compile for Cortex-M4F, got"):
        deploy.emulate(path, x)


def test_names_the_extra_that_is_missing(loop, monkeypatch):
    monkeypatch.setitem(sys.modules, "ziglang", None)
    with pytest.raises(ImportError, match=r"hybrid_jax\[microcontroller\]"):
        deploy.emulate(loop, np.zeros((1, 1), np.float32))


def test_floats_are_computed_by_the_unit_that_a_processor_has(tmp_path):
    text = "void f_run(const float *x, float *y) { *y = (float)(int)(*x * *x); }"
    path = written(tmp_path / "f.c", text, [((), "float32")], [((), "float32")])
    for processor in deploy.PROCESSORS:
        ran = deploy.emulate(path, np.float32([2.5]), processor=processor)
        assert ran.outputs[0] == [6]
        assert (ran.library > 0) == (processor in ("Cortex-M3", "Cortex-M0+"))
