"""How a convolution is computed, chosen by measurement: as one operation or as a matrix product.

XLA's convolutions are many times slower on a CPU for some shapes than the matrix product of what
each output position sees with the kernel, and a little faster for others. The sums are the same, of
integers to the last bit, so the choice is a matter of speed alone.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hybrid_jax import core
from hybrid_jax.deploy.program import Conv, Mixture, Program

_NHWC = ("NHWC", "HWIO", "NHWC")


def fastest(
    program: Program | Mixture, batch: int = 1, choices: core.Choices | None = None
) -> dict[str, str] | list[dict[str, str]]:
    """Measures which form of each convolution is the fastest on the default backend.

    Each shape is compiled in both forms and timed by turns, once on each machine.

    Args:
      program: In floats, in integers or mixed.
      batch: Images for each call. A mixture runs its experts with one image at a time.
      choices: Where what is measured is kept; None for `core.CHOICES`.

    Returns:
      {name of the convolution: 'conv' or 'matmul'}, as `run(program, forms)` takes it; of a mixture
      a list, for the gate and for each expert.

    Raises:
      ValueError: If `batch` is not an integer of at least 1.

    Example:
      >>> from hybrid_jax.deploy.program import Tensor, Weights
      >>> weights = Weights(np.ones((3, 3, 1, 2), np.float32), None, np.zeros(2, np.float32))
      >>> tensors = {'x': Tensor((4, 4, 1)), 'y': Tensor((2, 2, 2))}
      >>> program = Program('x', 'y', tensors, (Conv(('x',), 'y', 'stem', weights),))
      >>> fastest(program)['stem'] in FORMS
      True
    """
    core.check_integer("batch", batch, 1)
    if isinstance(program, Mixture):
        return [fastest(part, choices=choices) for part in program.parts]
    choices = core.CHOICES if choices is None else choices
    return {
        op.name: _fastest(choices, batch, program, op)
        for op in program.weighted
        if isinstance(op, Conv)
    }


def _fastest(choices, batch, program, op):
    shape = (batch, *program.tensors[op.inputs[0]].shape)
    dtype = np.float32 if program.encoding(op.inputs[0]) is None else np.int8
    kernel = np.arange(op.weights.values.size) % 5 - 2
    kernel = kernel.reshape(op.weights.values.shape).astype(dtype)
    forms = {
        form: lambda x, form=form: convolve(op, x, jnp.asarray(kernel), form=form) for form in FORMS
    }
    asked = f"deployed convolution: {np.dtype(dtype)} {shape} by {kernel.shape}, "
    asked += f"{op.strides}, {op.padding}, {op.dilation}, {op.groups}"
    return choices.choose(asked, forms, jax.ShapeDtypeStruct(shape, dtype))


def check(forms: Mapping[str, str], program: Program) -> None:
    """Raises ValueError if a name is no convolution of the program, or its form is unknown."""
    names = [op.name for op in program.weighted if isinstance(op, Conv)]
    for name, form in forms.items():
        core.check_choice("operation of forms", name, names)
        core.check_choice(f"form of {name!r}", form, FORMS)


def convolve(
    op: Conv, x: jax.Array, kernel: jax.Array, zero: int = 0, form: str = "conv"
) -> jax.Array:
    """A convolution without bias, summed in float32, or of int8 in int32.

    Args:
      op: Strides, padding, dilation and groups.
      x: (B, H, W, C), float32 or int8.
      kernel: (kh, kw, C / groups, O) of that dtype.
      zero: What the padding holds.
      form: 'conv' or 'matmul'.
    """
    dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return FORMS[form](op, pad(x, [*op.padding, (0, 0)], zero), kernel, dtype)


def pad(x: jax.Array, padding, zero: int | float) -> jax.Array:
    """(before, after) entries of `zero` along each axis but the batch."""
    widths = [(0, 0, 0), *((before, after, 0) for before, after in padding)]
    return lax.pad(x, jnp.asarray(zero, x.dtype), widths)


def _conv(op, x, kernel, dtype):
    return lax.conv_general_dilated(
        x,
        kernel,
        op.strides,
        "VALID",
        rhs_dilation=op.dilation,
        dimension_numbers=_NHWC,
        feature_group_count=op.groups,
        precision="highest",
        preferred_element_type=dtype,
    )


def _matmul(op, x, kernel, dtype):
    taps = _taps(op, x, kernel.shape[:2])
    if op.groups == x.shape[-1] == kernel.shape[-1]:  # depthwise: a product of one entry each
        weights = kernel.reshape(len(taps), 1, 1, 1, -1).astype(dtype)
        return sum(tap.astype(dtype) * weight for tap, weight in zip(taps, weights, strict=True))
    outputs = kernel.shape[-1] // op.groups
    # (groups, batch and positions, taps and channels of the group) times (groups, the same, O / G)
    seen = jnp.stack([tap.reshape(-1, op.groups, kernel.shape[2]) for tap in taps], 2)
    seen = seen.reshape(-1, op.groups, len(taps) * kernel.shape[2])
    rows = kernel.reshape(-1, op.groups, outputs)
    if op.groups == 1:
        y = _dot(seen[:, 0], rows[:, 0], dtype)
    else:
        y = jax.vmap(functools.partial(_dot, dtype=dtype), (1, 1), 1)(seen, rows)
    return y.reshape(*taps[0].shape[:-1], kernel.shape[-1])


def _taps(op, x, window):
    """What the positions of the result see of x through each entry of the kernel."""
    spans = []
    for size, length, stride, dilation in zip(
        window, x.shape[1:3], op.strides, op.dilation, strict=True
    ):
        reach = length - (size - 1) * dilation
        spans.append([slice(i * dilation, i * dilation + reach, stride) for i in range(size)])
    return [x[:, rows, columns] for rows in spans[0] for columns in spans[1]]


def _dot(a, b, dtype):
    return lax.dot(a, b, precision="highest", preferred_element_type=dtype)


FORMS = {"conv": _conv, "matmul": _matmul}
"""The forms of a convolution."""
