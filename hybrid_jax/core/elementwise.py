"""Element-wise primitives: they tie the axes of their operands, and act on numbers as on arrays."""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex

from hybrid_jax.core.labels import UNIFORM, Labels, Origin, Rest, Value, common, sizes


def _unary(f: Callable[[float], float]) -> Callable[..., float | None]:
    return lambda params, x: None if x is None else f(x)


def product(x: float | None, y: float | None) -> float | None:
    """X y; 0 times what is not known is 0, but 0 times what is known not to be finite is NaN."""
    if x is None or y is None:
        return 0.0 if x == 0 or y == 0 else None
    return x * y


def _quotient(params, x, y):
    if x is None or y is None:
        return 0.0 if x == 0 else None
    return x / y


def _binary(f: Callable[[float, float], float]) -> Callable[..., float | None]:
    return lambda params, x, y: None if x is None or y is None else f(x, y)


def _clamp(params, low, x, high):
    return None if None in (low, x, high) else min(max(x, low), high)


def _round(params, x):
    if x is None:
        return None
    if params["rounding_method"] == lax.RoundingMethod.TO_NEAREST_EVEN:
        return round(x)
    return math.copysign(math.floor(abs(x) + 0.5), x)


def _table() -> dict[str, Callable[..., float | None]]:
    same = _unary(lambda x: x)
    passing = "copy copy_p convert_element_type reduce_precision stop_gradient name real pvary"
    table = dict.fromkeys([*passing.split(), "sharding_constraint"], same)
    table |= {
        "add": _binary(lambda x, y: x + y),
        "add_any": _binary(lambda x, y: x + y),
        "sub": _binary(lambda x, y: x - y),
        "max": _binary(max),
        "min": _binary(min),
        "mul": lambda params, x, y: product(x, y),
        "div": _quotient,
        "integer_pow": lambda params, x: None if x is None else x ** params["y"],
        "select_n": lambda params, which, *cases: common(cases),
        "clamp": _clamp,
        "neg": _unary(lambda x: -x),
        "abs": _unary(abs),
        "sign": _unary(lambda x: float(np.sign(x))),
        "round": _round,
        "square": _unary(lambda x: x * x),
        "rsqrt": _unary(lambda x: 1 / math.sqrt(x)),
        "logistic": _unary(lambda x: 1 / (1 + math.exp(-x))),
    }
    functions = "floor ceil sqrt exp expm1 log log1p tanh erf erfc sin cos"
    table |= {name: _unary(getattr(math, name)) for name in functions.split()}
    unknown = (
        "pow rem nextafter atan2 exp2 tan asin acos atan sinh cosh asinh acosh atanh erf_inv "
        "lgamma digamma cbrt is_finite eq ne lt le gt ge and or xor not shift_left "
        "shift_right_logical shift_right_arithmetic imag complex conj population_count clz"
    )
    return table | dict.fromkeys(unknown.split(), lambda params, *args: None)


ELEMENTWISE = _table()
"""Element-wise primitives -> their value on numbers, where None means not known."""


def _at_rest(eqn: jex.JaxprEqn, args: Sequence[float | None]) -> float | None:
    """What an equation makes of these numbers, in the type of its output; NaN if not finite."""
    dtype = eqn.outvars[0].aval.dtype
    try:
        value = ELEMENTWISE[eqn.primitive.name](eqn.params, *args)
    except (ArithmeticError, ValueError):
        return math.nan
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
