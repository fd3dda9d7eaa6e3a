"""The inference graph evaluated in JAX: in integers to the last bit what a device computes.

The function jits, vmaps and exports like any other. `simulate` is its twin in floats.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from hybrid_jax import experts
from hybrid_jax.deploy import arithmetic
from hybrid_jax.deploy.forms import check
from hybrid_jax.deploy.operations import evaluate, rounded
from hybrid_jax.deploy.program import Conv, Dense, Mixture, Program

Forms = Mapping[str, str] | Sequence[Mapping[str, str]]


def run(program: Program | Mixture, forms: Forms | None = None) -> Callable[[jax.Array], jax.Array]:
    """The function that a program stands for.

    Args:
      program: In floats, in integers or mixed. A mixture runs the gate and one expert an image.
      forms: {name of a convolution: 'conv' or 'matmul'}, as `forms.fastest` measures them; of a
        mixture for the gate and for each expert. What is not named is a 'conv'.

    Returns:
      fn(x) -> y, float32 (B, …) to float32 (B, …), pure. A NaN in the gate's output for an image
      makes its result NaN. A NaN that is quantized becomes the zero point.

    Raises:
      ValueError: If `forms` name what is no convolution or an unknown form, or are too few.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from hybrid_jax.deploy.program import Convert, Dense, Encoding, Tensor, Weights
      >>> weights = Weights(np.int8([[2], [3]]), np.float32([0.5]), np.float32([1.0]), 8)
      >>> tensors = {'x': Tensor((2,)), 'q': Tensor((2,), Encoding(0.25, 128)), 'y': Tensor((1,))}
      >>> steps = (Convert(('x',), 'q'), Dense(('q',), 'y', 'dense', weights))
      >>> run(Program('x', 'y', tensors, steps))(jnp.array([[1.0, 2.1]]))
      Array([[5.]], dtype=float32)
    """
    return _function(program, forms, evaluate)


def simulate(
    program: Program | Mixture, forms: Forms | None = None
) -> Callable[[jax.Array], jax.Array]:
    """The fake-quantized twin of `run`: the same steps on float32 values.

    What is encoded is rounded to its encoding's values and stays a float; kernels are the floats
    that their integers stand for, and biases are rounded to steps of the sums. For targets without
    integer kernels, and to see what integer sums change: a value next to half a step may fall on
    the other side.

    Args:
      program: As for `run`.
      forms: As for `run`.

    Returns:
      fn(x) -> y, as `run` returns.

    Example:
      >>> import jax.numpy as jnp
      >>> from hybrid_jax.deploy.program import Convert, Encoding, Tensor
      >>> tensors = {'x': Tensor((2,)), 'q': Tensor((2,), Encoding(0.25, 128)), 'y': Tensor((2,))}
      >>> steps = (Convert(('x',), 'q'), Convert(('q',), 'y'))
      >>> simulate(Program('x', 'y', tensors, steps))(jnp.array([[0.3, 99.0]]))
      Array([[ 0.25, 31.75]], dtype=float32)
    """
    return _function(program, forms, _evaluate_simulated)


def _function(program, forms, step):
    if isinstance(program, Mixture):
        count = len(program.parts)
        forms = [{}] * count if forms is None else forms
        if isinstance(forms, Mapping) or len(forms) != count:
            raise ValueError(f"forms must be {count} mappings, of gate and experts, got {forms}")
        gate, *fns = map(functools.partial(_function, step=step), program.parts, forms)
        edge = experts.one_of([lambda _, x, fn=fn: fn(x) for fn in fns], lambda _, x: gate(x))
        return lambda x: edge([()] * len(fns), (), x)
    forms = {} if forms is None else forms
    check(forms, program)
    return lambda x: trace_tensors(program, x, forms, step)[program.output]


def trace_tensors(
    program: Program,
    x: jax.Array,
    forms: Mapping[str, str] | None = None,
    step: Callable[..., jax.Array] = evaluate,
) -> dict[str, jax.Array]:
    """Every tensor of a program by name, (B, …), for float32 inputs x: uint8 where encoded.

    Args:
      program: The program.
      x: float32 (B, …).
      forms: As for `run`.
      step: What computes an operation: `evaluate`, or another function of its arguments.
    """
    if x.shape[1:] != program.input_shape:
        shape = ", ".join(map(str, program.input_shape))
        raise ValueError(f"x must have shape (B, {shape}), got {x.shape}")
    values = {program.input: x}
    for op in program.operations:
        values[op.output] = step(
            op,
            [values[name] for name in op.inputs],
            [program.encoding(name) for name in op.inputs],
            program.encoding(op.output),
            program.tensors[op.output].shape,
            (forms or {}).get(getattr(op, "name", None), "conv"),
        )
    return values


def _evaluate_simulated(op, values, encodings, output, shape, form):
    if isinstance(op, Conv | Dense) and encodings[0] is not None:
        step = np.float32(encodings[0].scale) * op.weights.scale
        bias = (arithmetic.integer_bias(op.weights, encodings[0]) * step).astype(np.float32)
        op = dataclasses.replace(op, weights=dataclasses.replace(op.weights, bias=bias))
    y = evaluate(op, values, [None] * len(values), None, shape, form)
    if output is None:
        return y
    return rounded(y, output)
