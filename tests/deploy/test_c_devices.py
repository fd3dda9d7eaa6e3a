"""What a C file offers to whoever builds it in: his own memory, C++, and a check of his board."""

import re
import shutil
import subprocess

import choices
import numpy as np
import pytest
from built import Build, Q, floats
from compiled import COMPILERS, SANITIZED, STRICT, compiled, inputs

from hybrid_jax import deploy
from hybrid_jax.program import Mean

pytestmark = pytest.mark.skipif(not COMPILERS, reason="no C compiler")
WARNED = [*STRICT, "-Wconversion", "-Wsign-conversion", "-Wshadow"]


def network(seed=0, features=5):
    b = Build((6, 5, 3), seed=seed).conv(features, bits=4, to=Q).conv(features, groups=features)
    return b.add(Mean, (features,), Q).dense(4).program()


def test_networks_share_the_memory_of_the_caller_and_keep_none(tmp_path):
    """Two of them in one block, from C++, beside their answers in memory of their own."""
    xs = np.concatenate([inputs(network(), finite=True)[0]] * 2)
    for name, seed in (("a", 0), ("b", 1)):
        deploy.export_to("c", tmp_path / f"{name}.c", network(seed, 5 + seed), name=name)
        deploy.export_c_test(tmp_path / f"{name}_test.c", network(seed, 5 + seed), xs, name=name)
    calls = " || ".join(f"{name}_test()" for name in "aab")
    main = """
        extern "C" int a_test(void);
        extern "C" int b_test(void);
        alignas(4) static unsigned char memory[A_RAM > B_RAM ? A_RAM : B_RAM];
        void a_run(const float *x, float *y) { a_run_in(memory, x, y); }
        void b_run(const float *x, float *y) { b_run_in(memory, x, y); }
    """
    text = f'#include "a.c"\n#include "b.c"\n{main}\nint main() {{ return {calls}; }}\n'
    (tmp_path / "main.cpp").write_text(text)
    for name in ("a", "b"):
        kept = [f"-D{name.upper()}_SHARED", "-c", f"{name}.c", f"{name}_test.c"]
        compiled(["gcc", *WARNED, *SANITIZED, *kept], tmp_path)
    objects = ["a.o", "b.o", "a_test.o", "b_test.o"]
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    compiled(["g++", *SANITIZED, "-o", "main", "main.cpp", *objects], tmp_path)
    assert subprocess.run([tmp_path / "main"], check=False).returncode == 0


@pytest.mark.parametrize(
    "program",
    [network(), floats(network()), choices.mixture(), choices.cascade(), choices.of_bytes(None)],
    ids=["integers", "floats", "mixture", "cascade", "bytes"],
)
def test_a_board_is_checked_by_a_second_file(tmp_path, program):
    xs = [x[:2] for x in inputs(program, finite=True)]
    deploy.export_to("c", tmp_path / "model.c", program)
    deploy.export_c_test(tmp_path / "model_test.c", program, *xs)

    def found():
        files = ["model.c", "model_test.c"]
        compiled(["gcc", *STRICT, "-DMODEL_TEST_MAIN", "-o", "test", *files, "-lm"], tmp_path)
        return subprocess.run([tmp_path / "test"], check=False).returncode

    assert found() == 0
    text = (tmp_path / "model_test.c").read_text()
    # Another last number, which is one of the second answer.
    wrong = re.sub(r"(right_\d+\[\d+\] = \{[^}]*?)[^,{}\s]+\};", r"\g<1>0x1p+20f};", text)
    (tmp_path / "model_test.c").write_text(wrong)
    assert found() == 2


def test_examples_must_be_as_the_network_takes_them(tmp_path):
    for bad in (np.zeros((2, 6, 5, 3)), np.zeros((0, 6, 5, 3), np.float32)):
        with pytest.raises(ValueError, match=r"inputs must be \(n, 6, 5, 3\) float32, got"):
            deploy.export_c_test(tmp_path / "test.c", network(), bad)
    assert not list(tmp_path.iterdir())
