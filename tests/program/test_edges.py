import jax.numpy as jnp
import pytest

from hybrid_jax import program as p

FUNCTIONS = {
    "split": lambda params, x: jnp.split(x, 2, -1)[0],
    "pad": lambda params, x: jnp.pad(x, ((0, 0), (1, 1), (0, 0)), constant_values=1.5),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_lengths_of_edges_are_ints(name):
    program = p.lower(FUNCTIONS[name], {"unused": jnp.ones(1)}, jnp.ones((2, 4, 6)))
    lengths = [length for tensor in program.tensors.values() for length in tensor.shape]
    assert {type(length) for length in lengths} == {int}


def test_gate_and_experts_have_inputs_of_one_dtype():
    def part(dtype):
        tensors = {"x": p.Tensor((2,), None, dtype), "y": p.Tensor((2,))}
        return p.Program("x", "y", tensors, (p.Clip(("x",), "y", 0.0, 1.0),))

    with pytest.raises(ValueError, match=r"inputs of one dtype, got \['float32', 'uint8'\]"):
        p.Mixture(part("uint8"), (part("uint8"), part("float32")))
