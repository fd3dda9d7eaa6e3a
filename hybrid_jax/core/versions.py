"""What depends on the version of jax: the primitives that hold jaxprs, and what has no public name.

jax promises neither their names nor their parameters. Tested are 0.10, 0.11 and 0.12; no other file
reads what may change between them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import distributed
from jax.extend import core as jex
from jax.interpreters import partial_eval

_SINCE_11 = jax.__version_info__ >= (0, 11)

QUICK_XLA = "" if _SINCE_11 else "--xla_cpu_use_fusion_emitters=false"
"""XLA_FLAGS with which a CPU's programs compile quicker.

An XLA that does not know a flag ends the process, and those since jax 0.11 do not know this one.
"""

CALLS = ("jit", "closed_call", "eval_jaxpr")
"""Primitives that run a jaxpr once, on all that they take."""
REMAT = ("remat2",)
"""Those that may run it again for the gradient."""
CUSTOM = ("custom_jvp_call", "custom_vjp_call")
"""Those that hold derivative rules beside it."""


def jaxprs(eqn: jex.JaxprEqn) -> dict[str, jex.ClosedJaxpr]:
    """The jaxprs that an equation runs, by name, derivative rules aside; {} if it has none."""
    params, name = eqn.params, eqn.primitive.name
    if name == "while":
        return {"cond": params["cond_jaxpr"], "body": params["body_jaxpr"]}
    if name == "cond":
        return {str(i): branch for i, branch in enumerate(params["branches"])}
    return {"body": body(eqn)} if name in (*CALLS, *REMAT, *CUSTOM, "scan") else {}


def body(eqn: jex.JaxprEqn) -> jex.ClosedJaxpr:
    """The jaxpr that a call, a remat, a custom function or a scan runs."""
    found = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
    return found if isinstance(found, jex.ClosedJaxpr) else jex.ClosedJaxpr(found, ())


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many constants and how many carried values a scan takes, before what it runs over."""
    if not _SINCE_11:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def while_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many constants the condition and the body of a while take, before what it carries."""
    return params["cond_nconsts"], params["body_nconsts"]


def custom_consts(params: dict[str, Any]) -> int:
    """How many constants a custom function takes, before its primals."""
    return params["num_consts"]


def live(closed: jex.ClosedJaxpr, keep: bool = False) -> tuple[jex.ClosedJaxpr, list[bool]]:
    """The jaxpr without what its outputs do not need, and which arguments (`keep`: all) it has."""
    wanted = [True] * len(closed.out_avals)
    jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, wanted, instantiate=keep)
    return jex.ClosedJaxpr(jaxpr, closed.consts), list(used)


def jvp_jaxpr(params: dict[str, Any]) -> tuple[jex.ClosedJaxpr, list[bool]]:
    """A custom JVP rule as (primals, tangents) -> (primals, non-zero tangents), which are zero."""
    jaxpr, consts, zeros = params["jvp_jaxpr_fun"].call_wrapped(*[False for _ in _primals(params)])
    return jex.ClosedJaxpr(jaxpr, consts), list(zeros)


def fwd_jaxpr(params: dict[str, Any]) -> jex.ClosedJaxpr:
    """A custom VJP's forward rule: primals -> (residuals that are no inputs, outputs)."""
    found = params["fwd_jaxpr_thunk"].call_wrapped(*[True for _ in _primals(params)])
    return jex.ClosedJaxpr(*found)


def bwd_jaxpr(params: dict[str, Any]) -> jex.ClosedJaxpr:
    """A custom VJP's backward rule: (residuals, cotangents) -> a cotangent for each primal."""
    inputs = _primals(params)
    avals = fwd_jaxpr(params).out_avals, params["call_jaxpr"].in_avals
    residuals, _ = split_residuals(params, *avals)
    cotangents = [aval.to_ct_aval() for aval in params["call_jaxpr"].out_avals]

    def bwd(*args):
        outs = params["bwd"].call_wrapped(*args)
        if _SINCE_11:
            outs, _ = outs  # and what the rule logs
        return [
            jnp.zeros(aval.to_ct_aval().shape, aval.to_ct_aval().dtype)
            if type(out).__name__ == "Zero"
            else out
            for out, aval in zip(outs, inputs, strict=True)
        ]

    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in [*residuals, *cotangents]]
    return jax.make_jaxpr(bwd)(*shapes)


def split_residuals(params: dict[str, Any], outs: list[Any], values: Sequence[Any]) -> tuple:
    """All residuals, and outputs, of what `fwd_jaxpr` returns for an equation's `values`."""
    _, tree, forwarded = params["out_trees"]()
    count = tree.num_leaves - sum(index is not None for index in forwarded)
    fresh = iter(outs[:count])
    residuals = [next(fresh) if index is None else values[index] for index in forwarded]
    return residuals, outs[count:]


def varying_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x` as a value of the mesh axes that `like` varies over in a `shard_map`."""
    manual = getattr(jax.typeof(like), "manual_axis_type", None)
    axes = tuple(manual.varying) if manual else ()
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def from_first_process(name: str, value: str | None) -> str:
    """The text that process 0 has for `name`, to all others, which wait; also while tracing."""
    client = distributed.global_state.client
    if value is not None:
        client.key_value_set(name, value)
        return value
    return client.blocking_key_value_get(name, 86_400_000)  # a day


def _primals(params):
    return params["call_jaxpr"].in_avals[custom_consts(params) :]


def run_once() -> dict[str, Any]:
    """Options of `compile` for what runs but once: compiling it is what takes the time."""
    options: dict[str, Any] = {"xla_backend_optimization_level": 0}
    if not _SINCE_11 and jax.default_backend() == "cpu":
        options["xla_cpu_use_fusion_emitters"] = False
    return options


def run_often() -> dict[str, Any]:
    """Options of `compile` for what runs many times, whatever `QUICK_XLA` says of the others."""
    if _SINCE_11 or jax.default_backend() != "cpu":
        return {}
    return {"xla_cpu_use_fusion_emitters": True}
