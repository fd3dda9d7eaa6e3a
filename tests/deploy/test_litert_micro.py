"""Files of LiteRT in TFLite Micro's own interpreter, which a microcontroller runs."""

import jax
import numpy as np
import pytest
from operation_cases import CASES, alone, inputs, together

from hybrid_jax import program as p
from hybrid_jax.deploy import litert

runtime = pytest.importorskip("tflite_micro.python.tflite_micro.runtime")

ABSENT = {
    "broadcast": "floats",
    "broadcast of a row": "floats",  # TILE
    "transpose of six": "floats",
    "slice of six": "floats",  # more than four axes
    "clip to its own": "floats",  # RELU_N1_TO_1
}
"""{case: a form of it for which TFLite Micro has no operation}."""
# A window of padding alone: the largest of nothing is not a number there.
OTHERS = [*ABSENT, "max pool in wide padding"]


def session(data, *xs):
    """The outputs for one example."""
    interpreter = runtime.Interpreter.from_bytes(data, arena_size=2**24)
    for index, x in enumerate(xs):
        interpreter.set_input(x[:1], index)
    interpreter.invoke()
    return interpreter.get_output


@pytest.mark.parametrize("form", [pytest.param("floats", marks=pytest.mark.slow), "integers"])
def test_it_computes_what_the_program_does(form):
    names, program = together(form, OTHERS)
    xs = [x for name in names for x in inputs(name)]
    output = session(litert.to_litert(program), *xs)
    for index, (name, want) in enumerate(zip(names, jax.jit(p.run(program))(*xs), strict=True)):
        want = np.asarray(want[:1])
        if form == "floats":
            room = 1e-5 * np.abs(want).max()
        else:  # Its kernels round an accumulator twice, which is a step more.
            room = (CASES[name].most + 1.001) * program.encoding(f"{name}: last").scale
        np.testing.assert_allclose(output(index), want, rtol=0, atol=room, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), ABSENT.items())
def test_what_it_has_not(name, form):
    with pytest.raises(RuntimeError, match="allocate tensors"):
        session(litert.to_litert(alone(name, form)), *inputs(name))
