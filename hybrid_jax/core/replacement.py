"""Running a model with another operation at every site."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from hybrid_jax.core import interpreter
from hybrid_jax.core.affine import Affine, affine_chains, stored_chains
from hybrid_jax.core.graph import memoize_trace
from hybrid_jax.core.joins import Join
from hybrid_jax.core.sites import Site


def at_sites(
    fn: Callable[..., Any],
    rule: Callable[..., tuple[Any, Any]],
    at_join: Callable[..., tuple[Any, Any]] | None = None,
    at_bias: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Makes a function that does the same as `fn`, but at every site what `rule` says.

    Args:
      fn: A pure function fn(params, *inputs) -> outputs.
      rule: rule(site, x, kernel, apply) -> (y, record). `apply(x, kernel)` runs the operation as it
        was; `record` is a pytree of arrays, or None. Works on tracers: it must be pure.
      at_join: at_join(join, x) -> (x, record), for every tensor that takes part in a join, see
        `core.Join`; None leaves joins as they are.
      at_bias: at_bias(site, scale, bias) -> bias, for every site that is followed by what `fold`
        would fold: its result y becomes scale · y + bias, both float32 in the shape of the output
        channels. It says what is added instead. With `at_join`, at_bias(join, scale, bias) likewise
        for what follows the tensor of a join. None leaves biases as they are.

    Returns:
      A function (params, *inputs) -> (outputs, records), with records {name: record} of sites and
      joins. With rule `lambda site, x, kernel, apply: (apply(x, kernel), None)` its outputs are
      bit-equal to those of `fn` (both jitted). A site in a `scan` records a stack with one row for
      each iteration; in a branch of `cond` that was not taken, zeros; in a `while`, nothing.
      Derivative rules are kept, and the sites in them replaced alike.

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
        joins = {} if at_join is None else graph.found_joins.at
        chains = {} if at_bias is None else affine_chains(graph)
        others = stored_chains(graph) if joins and at_bias else {}
        linked = [*chains.values(), *(chain.links for chain in others.values())]
        ends = {link: links[-1] for links in linked for link in links}
        active = (*graph.site_at, *joins, *ends)

        def visit(path, eqn, values):
            if path in graph.site_at:
                return at_site(path, eqn, values)
            values, records = [*values], {}
            joined = {join.operand: join for join in joins.get(path, ())}
            result = joined.pop(None, None)
            for operand, join in joined.items():
                values[operand] = stored(path, join, values[operand], records)
            if path in others:
                join, operand, axis, _ = others[path]
                start = Affine.start((axis,), values[operand].shape)
                values[operand] = _Followed(values[operand], join, start)
            made = [follow(path, eqn, values)] if path in ends else interpreter.bind(eqn, values)
            return [stored(path, result, *made, records)] if result else made, records

        def at_site(path, eqn, values):
            site = graph.site_at[path]
            x, kernel = values[1 - site.kernel_operand], values[site.kernel_operand]

            def apply(x, kernel):
                pair = (x, kernel) if site.kernel_operand == 1 else (kernel, x)
                return interpreter.bind(eqn, pair)[0]

            y, record = rule(site, x, kernel, apply)
            if chains.get(path):
                y = _Followed(y, site, Affine.start(site.output_axes, y.shape))
            return [y], {} if record is None else {site.name: record}

        def stored(path, join, x, records):
            x, record = at_join(join, x)
            if record is not None and join in graph.found_joins.own.get(path, ()):
                records[join.name] = record
            return x

        def follow(path, eqn, values):
            place = next(i for i, value in enumerate(values) if isinstance(value, _Followed))
            y, at, affine = values[place]
            affine = affine.then(eqn.primitive.name, place, values)
            (y,) = interpreter.bind(eqn, [*values[:place], y, *values[place + 1 :]])
            if path != ends[path]:
                return _Followed(y, at, affine)
            bias = affine.each(affine.shift)
            change = at_bias(at, affine.each(affine.scale), bias) - bias
            return y + affine.along(change, y.ndim).astype(y.dtype)

        outs, records = interpreter.evaluate(
            graph.jaxpr.jaxpr,
            graph.jaxpr.consts,
            jax.tree.leaves((params, *inputs)),
            visit,
            interpreter.containing(active),
        )
        return jax.tree.unflatten(graph.out_tree, outs), records

    return interpreted


class _Followed(NamedTuple):
    """A value on its way through what is affine after a site or a join."""

    value: jax.Array
    at: Site | Join
    affine: Affine
