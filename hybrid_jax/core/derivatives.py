"""The rules of custom derivatives, as jaxprs.

JAX gives no public access to the rule of a `custom_jvp` or `custom_vjp` that has been traced: what
is read here are the parameters of the equations `custom_jvp_call` and `custom_vjp_call`, and no
other file knows of them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

# The jaxprs that hold a custom derivative. A rule may call its own function, and so without end:
# a custom function nested deeper than this stands for its primal computation, so that derivatives
# up to this order are those of the rules.
DERIVATIVES = ("jvp", "fwd", "bwd")
ORDER = 2


def in_derivative(path: tuple[int | str, ...]) -> bool:
    """Whether `path` lies in the rule of a custom derivative."""
    return any(step in DERIVATIVES for step in path)


def is_spent(path: tuple[int | str, ...]) -> bool:
    """Whether a custom function at `path` stands for its primal computation."""
    return sum(step in DERIVATIVES for step in path) >= ORDER


def jvp_jaxpr(params: dict[str, Any]) -> tuple[jex.ClosedJaxpr, list[bool]]:
    """A custom JVP rule as (primals, tangents) -> (primals, non-zero tangents), which are zero."""
    tangents = len(params["call_jaxpr"].in_avals) - params["num_consts"]
    jaxpr, consts, zeros = params["jvp_jaxpr_fun"].call_wrapped(*[False] * tangents)
    return jex.ClosedJaxpr(jaxpr, consts), list(zeros)


def fwd_jaxpr(params: dict[str, Any]) -> jex.ClosedJaxpr:
    """A custom VJP's forward rule: primals -> (residuals that are no inputs, outputs)."""
    primals = len(params["call_jaxpr"].in_avals) - params["num_consts"]
    return jex.ClosedJaxpr(*params["fwd_jaxpr_thunk"].call_wrapped(*[True] * primals))


def bwd_jaxpr(params: dict[str, Any], residuals: Sequence[Any]) -> jex.ClosedJaxpr:
    """A custom VJP's backward rule: (residuals, cotangents) -> a cotangent for each primal."""
    inputs = params["call_jaxpr"].in_avals[params["num_consts"] :]
    cotangents = [aval.to_ct_aval() for aval in params["call_jaxpr"].out_avals]

    def bwd(*args):
        outs = params["bwd"].call_wrapped(*args)
        return [
            jnp.zeros(aval.to_ct_aval().shape, aval.to_ct_aval().dtype)
            if type(out).__name__ == "Zero"
            else out
            for out, aval in zip(outs, inputs, strict=True)
        ]

    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in [*residuals, *cotangents]]
    return jax.make_jaxpr(bwd)(*shapes)


def split_residuals(params: dict[str, Any], outs: list[Any], primals: Sequence[Any]) -> tuple:
    """Splits what `fwd_jaxpr` returns: all residuals (with those that are inputs), and outputs."""
    _, tree, forwarded = params["out_trees"]()
    count = tree.num_leaves - sum(index is not None for index in forwarded)
    fresh = iter(outs[:count])
    residuals = [next(fresh) if index is None else primals[index] for index in forwarded]
    return residuals, outs[count:]
