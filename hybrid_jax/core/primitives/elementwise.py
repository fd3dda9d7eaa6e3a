"""Element-wise primitives: they tie the axes of their operands, and act on numbers as on arrays."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from hybrid_jax.core.functions import FUNCTIONS, SAME, options
from hybrid_jax.core.labels import UNIFORM, Labels, Origin, Rest, Value, common, sizes

_PASSING = (
    *(*SAME, "convert_element_type", "reduce_precision", "name", "real", "pvary"),
    "sharding_constraint",
)
# What holds at a masked channel is a number, and what is compared may be infinite there.
_UNKNOWN = frozenset(
    "eq ne lt le gt ge is_finite and or xor not shift_left shift_right_logical "
    "shift_right_arithmetic nextafter erf_inv lgamma digamma imag complex conj population_count "
    "clz select_n".split()
)
ELEMENTWISE = frozenset([*FUNCTIONS, *_PASSING, *_UNKNOWN, "add_any"])
"""Element-wise primitives."""


def product(x: float | None, y: float | None) -> float | None:
    """X y; 0 times what is not known is 0, but 0 times what is known not to be finite is NaN."""
    if x is None or y is None:
        return 0.0 if x == 0 or y == 0 else None
    return x * y


def _value(eqn: jex.JaxprEqn, args: Sequence[float | None]) -> float | None:
    """What an equation makes of these numbers, where None means not known."""
    name = eqn.primitive.name
    if name in _PASSING:
        return args[0]
    if name == "select_n":
        return common(args[1:])
    if name == "mul":
        return product(*args)
    if name == "div" and args[0] == 0 and args[1] is None:
        return 0.0
    if None in args or name in _UNKNOWN:
        return None
    function = FUNCTIONS["add" if name == "add_any" else name]
    return function(np, *map(np.float64, args), **options(eqn))


def _at_rest(eqn: jex.JaxprEqn, args: Sequence[float | None]) -> float | None:
    """What an equation makes of these numbers, in the type of its output; NaN if not finite."""
    dtype = eqn.outvars[0].aval.dtype
    with np.errstate(all="ignore"):
        value = _value(eqn, args)
    if value is None or jnp.issubdtype(dtype, jnp.complexfloating):
        return value
    if jnp.issubdtype(dtype, jnp.integer):
        bounds = jnp.iinfo(dtype)
        # Out of range or NaN, what an integer holds is the backend's choice.
        return float(int(value)) if bounds.min <= value <= bounds.max else None
    with np.errstate(over="ignore"):
        value = float(np.asarray(value).astype(dtype))
    return value if math.isfinite(value) else math.nan


def _operand(value: Value, axis: int, size: int) -> Rest:
    """What an operand holds at a masked channel; what is the same for all channels is UNIFORM."""
    if value.labels and len(value.labels[axis]) == size:
        return value.rest[axis]
    return UNIFORM if value.constant is None else value.constant


def _along(eqn: jex.JaxprEqn, rests: Sequence[Rest]) -> Rest:
    """The rest of a result whose operands have these."""
    rest = _at_rest(eqn, [None if rest is UNIFORM else rest for rest in rests])
    if rest is None and not any(own is None or own != own for own in rests):
        return UNIFORM
    return rest


def elementwise(
    labels: Labels, eqn: jex.JaxprEqn, values: Sequence[Value], origin: Origin
) -> Value:
    """Ties the axes of equal size; an axis of size 1 or a scalar broadcasts."""
    shape = sizes(eqn.outvars[0].aval.shape)
    out_labels, out_rest = [], []
    for axis, size in enumerate(shape):
        full = [v for v in values if v.labels and len(v.labels[axis]) == size]
        for other in full[1:]:
            labels.tie(full[0].labels[axis], other.labels[axis])
        # Elsewhere a frozen axis decides: label 0 must not be hidden behind a fresh one.
        zero = [v for v in full if not v.labels[axis].any()]
        out_labels.append((zero or full)[0].labels[axis])
        out_rest.append(_along(eqn, [_operand(v, axis, size) for v in values]))
    constant = _at_rest(eqn, [v.constant for v in values])
    return Value(tuple(out_labels), tuple(out_rest), origin, constant)
