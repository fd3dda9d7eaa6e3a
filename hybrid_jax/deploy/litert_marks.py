"""A program as a JAX function in floats, with marks from which LiteRT's converter makes integers.

Every encoded tensor passes a mark with its encoding, every kernel one with its scales. Operations
are written in the form that the converter knows; no mark is ever computed. The uint8 q of a tensor
is the int8 q + 127 − high, so that a narrower range ends where the int8 saturates.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import program as p

MARK = "quant.fake_quant"
"""What the converter takes for a mark: a call of this name."""

Evaluate = Callable[..., jax.Array]


def marked(program: p.Program, evaluate: Evaluate) -> Callable[..., tuple[jax.Array, ...]]:
    """The program in floats with marks: fn(*inputs) -> outputs, (B, …), for lowering only.

    `evaluate(program, op, values)` makes the marked value of each operation.
    """

    def fn(*inputs):
        values = {}
        for name, x in zip(program.inputs, inputs, strict=True):
            encoding, x = program.encoding(name), x.astype(jnp.float32)
            values[name] = x if encoding is None else mark(x, encoding)
        for op in program.operations:
            with jax.named_scope(op.output):  # names the tensor in the file
                values[op.output] = evaluate(program, op, [values[name] for name in op.inputs])
        return tuple(
            _returned(name, values[name], program.tensors[name].dtype, len(inputs[0]))
            for name in program.outputs
        )

    return fn


def _returned(name, y, dtype, batch):
    if len(y) != batch:
        raise ValueError(
            f"output {name!r} must depend on an input, got a constant; return it aside"
        )
    return y.astype(dtype)


def mark(x: Any, encoding: p.Encoding | None) -> jax.Array:
    """The same values, to be stored in this encoding; as they are in None."""
    if encoding is None:
        return jnp.asarray(x)
    return fake_quant(x, [encoding.scale], encoding.zero_point + 127 - encoding.high)


def mark_kernel(values: Any, scale: np.ndarray) -> jax.Array:
    """The same values (O, …), to be stored in int8 with these scales (O,)."""
    return fake_quant(values, scale, quantization_dimension=np.int32(0), narrow_range=True)


def fake_quant(x: Any, scale: Sequence[float], zero_point: int = 0, **options: Any) -> jax.Array:
    """A call that the converter reads; nothing computes it."""
    call = jax.ffi.ffi_call(MARK, jax.ShapeDtypeStruct(np.shape(x), x.dtype))
    return call(
        x,
        scale=np.asarray(scale, np.float32),
        zero_point=np.full(len(scale), zero_point, np.int64),
        dtype="i8",
        **{"narrow_range": False, **options},
    )
