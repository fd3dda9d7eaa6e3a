"""How LiteRT writes a function of each value: in floats step by step, of one int8 as a table."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hybrid_jax import program as p
from hybrid_jax.core.functions import FUNCTIONS
from hybrid_jax.deploy.litert_marks import mark
from hybrid_jax.program import arithmetic, functions
from hybrid_jax.program.functions import FIXED


def in_floats(op: p.Function, values: Sequence[jax.Array]) -> jax.Array:
    """The expression of float32 tensors, in steps that the converter takes."""
    last = values[0].ndim - 1
    constants = [c.reshape((1,) * last + c.shape) if c.ndim else c for c in op.constants]
    made = [*values, *constants]
    for step in op.steps:
        made.append(STEPS[step.name](*(made[i] for i in step.operands), **dict(step.options)))
    shape = np.broadcast_shapes(*(value.shape for value in values))
    return jnp.broadcast_to(jnp.asarray(made[-1]).astype(jnp.float32), shape)


def in_integers(
    op: p.Function, x: jax.Array, encoding: p.Encoding, output: p.Encoding
) -> jax.Array:
    """The function of an int8: by LiteRT's kernel, in floats or as a table, what is right first.

    In floats it takes a tenth of the time, and may be a step off where the value is all but halfway
    between two integers.
    """
    if op.kind in FIXED and output == p.Encoding(*FIXED[op.kind]):
        return FUNCTIONS[op.kind](jnp, x)
    table = arithmetic.table(op.steps, op.constants, encoding, output)
    if _smooth(op, encoding, output, table):
        return lax.optimization_barrier(in_floats(op, [lax.optimization_barrier(x)]))
    values = np.float32(output.scale) * (table.astype(np.float32) - np.float32(output.zero_point))
    # Whole numbers but for rounding; what the cast to int32 cuts off is the half.
    places = x * np.float32(1 / encoding.scale) + np.float32(encoding.zero_point + 0.5)
    if table.ndim == 2:
        values = values.T.reshape(-1)
        offsets = 256 * np.arange(table.shape[1], dtype=np.float32)
        places = places + offsets.reshape([1] * (x.ndim - 1) + [-1])
    rows, places = mark(values, output), places.astype(jnp.int32)
    return rows.at[places].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _smooth(op, encoding, output, table):
    """Whether float32 gives every entry of the table, and no step jumps at what is rounded."""
    known = 1 + len(op.constants)
    for step in op.steps:
        of_steps = any(place >= known for place in step.operands)
        if step.name in _JUMPS or (step.name in _COMPARES and of_steps):
            return False
    values = np.float32(encoding.scale) * (np.arange(256, dtype=np.float32) - encoding.zero_point)
    values = values.reshape(256, *[1] * (table.ndim - 1))
    with np.errstate(all="ignore"):
        made = functions.evaluate(op.steps, [values, *op.constants])
        steps = np.rint(np.float32(made) / np.float32(output.scale)) + output.zero_point
        return bool((np.clip(steps, output.low, output.high) == table).all())


_JUMPS = ("floor", "ceil", "round", "sign", "rem", "convert_element_type")
_COMPARES = ("eq", "ne", "lt", "le", "gt", "ge")


def _of_bools(name):
    def step(*operands):
        if not all(jnp.issubdtype(x.dtype, jnp.bool) for x in operands):
            raise ValueError(f"program must be of steps that LiteRT has, got {name!r} of integers")
        # LiteRT has no exclusive or.
        return operands[0] != operands[1] if name == "xor" else FUNCTIONS[name](jnp, *operands)

    return step


def _convert(x, new_dtype):
    dtype = np.dtype(new_dtype)
    if dtype.kind not in "iu" or dtype.itemsize > 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        return FUNCTIONS["convert_element_type"](jnp, x, new_dtype)
    # Floats hold the ends of such integers, of which LiteRT has no choice.
    limits = np.iinfo(dtype)
    return jnp.clip(jnp.trunc(x), limits.min, limits.max).astype(dtype)


STEPS: dict[str, Any] = {
    **{name: functools.partial(function, jnp) for name, function in FUNCTIONS.items()},
    **{name: _of_bools(name) for name in ("and", "or", "xor", "not")},
    # With one for each example, which no constant is.
    "atan": lambda x: lax.atan2(x, 1 + jnp.minimum(jnp.abs(x), 0)),
    "cbrt": lambda x: jnp.sign(x) * jnp.power(jnp.abs(x), np.float32(1 / 3)),
    # LiteRT's remainder has the sign of the divisor, C's that of the dividend.
    "rem": lambda x, y: jnp.sign(x) * lax.rem(jnp.abs(x), jnp.abs(y)),
    "convert_element_type": _convert,
}
"""{step: how it is written in JAX so that the converter takes it}."""
