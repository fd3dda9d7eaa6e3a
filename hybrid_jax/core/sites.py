"""Sites: the convolutions and matrix products whose kernel comes from the parameters."""

import dataclasses
from collections.abc import Mapping, Sequence

from jax.extend import core as jex

from hybrid_jax.core.arrangement import by_role
from hybrid_jax.core.labels import INPUT, Arrangement, Value
from hybrid_jax.core.primitives import PRIMITIVES


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


_KERNELS = {"conv_general_dilated": (1,), "dot_general": (1, 0)}
"""{what a site may be: the operands that may be its kernel}."""


def is_contraction(eqn: jex.JaxprEqn) -> bool:
    """Whether the equation multiplies and accumulates."""
    known = PRIMITIVES.get(eqn.primitive.name)
    return known is not None and known.macs is not None


def count_macs(eqn: jex.JaxprEqn, operands: Sequence[Value], result: Value) -> int:
    """Multiply-accumulates of one run, for the whole batch; 0 if it depends on no input."""
    if all(isinstance(value.origin, frozenset) for value in operands):
        return 0
    return PRIMITIVES[eqn.primitive.name].macs(eqn, operands, result)


def kernel_operand(eqn: jex.JaxprEqn, values: list[Value]) -> int | None:
    """The operand that comes from parameters alone, if the other depends on an input."""
    for i in _KERNELS.get(eqn.primitive.name, ()):
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
