"""An inference graph evaluated in JAX: in floats, as a device rounds them, and in its integers.

One walk serves all; what differs is how an operation is computed. The functions jit, vmap and
export like any other.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core
from hybrid_jax.program import arithmetic, forms
from hybrid_jax.program.choice import Choice
from hybrid_jax.program.graph import Params, Program
from hybrid_jax.program.operations import Conv, Dense, compute, convert, rounded

Forms = Mapping[str, str] | Sequence[Mapping[str, str]]
Rule = Callable[..., jax.Array]


def edges(program: Program, inputs: Sequence[jax.Array], rule: Rule = compute) -> dict[str, Any]:
    """Every edge of a program by name, (B, …): uint8 where encoded, else float32.

    An operation is computed by rule(op, values, encodings, encoding of the result).
    """
    values = {}
    for name, x in zip(program.inputs, check_inputs(program, inputs), strict=True):
        x = jnp.asarray(x).astype(jnp.float32)
        values[name] = convert(x, None, program.encoding(name))
    for op in program.operations:
        encodings = [program.encoding(name) for name in op.inputs]
        operands = [values[name] for name in op.inputs]
        values[op.output] = rule(op, operands, encodings, program.encoding(op.output))
    return values


def check_inputs(program: Program, inputs: Sequence[Any]) -> Sequence[Any]:
    """Returns the inputs if they are those of the program: how many, their shapes and dtypes."""
    tensors = [(name, program.tensors[name]) for name in program.inputs]
    core.check_arrays([(name, own.shape, own.dtype) for name, own in tensors], inputs)
    return inputs


def results(program: Program, values: Mapping[str, jax.Array]) -> jax.Array | tuple[jax.Array, ...]:
    """What a program returns, of the dtypes of the traced function; one array if it is one."""
    outs = []
    for name in program.outputs:
        tensor = program.tensors[name]
        y = convert(values[name], tensor.encoding, None)
        outs.append(y if tensor.dtype == "float32" else y.astype(tensor.dtype))
    return outs[0] if len(outs) == 1 else tuple(outs)


def apply(program: Program, params: Params, *inputs: jax.Array) -> Any:
    """What a program in floats returns with these weights; differentiable in both.

    Example:
      >>> from hybrid_jax import program as p
      >>> fn = lambda params, x: x @ params['w'] + 1
      >>> net = p.lower(fn, {'w': jnp.ones((2, 1))}, jnp.ones((1, 2)))
      >>> apply(net, net.params, jnp.ones((1, 2)))
      Array([[3.]], dtype=float32)
    """
    made = program.replace(params)
    return results(made, edges(made, inputs))


def run(program: Program | Choice, forms: Forms | None = None) -> Callable[..., Any]:
    """The function that a program stands for, in integers to the last bit what a device computes.

    It is fn(*inputs) -> outputs, float32 (B, …), and pure; a choice runs for each image what that
    needs. A NaN that is quantized becomes the zero point. `forms` are {name of a convolution:
    'conv' or 'matmul'}, as `fastest` measures them, of a choice for each part; else it is a 'conv'.

    Example:
      >>> from hybrid_jax.program import Convert, Dense, Encoding, Program, Tensor, Weights
      >>> weights = Weights(np.int8([[2], [3]]), np.float32([0.5]), np.float32([1.0]), 8)
      >>> tensors = {'x': Tensor((2,)), 'q': Tensor((2,), Encoding(0.25, 128)), 'y': Tensor((1,))}
      >>> steps = (Convert(('x',), 'q'), Dense(('q',), 'y', 'dense', weights))
      >>> run(Program('x', 'y', tensors, steps))(jnp.array([[1.0, 2.1]]))
      Array([[5.]], dtype=float32)
    """
    return _function(program, forms, compute)


def simulate(program: Program | Choice, forms: Forms | None = None) -> Callable[..., Any]:
    """The fake-quantized twin of `run`: the same steps on float32 values.

    What is encoded is rounded to its encoding's values and stays a float; kernels are the floats
    that their integers stand for, and biases are rounded to steps of the sums. For targets without
    integer kernels, and to see what integer sums change: a value next to half a step may fall on
    the other side.
    """
    return _function(program, forms, in_floats)


def in_floats(op: Any, values: list, encodings: list, output: Any, **options: Any) -> jax.Array:
    """An operation of what is encoded, on the floats that the integers stand for."""
    if isinstance(op, Conv | Dense) and encodings[0] is not None:
        bias = arithmetic.rounded_bias(op.weights, encodings[0])
        op = dataclasses.replace(op, weights=dataclasses.replace(op.weights, bias=bias))
    return rounded(op.floats(*values, **options), output)


def _function(program, given, rule):
    if isinstance(program, Choice):
        count = len(program.parts)
        given = [{}] * count if given is None else given
        if isinstance(given, Mapping) or len(given) != count:
            raise ValueError(f"forms must be {count} mappings, one for each part, got {given}")
        fns = [_function(*pair, rule) for pair in zip(program.written, given, strict=True)]
        return lambda x: core.one_by_one(functools.partial(program.answer, fns), x)
    given = {} if given is None else given
    names = [op.name for op in program.weighted if isinstance(op, Conv)]
    for name, form in given.items():
        core.check_choice("operation of forms", name, names)
        core.check_choice(f"form of {name!r}", form, forms.FORMS)

    def formed(op, *rest):
        options = {"form": given[op.name]} if getattr(op, "name", None) in given else {}
        return rule(op, *rest, **options)

    def fn(*inputs):
        values = edges(program, inputs, formed)
        if rule is compute:
            return results(program, values)
        plain = {name: dataclasses.replace(t, encoding=None) for name, t in program.tensors.items()}
        return results(dataclasses.replace(program, tensors=plain), values)

    return fn


def fastest(
    program: Program | Choice, batch: int = 1, choices: core.Choices | None = None
) -> dict[str, str] | list[dict[str, str]]:
    """Measures which form of each convolution is the fastest on the default backend.

    Each shape is compiled in both forms and timed by turns, once on each machine, with `batch`
    images for each call; a choice runs its parts with one. What is measured is kept in `choices`,
    by default in `core.CHOICES`. The result is as `run` takes it.
    """
    core.check_integer("batch", batch, 1)
    if isinstance(program, Choice):
        return [fastest(part, choices=choices) for part in program.parts]
    choices = core.CHOICES if choices is None else choices
    return {
        op.name: _measured(choices, batch, program, op)
        for op in program.weighted
        if isinstance(op, Conv)
    }


def _measured(choices, batch, program, op):
    shape = (batch, *program.tensors[op.inputs[0]].shape)
    dtype = np.float32 if program.encoding(op.inputs[0]) is None else np.int8
    kernel = np.arange(op.weights.values.size) % 5 - 2
    kernel = kernel.reshape(op.weights.values.shape).astype(dtype)
    ways = {
        form: lambda x, form=form: forms.convolve(op, x, jnp.asarray(kernel), form=form)
        for form in forms.FORMS
    }
    asked = f"deployed convolution: {np.dtype(dtype)} {shape} by {kernel.shape}, "
    asked += f"{op.strides}, {op.padding}, {op.dilation}, {op.groups}"
    return choices.choose(asked, ways, jax.ShapeDtypeStruct(shape, dtype))
