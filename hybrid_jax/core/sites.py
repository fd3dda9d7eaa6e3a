"""Sites: the convolutions and matrix products whose kernel comes from the parameters."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jax.extend import core as jex

from hybrid_jax.core.arrangement import by_role
from hybrid_jax.core.labels import INPUT, Arrangement, Value


@dataclasses.dataclass(frozen=True)
class Site:
    """A convolution or matrix product whose kernel comes from the parameters.

    Attributes:
      name: The kernel's path; a kernel used again is 'path#2', 'path#3', ….
      path: Path of the parameter that the kernel is computed from (the largest, if several).
      kind: 'conv' or 'dot'.
      macs: Multiply-accumulates for one example, all `calls` (the length of scans) counted.
      input_shape: Of the activation, with the batch, as is `output_shape`.
      kernel_shape: As the operation takes it, at the position `kernel_operand` of two.
      kernel_in_axes: Axes of the kernel that are summed over (C and the spatial ones).
      kernel_out_axes: Those of output channels O; of the result they are `output_axes`.
      groups: Number of feature groups of a convolution; C for a depthwise one.
      arrangement: Which of the parameter's entries the kernel holds, (taps, in, out), or None.
    """

    name: str
    path: str
    kind: str
    macs: int
    input_shape: tuple[int, ...]
    kernel_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    kernel_in_axes: tuple[int, ...]
    kernel_out_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    kernel_operand: int
    groups: int
    calls: int
    arrangement: Arrangement | None = None


def is_contraction(eqn: jex.JaxprEqn) -> bool:
    """Whether the equation multiplies and accumulates."""
    return eqn.primitive.name in ("conv_general_dilated", "dot_general")


def count_macs(eqn: jex.JaxprEqn, operands: Sequence[Value], result: Value) -> int:
    """Multiply-accumulates of one run, for the whole batch; 0 if it depends on no input."""
    if all(isinstance(value.origin, frozenset) for value in operands):
        return 0
    x, y = (value.shape for value in operands)
    if eqn.primitive.name == "dot_general":
        contracted = math.prod(x[axis] for axis in eqn.params["dimension_numbers"][0][0])
        return math.prod(result.shape) * contracted
    x_spec, y_spec, out_spec = eqn.params["dimension_numbers"]
    meetings = [
        _meetings(x[i], y[j], result.shape[k], *along)
        for i, j, k, *along in zip(
            x_spec[2:],
            y_spec[2:],
            out_spec[2:],
            eqn.params["window_strides"],
            eqn.params["lhs_dilation"],
            eqn.params["rhs_dilation"],
            eqn.params["padding"],
            strict=True,
        )
    ]
    # C of one group times O, for each example.
    channels = y[y_spec[1]] * math.prod(result.shape[axis] for axis in out_spec[:2])
    return channels * math.prod(meetings)


def _meetings(entries, taps, places, stride, dilation, tap_dilation, padding) -> int:
    """How often a tap meets an entry along one axis; zeros of padding or dilation cost nothing."""
    starts = np.arange(places)[:, None] * stride - padding[0]
    met = (starts + np.arange(taps) * tap_dilation) % dilation == 0
    return min(int(met.sum()), entries * taps)


def kernel_operand(eqn: jex.JaxprEqn, values: list[Value]) -> int | None:
    """The operand that comes from parameters alone, if the other depends on an input."""
    places = (1,) if eqn.primitive.name == "conv_general_dilated" else (1, 0)
    for i in places:
        owned = isinstance(values[i].origin, frozenset) and values[i].origin
        if owned and values[1 - i].origin == INPUT:
            return i
    return None


def describe(
    eqn: jex.JaxprEqn,
    values: Sequence[Value],
    result: Value,
    operand: int,
    calls: int,
    counts: Mapping[str, tuple[int, bool]],
) -> Site:
    """The site that a contraction is; its name is only the kernel's path, its costs the batch's."""
    conv = eqn.primitive.name == "conv_general_dilated"
    numbers = eqn.params["dimension_numbers"]
    x, kernel = values[1 - operand].shape, values[operand].shape
    if conv:
        out, inside, *taps = numbers.rhs_spec
        roles = (), taps, (inside,), (out,)
        out_axes, in_axes = (out,), tuple(sorted((inside, *taps)))
        results = (numbers.out_spec[1],)
        groups = x[numbers.lhs_spec[1]] // max(kernel[numbers.rhs_spec[1]], 1)
    else:
        groups = 1
        (contracted, batch) = numbers
        in_axes = tuple(contracted[operand])
        used = {*in_axes, *batch[operand]}
        out_axes = tuple(axis for axis in range(len(kernel)) if axis not in used)
        roles = batch[operand], (), sorted(in_axes), out_axes
        # A result has the batch axes first, then what is left of either operand.
        rank = eqn.outvars[0].aval.ndim
        first = rank - len(out_axes) if operand == 1 else len(batch[operand])
        results = tuple(range(first, first + len(out_axes)))
    path = max(sorted(values[operand].origin), key=counts.__getitem__)
    arrangement = values[operand].arrangement
    # A product that sums over nothing scales: what it scales by is no kernel.
    own = arrangement is not None and arrangement.path == path and in_axes
    return Site(
        name=path,
        path=path,
        kind="conv" if conv else "dot",
        macs=calls * count_macs(eqn, values, result),
        input_shape=x,
        kernel_shape=kernel,
        output_shape=result.shape,
        kernel_in_axes=in_axes,
        kernel_out_axes=out_axes,
        output_axes=results,
        kernel_operand=operand,
        groups=groups,
        calls=calls,
        arrangement=by_role(arrangement, roles) if own else None,
    )
