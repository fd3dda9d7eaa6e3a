"""Running a model with another operation at every site."""

from collections.abc import Callable
from typing import Any

import jax

from hybrid_jax.core import interpreter
from hybrid_jax.core.graph import memoize_trace


def at_sites(fn: Callable[..., Any], rule: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
    """Makes `fn(params, *inputs)` with another operation at every site: what `rule` says.

    rule(site, x, kernel, apply) -> (y, record): `apply(x, kernel)` runs the operation as it was,
    `record` is a pytree of arrays, or None. Works on tracers: it must be pure.

    Returns:
      A function (params, *inputs) -> (outputs, records), with records {name of a site: record}. A
      site in a `scan` records a stack with one row for each iteration; in a branch of `cond` that
      was not taken, zeros; in a `while`, nothing. Derivative rules are kept, and the sites in them
      replaced alike.

    Example:
      >>> import jax.numpy as jnp
      >>> def largest(site, x, kernel, apply):
      ...     return apply(x, kernel), jnp.max(jnp.abs(x))
      >>> fn = lambda params, x: x @ params['w']
      >>> y, records = at_sites(fn, largest)({'w': jnp.ones((2, 1))}, jnp.array([[3.0, -4.0]]))
      >>> y.tolist(), float(records['w'])
      ([[-1.0]], 4.0)
    """
    cached = memoize_trace(fn)

    def interpreted(params, *inputs):
        graph = cached(params, *inputs)

        def at_site(path, eqn, values):
            site = graph.site_at[path]
            x, kernel = values[1 - site.kernel_operand], values[site.kernel_operand]

            def apply(x, kernel):
                pair = (x, kernel) if site.kernel_operand == 1 else (kernel, x)
                return interpreter.bind(eqn, pair)[0]

            y, record = rule(site, x, kernel, apply)
            return [y], {} if record is None else {site.name: record}

        outs, records = interpreter.evaluate(
            graph.jaxpr.jaxpr,
            graph.jaxpr.consts,
            jax.tree.leaves((params, *inputs)),
            at_site,
            interpreter.containing(graph.site_at),
        )
        return jax.tree.unflatten(graph.out_tree, outs), records

    return interpreted
