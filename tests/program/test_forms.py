"""The forms of a convolution, and which is the fastest; that they agree is in test_reference."""

import jax
import numpy as np
import pytest

from hybrid_jax import core
from hybrid_jax import program as p
from hybrid_jax.core import measure
from hybrid_jax.program import (
    Conv,
    Dense,
    Encoding,
    Mixture,
    Program,
    Reshape,
    Tensor,
    Weights,
    forms,
)


def program(outputs=2, encoding=None):
    """A convolution of 4 × 4 × 1 and a dense layer that nobody can choose a form for."""
    weights = Weights(
        np.ones((4, 4, 1, outputs), np.int8 if encoding else np.float32),
        np.ones(outputs, np.float32) if encoding else None,
        np.zeros(outputs, np.float32),
        8 if encoding else 32,
    )
    tensors = {
        "x": Tensor((4, 4, 1), encoding),
        "y": Tensor((1, 1, outputs)),
        "row": Tensor((outputs,)),
        "z": Tensor((outputs,)),
    }
    square = Weights(np.eye(outputs, dtype=np.float32), None, weights.bias)
    steps = (
        Conv(("x",), "y", "stem", weights),
        Reshape(("y",), "row", (outputs,)),
        Dense(("row",), "z", "head", square),
    )
    return Program("x", "z", tensors, steps)


@pytest.fixture
def clock(monkeypatch):
    """Times as we say: 'slow' of the two forms takes a second more. Counts the calls."""

    class Clock:
        slow = "conv"

        def __init__(self):
            self.calls = []

        def __call__(self, fn, *inputs):
            # The matrix product is the one without a convolution in its text.
            form = "conv" if " convolution(" in fn.as_text() else "matmul"
            self.calls.append(form)
            return 2.0 if form == self.slow else 1.0

    made = Clock()
    monkeypatch.setattr(measure, "seconds", made)
    return made


@pytest.fixture
def choices(tmp_path):
    return core.Choices(cache=tmp_path / "choices.json")


@pytest.mark.parametrize("slow", ["conv", "matmul"])
def test_takes_the_faster_and_remembers_it(clock, choices, slow):
    clock.slow = slow
    (other,) = set(forms.FORMS) - {slow}
    assert p.fastest(program(), choices=choices) == {"stem": other}
    measured = len(clock.calls)
    assert clock.calls.count("conv") == clock.calls.count("matmul") == measured / 2
    assert p.fastest(program(), choices=choices) == {"stem": other}
    assert len(clock.calls) == measured
    # Another batch, dtype or shape is another question.
    for other_program, batch in [
        (program(), 2),
        (program(encoding=Encoding(1.0)), 1),
        (program(3), 1),
    ]:
        p.fastest(other_program, batch, choices)
    assert len(clock.calls) == 4 * measured


def test_a_mixture_has_forms_of_each(clock, choices):
    gate, experts = program(), (program(3), program(3))
    assert p.fastest(Mixture(gate, experts), 8, choices) == [{"stem": "matmul"}] * 3
    with pytest.raises(ValueError, match="forms must be 3 mappings, one for each part"):
        p.run(Mixture(gate, experts), {"stem": "conv"})


def test_run_computes_in_the_form_asked_for():
    x = np.ones((1, 4, 4, 1), np.float32)
    for form in forms.FORMS:
        text = jax.jit(p.run(program(), {"stem": form})).lower(x).as_text()
        assert ("stablehlo.convolution" in text) == (form == "conv")


def test_bad_arguments():
    with pytest.raises(ValueError, match="operation of forms must be one of stem, got 'head'"):
        p.run(program(), {"head": "conv"})
    with pytest.raises(ValueError, match="form of 'stem' must be one of conv, matmul, got 'fft'"):
        p.run(program(), {"stem": "fft"})
    with pytest.raises(ValueError, match="batch must be an integer of at least 1, got 0"):
        p.fastest(program(), 0)


@pytest.mark.parametrize("outputs", [16, 24])
@pytest.mark.parametrize("window", [(1, 2), (3, 1)])
def test_integers_beside_a_border_of_zeros(outputs, window):
    # XLA makes the border part of the convolution, and of more than 16 outputs answered with what
    # lay in memory.
    random = np.random.default_rng(0)
    x = random.integers(-127, 128, (2, 6, 6, 4)).astype(np.int8)
    kernel = random.integers(-127, 128, (*window, 4, outputs)).astype(np.int8)
    op = Conv((), "y", "site", None, padding=((1, 0), (1, 1)))
    wanted, got = (
        jax.jit(lambda x, kernel: forms.convolve(op, x, kernel))(*(a.astype(dtype) for a in given))
        for given in [(x, kernel)]
        for dtype in (np.float32, np.int8)
    )
    np.testing.assert_array_equal(got, wanted)
