"""Every operation as C, compiled and run, against what it is: in integers to the bit."""

import dataclasses
import math
import re

import numpy as np
import operation_cases
import pytest
from built import Q
from compiled import COMPILERS, SANITIZED, assert_same, expected, run_c
from operation_cases import FORMS, PAIR, STEPS, alone, cast, expression, together

from hybrid_jax import program as p
from hybrid_jax.deploy import c
from hybrid_jax.program import Convert, Encoding, Program, Step, Tensor

pytestmark = pytest.mark.skipif(not COMPILERS, reason="no C compiler")


@pytest.fixture(scope="module")
def cases():
    """{form: (names, program, inputs, outputs of the reference)} of every operation."""
    found = {}
    for form in FORMS:
        names, program = together(form)
        xs = [x for name in names for x in operation_cases.inputs(name, 6)]
        for x in xs if form != "floats" else ():
            x.reshape(-1)[: min(x.size, 4)] = [np.nan, np.inf, -np.inf, 3e38][: min(x.size, 4)]
        found[form.replace(" ", "_")] = names, program, tuple(xs), expected(program, xs)
    return found


FAST = ["-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=fast"]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(FAST, id="fast", marks=pytest.mark.slow),
        pytest.param(SANITIZED, id="sanitized"),
    ],
)
def test_every_operation_gives_what_the_reference_gives(cases, tmp_path, flags, compiler):
    got = run_c(tmp_path, {form: case[1:3] for form, case in cases.items()}, flags, compiler)
    for form, (names, _, _, want) in cases.items():
        for name, ours, theirs in zip(names, got[form], want, strict=True):
            assert len(np.unique(theirs)) > 2, f"{name} is constant: it shows nothing"
            assert_same([ours], [theirs], alone(name, form.replace("_", " ")), name)


# Of integers, which C wraps around as JAX does.
BINARY = ("add", "sub", "mul", "div", "rem", "max", "min", "eq", "ne", "lt", "le", "gt", "ge")
INTS = cast("int32", 0), cast("int32", 1)
INTEGERS = {f"int_{name}": (*INTS, Step(name, (3, 4))) for name in BINARY} | {
    "int_not": (*INTS, Step("not", (3,))),
    "int_square": (*INTS, Step("integer_pow", (3,), (("y", 2),)), Step("neg", (5,)),
                   Step("abs", (6,)), Step("sub", (7, 4))),
    "choose": (*INTS, Step("select_n", (3, 0, 1, 2))),
}  # fmt: skip


def test_every_function_is_written_step_by_step(tmp_path):
    infinite = np.full((1, 16), math.inf, np.float32)
    xs = tuple(np.concatenate([x, sign * infinite]) for x, sign in zip(PAIR, (1, -1)))
    given = {
        f"f_{re.sub('[^a-z0-9]', '_', name.lower())}": (expression(*steps), xs)
        for name, steps in (STEPS | INTEGERS).items()
    }
    got = run_c(tmp_path, given, SANITIZED)
    for name, (program, _) in given.items():
        want = expected(program, xs)
        assert len(np.unique(want[0])) > 1, f"{name} shows nothing"
        for ours, theirs in zip(got[name], want, strict=True):
            np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs), name)
            assert_same([ours], [theirs], program, name)


def test_a_step_that_c_has_not_is_named():
    with pytest.raises(ValueError, match="function 'z' must be in float32 or integers in C, got b"):
        c.to_c(expression(cast("bfloat16")))
    with pytest.raises(ValueError, match="function 'z' must be of steps that C has, got 'pow'"):
        c.to_c(expression(cast("int32"), Step("pow", (3, 3))))


def stored(*steps, **shapes):
    """A program of float32 tensors but for those whose name begins with q."""
    tensors = {n: Tensor(shape, Q if n[0] == "q" else None) for n, shape in shapes.items()}
    names = list(shapes)
    return Program(names[0], names[-1], tensors, steps)


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        (p.Add(("q", "q"), "y"), "all floats or all encoded"),
        (p.Add(("q", "x"), "qy"), "all floats or all encoded"),
        (p.Clip(("x",), "qy", 0.0, 1.0), "all floats or all encoded"),
        (p.Softmax(("q",), "y"), "floats, as what it reads must be"),
        (p.Largest(("q",), "qother", ()), "encoded as 'q'"),
    ],
)
def test_edges_that_are_stored_in_part_are_refused(step, wanted):
    program = stored(Convert(("x",), "q"), step, x=(2,), q=(2,), **{step.output: (2,)})
    other = {"qother": Tensor((2,), Encoding(1.0))} if step.output == "qother" else {}
    program = dataclasses.replace(program, tensors=program.tensors | other)
    with pytest.raises(ValueError, match=f"tensor '{step.output}' .* must be {wanted}"):
        c.to_c(program)
