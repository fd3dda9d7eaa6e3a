"""What element-wise primitives compute, in NumPy and in JAX alike: one row for each."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.extend import core as jex

SAME = ("copy", "copy_p", "stop_gradient")
"""Primitives that hand on what they take."""


def options(eqn: jex.JaxprEqn) -> dict[str, Any]:
    """What a row of `FUNCTIONS` takes beside the operands of an equation."""
    params = eqn.params
    match eqn.primitive.name:
        case "convert_element_type":
            return {"new_dtype": str(np.dtype(params["new_dtype"]))}
        case "integer_pow":
            return {"y": params["y"]}
        case "round":
            return {"rounding_method": params["rounding_method"].name}
    return {}


def _special(name):
    def call(library, *operands):
        module = jax.scipy.special if library is jnp else scipy.special
        return getattr(module, name)(*operands)

    return call


def _plain(name):
    return lambda library, *operands: getattr(library, name)(*operands)


def _operator(name):
    return lambda library, *operands: getattr(operator, name)(*operands)


def _logistic(library, x):
    # Of NumPy's only the branch that does not overflow.
    return jax.nn.sigmoid(x) if library is jnp else scipy.special.expit(x)


def _div(library, x, y):
    if not library.issubdtype(library.result_type(x, y), np.integer):
        return x / y
    # Of integers towards zero, as in C; by zero it is 0.
    up = (x % y != 0) & ((x < 0) != (y < 0))
    return library.where(y == 0, 0, x // y + up.astype(x.dtype)).astype(x.dtype)


def _round(library, x, rounding_method):
    if rounding_method == "TO_NEAREST_EVEN":
        return library.round(x)
    return library.sign(x) * library.floor(abs(x) + 0.5)


def _convert(library, x, new_dtype):
    if library is np and new_dtype.startswith(("float", "bfloat")):
        return np.asarray(x, np.float64)
    info = np.dtype(new_dtype)
    if np.issubdtype(info, np.integer) and library.issubdtype(x.dtype, np.floating):
        limits = np.iinfo(info)
        whole = library.clip(library.trunc(x), limits.min, limits.max)
        # The greatest integer of 32 bits is no float of 32.
        top = library.asarray(limits.max, info)
        return library.where(x >= limits.max, top, whole.astype(info))
    return library.asarray(x).astype(info)


def _select(library, which, *cases):
    if len(cases) == 2:
        return library.where(which, cases[1], cases[0])
    return library.choose(which.astype(np.int32), list(cases), mode="clip")


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        name: _plain(name)
        for name in (
            *("abs", "sign", "floor", "ceil", "exp", "exp2", "log", "log1p", "expm1", "sqrt"),
            *("cbrt", "square", "tanh", "sin", "cos", "tan", "sinh", "cosh"),
        )
    },
    **{name: _plain(f"arc{name[1:]}") for name in ("asin", "acos", "atan", "asinh", "acosh")},
    **{
        name: _operator(name)
        for name in ("add", "sub", "mul", "neg", "eq", "ne", "lt", "le", "gt", "ge")
    },
    **{"and": _operator("and_"), "or": _operator("or_"), "xor": _operator("xor")},
    "not": _operator("invert"),
    "atanh": _plain("arctanh"),
    "atan2": _plain("arctan2"),
    "rsqrt": lambda library, x: 1 / library.sqrt(x),
    "logistic": _logistic,
    "erf": _special("erf"),
    "erfc": _special("erfc"),
    "is_finite": _plain("isfinite"),
    "round": _round,
    "integer_pow": lambda library, x, y: x**y,
    "pow": _plain("power"),
    "div": _div,
    "rem": _plain("fmod"),
    "max": _plain("maximum"),
    "min": _plain("minimum"),
    "clamp": lambda library, low, x, high: library.minimum(library.maximum(x, low), high),
    "select_n": _select,
    "convert_element_type": _convert,
}
"""{primitive: function(library, *operands, **options)}, of NumPy in float64."""
