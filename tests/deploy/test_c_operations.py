"""Every operation as C, compiled and run, against what it is: in integers to the bit."""

import dataclasses
import math

import numpy as np
import operation_cases
import pytest
from built import Q
from compiled import COMPILERS, SANITIZED, assert_same, expected, run_c
from operation_cases import CLASSES, FORMS, alone, together

from hybrid_jax import program as p
from hybrid_jax.core.functions import FUNCTIONS
from hybrid_jax.deploy import c, c_statements
from hybrid_jax.program import Convert, Encoding, Function, Program, Step, Tensor

pytestmark = pytest.mark.skipif(not COMPILERS, reason="no C compiler")


def test_every_operation_has_a_rule():
    assert set(c_statements.RULES) == CLASSES


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
@pytest.mark.parametrize("flags", [FAST, SANITIZED], ids=["fast", "sanitized"])
def test_every_operation_gives_what_the_reference_gives(cases, tmp_path, flags, compiler):
    got = run_c(tmp_path, {form: case[1:3] for form, case in cases.items()}, flags, compiler)
    for form, (names, _, _, want) in cases.items():
        for name, ours, theirs in zip(names, got[form], want, strict=True):
            assert len(np.unique(theirs)) > 2, f"{name} is constant: it shows nothing"
            assert_same([ours], [theirs], alone(name, form.replace("_", " ")), name)


BINARY = ("add", "sub", "mul", "div", "rem", "max", "min", "eq", "ne", "lt", "le", "gt", "ge")
BOOLEAN = ("and", "or", "xor")
VALUES = np.append(np.linspace(-3, 3, 41), [math.inf, -math.inf]).astype(np.float32)
NUMBER, WHOLE = VALUES[28], np.int32(2)


def function_steps():
    """{name: (steps, constants)} of every row of FUNCTIONS in floats, and in integers."""
    to_int = Step("convert_element_type", (0,), (("new_dtype", "int32"),))
    found = {}
    for name in FUNCTIONS:
        if name in BINARY:
            found[name] = (Step(name, (0, 1)),), (NUMBER,)
            found[f"int_{name}"] = (Step("mul", (0, 2)), to_int._replace(operands=(3,)),
                                    Step(name, (4, 1))), (WHOLE, NUMBER)  # fmt: skip
        elif name in BOOLEAN:
            steps = Step("gt", (0, 1)), Step("gt", (0, 2)), Step(name, (3, 4))
            found[name] = steps, (np.float32(-1), NUMBER)
        elif name not in SPECIAL:
            found[name] = (Step(name, (0,)),), ()
    return found | SPECIAL


ROUND, TYPE = "rounding_method", "new_dtype"
SPECIAL = {
    "clamp": ((Step("clamp", (1, 0, 2)),), (np.float32(-0.5), NUMBER)),
    "atan2": ((Step("atan2", (0, 1)),), (NUMBER,)),
    "pow": ((Step("pow", (1, 0)),), (NUMBER,)),
    "integer_pow": ((Step("integer_pow", (0,), (("y", 3),)),), ()),
    "integer_pow_below": ((Step("integer_pow", (0,), (("y", -2),)),), ()),
    "round": ((Step("round", (0,), ((ROUND, "TO_NEAREST_EVEN"),)),), ()),
    "round_away": ((Step("round", (0,), ((ROUND, "AWAY_FROM_ZERO"),)),), ()),
    "not": ((Step("gt", (0, 1)), Step("not", (2,))), (NUMBER,)),
    "int_not": ((Step("convert_element_type", (0,), ((TYPE, "int32"),)), Step("not", (1,))), ()),
    "select_n": ((Step("gt", (0, 1)), Step("select_n", (2, 0, 1))), (NUMBER,)),
    "choose": (
        (Step("convert_element_type", (0,), ((TYPE, "int32"),)), Step("select_n", (3, 0, 1, 2))),
        (NUMBER, np.float32(7)),
    ),
    "convert_element_type": ((Step("convert_element_type", (0,), ((TYPE, "uint8"),)),), ()),
    "to_bool": (
        (Step("floor", (0,)), Step("convert_element_type", (1,), ((TYPE, "bool"),))), (),
    ),
    "int_square": ((Step("convert_element_type", (0,), ((TYPE, "int32"),)),
                    Step("integer_pow", (1,), (("y", 2),)), Step("neg", (2,)),
                    Step("abs", (3,)), Step("sub", (4, 1))), ()),
}  # fmt: skip


def test_every_function_is_written_step_by_step(tmp_path):
    steps = function_steps()
    assert set(FUNCTIONS) <= set(steps)
    tensors = {name: Tensor(VALUES.shape) for name in "xy"}
    given = {}
    for name, (own, constants) in steps.items():
        program = Program("x", "y", tensors, (Function(("x",), "y", own, constants),))
        given[f"f_{name}"] = program, (VALUES[None],)
    got = run_c(tmp_path, given, SANITIZED)
    for name, (program, xs) in given.items():
        want = expected(program, xs)
        assert len(np.unique(want[0])) > 1, f"{name} shows nothing"
        np.testing.assert_array_equal(np.isnan(got[name][0]), np.isnan(want[0]), name)
        assert_same(got[name], want, program, name)


def test_a_step_that_c_has_not_is_named():
    half = Step("convert_element_type", (0,), (("new_dtype", "bfloat16"),))
    tensors = {"x": Tensor((2,)), "y": Tensor((2,))}
    with pytest.raises(ValueError, match="function 'y' must be in float32 or integers in C, got b"):
        c.to_c(Program("x", "y", tensors, (Function(("x",), "y", (half,)),)))
    steps = Step("convert_element_type", (0,), (("new_dtype", "int32"),)), Step("pow", (1, 1))
    with pytest.raises(ValueError, match="function 'y' must be of steps that C has, got 'pow'"):
        c.to_c(Program("x", "y", tensors, (Function(("x",), "y", steps),)))


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
