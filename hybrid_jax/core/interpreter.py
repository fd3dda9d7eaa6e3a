"""One interpreter of jaxprs: everything that changes what a model computes is a rule handed to it.

An equation is addressed by its *path*: its index, and below an equation that holds jaxprs the name
of the one it is in and the index there, as in (3, 'body', 0). A path is static, so what an analysis
learned about an equation once is found again whenever the program is interpreted.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from hybrid_jax.core import versions

Path = tuple[int | str, ...]
Rule = Callable[[Path, jex.JaxprEqn, list[Any]], tuple[list[Any], dict[str, Any]]]

# The jaxprs that hold a custom derivative. A rule may call its own function, and so without end:
# a custom function nested deeper than this stands for its primal computation, so that derivatives
# up to this order are those of the rules.
DERIVATIVES = ("jvp", "fwd", "bwd")
ORDER = 2


def in_derivative(path: Path) -> bool:
    """Whether `path` lies in the rule of a custom derivative."""
    return any(step in DERIVATIVES for step in path)


def is_spent(path: Path) -> bool:
    """Whether a custom function at `path` stands for its primal computation."""
    return sum(step in DERIVATIVES for step in path) >= ORDER


def evaluate(
    jaxpr: jex.Jaxpr,
    consts: Sequence[Any],
    args: Sequence[Any],
    rule: Rule,
    active: Callable[[Path], bool],
    path: Path = (),
    resize: Callable[[Path, list[Any]], list[Any]] = lambda path, values: values,
    rebuild: Mapping[str, Callable[..., Any]] | None = None,
) -> tuple[list[Any], dict[str, Any]]:
    """Evaluates a jaxpr, giving `rule` every equation that `active` says concerns it.

    An active equation that holds jaxprs (`jit`, `scan`, `cond`, `remat`, custom derivatives, …) is
    built anew, by `rebuild`, around the interpreted inner ones, so that loops stay loops and
    derivative rules stay rules. rule(path, equation, values) -> (outputs, records) is for one
    without jaxprs; active(path) says whether the equation, or one inside it, concerns the rule;
    `path` is that of the jaxpr; resize(path, values) gives the values that an active equation takes
    instead.

    Returns:
      The outputs, and the records of all rules in one dictionary. Inside a `scan` they gain a
      leading axis; in a branch not taken they are zero; inside a `while` they are dropped.
    """
    env: dict[Any, Any] = {}
    rebuild = REBUILD if rebuild is None else rebuild

    def read(atom):
        return atom.val if isinstance(atom, jex.Literal) else env[atom]

    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    records: dict[str, Any] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        here = (*path, index)
        values = [read(atom) for atom in eqn.invars]
        if not active(here):
            outs = bind(eqn, values)
        else:
            values = resize(here, values)

            def inner(name, jaxpr, consts, args, here=here):
                return evaluate(jaxpr, consts, args, rule, active, (*here, name), resize, rebuild)

            build = rebuild.get(eqn.primitive.name)
            if build is None:
                outs, found = rule(here, eqn, values)
            else:
                outs, found = build(eqn, values, inner, is_spent(here))
            records |= found
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars], records


def inline(closed: jex.ClosedJaxpr) -> jex.ClosedJaxpr:
    """The jaxpr as one list of equations, without calls, scans and derivative rules."""

    def run(*args):
        always, rule = lambda path: True, lambda path, eqn, values: (bind(eqn, values), {})
        return evaluate(closed.jaxpr, closed.consts, args, rule, always, rebuild=INLINE)[0]

    return versions.live(jax.make_jaxpr(run)(*closed.in_avals), keep=True)[0]


def bind(eqn: jex.JaxprEqn, values: Sequence[Any], **changed: Any) -> list[Any]:
    """Runs one equation, with some of its parameters changed; returns the list of its outputs."""
    params = eqn.primitive.get_bind_params({**eqn.params, **changed})
    with eqn.ctx.manager:
        outs = eqn.primitive.bind(*values, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def subjaxprs(eqn: jex.JaxprEqn, path: Path) -> dict[str, jex.ClosedJaxpr]:
    """The jaxprs that interpreting `eqn` runs, by name; {} for an equation without any."""
    name, found = eqn.primitive.name, versions.jaxprs(eqn)
    if name == "custom_jvp_call" and not is_spent(path):
        found["jvp"] = versions.jvp_jaxpr(eqn.params)[0]
    if name == "custom_vjp_call" and not is_spent(path):
        found["fwd"] = versions.fwd_jaxpr(eqn.params)
    return found


def places(
    jaxpr: jex.Jaxpr, wanted: Callable[[jex.JaxprEqn], bool], path: Path = ()
) -> Iterator[Path]:
    """Paths of the equations that are `wanted`, also inside of others, but for derivative rules."""
    for index, eqn in enumerate(jaxpr.eqns):
        here = (*path, index)
        if wanted(eqn):
            yield here
        for name, inner in versions.jaxprs(eqn).items():
            yield from places(inner.jaxpr, wanted, (*here, name))


def containing(found: Iterable[Path]) -> Callable[[Path], bool]:
    """Which paths are, or lead to, one of those that were found: `active` of `evaluate`."""
    return {path[:n] for path in found for n in range(1, len(path) + 1)}.__contains__


def _call(eqn, values, inner, _=False):
    jaxpr = versions.body(eqn)
    return inner("body", jaxpr.jaxpr, jaxpr.consts, values)


def _remat(eqn, values, inner, _):
    body = jax.checkpoint(
        lambda *args: _call(eqn, args, inner),
        prevent_cse=eqn.params["prevent_cse"],
        policy=eqn.params["policy"],
    )
    return body(*values)


def _scan(eqn, values, inner, _):
    params = eqn.params
    consts, split = versions.scan_counts(params)

    def body(carry, xs):
        outs, records = _call(eqn, [*values[:consts], *carry, *xs], inner)
        return tuple(outs[:split]), (tuple(outs[split:]), records)

    carry, (ys, records) = lax.scan(
        body,
        tuple(values[consts : consts + split]),
        tuple(values[consts + split :]),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys], records


def _unrolled(eqn, values, inner, _):
    consts, carried = versions.scan_counts(eqn.params)
    fixed, carry, xs = (
        values[:consts],
        values[consts : consts + carried],
        values[consts + carried :],
    )
    made: dict[int, list[Any]] = {}
    for i in range(eqn.params["length"])[:: -1 if eqn.params["reverse"] else 1]:
        own = [lax.index_in_dim(x, i, keepdims=False) for x in xs]
        outs, _ = _call(eqn, [*fixed, *carry, *own], inner)
        carry, made[i] = outs[:carried], outs[carried:]
    return [*carry, *map(jnp.stack, zip(*(made[i] for i in sorted(made)), strict=True))], {}


def _while(eqn, values, inner, _):
    conds, bodies = versions.while_counts(eqn.params)
    cond, body = versions.jaxprs(eqn).values()
    cond_consts, body_consts = values[:conds], values[conds : conds + bodies]
    outs = lax.while_loop(
        lambda carry: inner("cond", cond.jaxpr, cond.consts, [*cond_consts, *carry])[0][0],
        lambda carry: tuple(inner("body", body.jaxpr, body.consts, [*body_consts, *carry])[0]),
        tuple(values[conds + bodies :]),
    )
    return list(outs), {}


def _cond(eqn, values, inner, _):
    index, *operands = values
    branches = [
        lambda *args, name=name, branch=branch: inner(name, branch.jaxpr, branch.consts, args)
        for name, branch in versions.jaxprs(eqn).items()
    ]
    shapes = {}
    for branch in branches:
        shapes |= jax.eval_shape(branch, *operands)[1]

    def padded(branch):
        def run(*args):
            outs, records = branch(*args)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            return outs, zeros | records

        return run

    return lax.switch(index, [padded(branch) for branch in branches], *operands)


def _custom_jvp(eqn, values, inner, spent):
    params, count = eqn.params, versions.custom_consts(eqn.params)
    if spent:
        return _call(eqn, values, inner)

    @jax.custom_jvp
    def call(*primals):
        return _call(eqn, [*values[:count], *primals], inner)

    @call.defjvp
    def rule(primals, tangents):
        jaxpr, zeros = versions.jvp_jaxpr(params)
        outs, records = inner("jvp", jaxpr.jaxpr, jaxpr.consts, [*primals, *tangents])
        split = len(zeros)
        given = iter(outs[split:])
        out_tangents = [
            _zero_tangent(out) if zero else next(given)
            for out, zero in zip(outs[:split], zeros, strict=True)
        ]
        return (outs[:split], records), (out_tangents, jax.tree.map(_zero_tangent, records))

    return call(*values[count:])


def _custom_vjp(eqn, values, inner, spent):
    params, count = eqn.params, versions.custom_consts(eqn.params)
    if spent:
        return _call(eqn, values, inner)

    @jax.custom_vjp
    def call(*primals):
        return _call(eqn, [*values[:count], *primals], inner)

    def forward(*primals):
        jaxpr = versions.fwd_jaxpr(params)
        outs, records = inner("fwd", jaxpr.jaxpr, jaxpr.consts, primals)
        taken = [*values[:count], *primals]
        residuals, outs = versions.split_residuals(params, outs, taken)
        return (outs, records), residuals

    def backward(residuals, cotangents):
        jaxpr = versions.bwd_jaxpr(params)
        return tuple(inner("bwd", jaxpr.jaxpr, jaxpr.consts, [*residuals, *cotangents[0]])[0])

    call.defvjp(forward, backward)
    return call(*values[count:])


def _zero_tangent(x):
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros(x.shape, x.dtype)
    return jnp.zeros(x.shape, jax.dtypes.float0)


REBUILD = {
    **dict.fromkeys(versions.CALLS, _call),
    **dict.fromkeys(versions.REMAT, _remat),
    **dict(zip(versions.CUSTOM, (_custom_jvp, _custom_vjp), strict=True)),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
"""Primitives that hold jaxprs -> how to build them anew around the interpreted ones."""

INLINE = {
    **dict.fromkeys((*versions.CALLS, *versions.REMAT, *versions.CUSTOM), _call),
    "scan": _unrolled,
}
"""Those that need not be equations -> how to run the interpreted ones in their place."""
