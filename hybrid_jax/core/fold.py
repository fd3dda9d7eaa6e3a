"""Folding: BatchNorm, biases and every other per-channel affine chain go into the kernel before.

What follows a site, y = x ∗ k, step by step with constants of the parameters alone, is one
y ↦ a·y + b for each output channel, whoever wrote it. As x ∗ (a·k) + b it costs nothing, and the
kernel that a device stores, and that is to be quantized, is a·k.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from hybrid_jax.core import interpreter, paths, versions
from hybrid_jax.core.affine import Affine, Chains, affine_chains
from hybrid_jax.core.graph import Graph, abstract, memoize_trace
from hybrid_jax.core.sites import Site


def fold(
    fn: Callable[..., Any], params: Any, *inputs: Any
) -> tuple[Callable[..., Any], Callable[[Any], dict[str, jax.Array]]]:
    """Folds what is affine per channel after each site into its kernel and one bias.

    B. Jacob et al., Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference (arXiv 1712.05877), section 3.2, for any traced function.

    Folded are addition, subtraction, multiplication and division by what comes from parameters
    alone and differs only between output channels, as long as nothing else reads what lies between.
    A normalization by the batch's own statistics is none of these: fold the function that
    evaluates. What follows no site (a BatchNorm before its convolution) stays. So does a site in a
    loop, a branch or a custom derivative, and one whose kernel is used elsewhere too.

    `fn` is in evaluation mode; arrays may be `jax.ShapeDtypeStruct`s.

    Returns:
      `(folded_fn, refold)`. `refold(params)` is {site name: a·k, site name + '/bias': b} with the
      parameters that are still used by themselves, under their paths; b has the shape of the output
      channels, and is zero where nothing is added. `folded_fn(refold(params), *inputs)` equals
      `fn(params, *inputs)` but for rounding. Both are pure and differentiable, so that
      `lambda params, x: folded_fn(refold(params), x)` trains the parameters through the folding;
      inputs may have any batch size. In the folded function a site has the name that it had.

    Example:
      >>> def fn(params, x):
      ...     return (x @ params['w'] - params['mean']) * params['scale'][None]
      >>> params = {'w': jnp.ones((3, 2)), 'mean': jnp.float32(1), 'scale': jnp.array([2.0, 4.0])}
      >>> folded_fn, refold = fold(fn, params, jnp.ones((1, 3)))
      >>> for name, leaf in refold(params).items():
      ...     print(name, leaf[-1])
      w [2. 4.]
      w/bias -4.0
      >>> print(folded_fn(refold(params), jnp.ones((1, 3))), fn(params, jnp.ones((1, 3))))
      [[4. 8.]] [[4. 8.]]
    """
    cached = memoize_trace(_inlined(fn))
    shapes = jax.tree.map(abstract, params)
    graph = cached(shapes, *inputs)
    chains = affine_chains(graph)
    while True:
        refold, kernels, _ = _live(functools.partial(_collect, graph, chains), _types(graph))
        _, _, used = _live(functools.partial(_replay, graph, chains), kernels, _types(graph))
        rest = [path for path, use in zip(graph.parameters, used[len(kernels) :]) if use]
        # One name, one array: a kernel that something else reads as well stays as it is.
        clash = {path for path in chains if graph.site_at[path].name in rest}
        if not clash:
            break
        chains = {path: links for path, links in chains.items() if path not in clash}

    def folded_params(params):
        leaves = paths.flatten_paths(params)
        own = [*leaves.values(), *[None] * len(jax.tree.leaves(inputs))]
        return refold(own) | {path: leaves[path] for path in rest}

    @functools.lru_cache(maxsize=8)
    def program(graph):
        # For inputs of other shapes the equations are the same, and so are their paths.
        return _live(functools.partial(_replay, graph, chains), kernels, _types(graph))[0]

    def folded_fn(folded, *inputs):
        graph = cached(shapes, *inputs)
        leaves = [folded.get(path) for path in graph.parameters]
        own = {name: folded[name] for name in kernels}
        outs = program(graph)(own, [*leaves, *jax.tree.leaves(inputs)])
        return jax.tree.unflatten(graph.out_tree, outs)

    return folded_fn, folded_params


class _Pending(NamedTuple):
    """What a site is about to return: scale · (x ∗ kernel) + shift, not yet computed."""

    site: Site
    affine: Affine
    equation: jex.JaxprEqn
    x: jax.Array
    kernel: jax.Array


def _run(graph: Graph, chains: Chains, leaves: Sequence[Any], give: Callable[..., Any]):
    """Runs the program with give(site, kernel, bias): its outputs, {site name: what was given}."""
    ends = {links[-1] if links else path for path, links in chains.items()}
    steps = {*chains, *(link for links in chains.values() for link in links)}
    active = {path[:n] for path in steps for n in range(1, len(path) + 1)}

    def rule(path, eqn, values):
        if path in chains:
            site = graph.site_at[path]
            x, kernel = values[1 - site.kernel_operand], values[site.kernel_operand]
            start = Affine.start(site.output_axes, site.output_shape)
            pending = _Pending(site, start, eqn, x, kernel)
        else:
            place = next(i for i, value in enumerate(values) if isinstance(value, _Pending))
            pending = values[place]
            affine = pending.affine.then(eqn.primitive.name, place, values)
            pending = pending._replace(affine=affine)
        if path not in ends:
            return [pending], {}
        site, affine = pending.site, pending.affine
        kernel, bias = give(site, _scaled(pending), affine.each(affine.shift))
        pair = (pending.x, kernel) if site.kernel_operand == 1 else (kernel, pending.x)
        y = interpreter.bind(pending.equation, pair)[0].astype(eqn.outvars[0].aval.dtype)
        return [y + affine.along(bias, y.ndim).astype(y.dtype)], {site.name: (kernel, bias)}

    return interpreter.evaluate(
        graph.jaxpr.jaxpr, graph.jaxpr.consts, leaves, rule, active.__contains__
    )


def _collect(graph, chains, leaves):
    """The folded kernels and biases."""
    _, given = _run(graph, chains, leaves, lambda site, kernel, bias: (kernel, bias))
    kernels = {name: kernel for name, (kernel, _) in given.items()}
    return kernels | {f"{name}/bias": bias for name, (_, bias) in given.items()}


def _replay(graph, chains, folded, leaves):
    """The outputs, with kernels and biases that are folded already."""

    def give(site, kernel, bias):
        del kernel, bias
        return folded[site.name], folded[f"{site.name}/bias"]

    return _run(graph, chains, leaves, give)[0]


def _scaled(pending: _Pending) -> jax.Array:
    """The kernel with its output channels scaled."""
    site, kernel = pending.site, pending.kernel
    shape = [n if axis in site.kernel_out_axes else 1 for axis, n in enumerate(kernel.shape)]
    scale = pending.affine.each(pending.affine.scale).reshape(shape)
    return (kernel.astype(jnp.float32) * scale).astype(kernel.dtype)


def _inlined(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function without the boundaries of inner `jit`s, so that a chain may cross them."""

    def flat(params, *inputs):
        closed, out = jax.make_jaxpr(fn, return_shape=True)(params, *inputs)
        active: set[interpreter.Path] = set()

        def level(jaxpr, path):
            for index, eqn in enumerate(jaxpr.eqns):
                here = (*path, index)
                if eqn.primitive.name in (*versions.CALLS, *versions.REMAT):
                    active.add(here)
                    level(versions.body(eqn).jaxpr, (*here, "body"))

        level(closed.jaxpr, ())
        outs, _ = interpreter.evaluate(
            closed.jaxpr,
            closed.consts,
            jax.tree.leaves((params, *inputs)),
            lambda path, eqn, values: (interpreter.bind(eqn, values), {}),
            active.__contains__,
        )
        return jax.tree.unflatten(jax.tree.structure(out), outs)

    return flat


def _types(graph: Graph) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in graph.jaxpr.in_avals]


def _live(f: Callable[..., Any], *types: Any) -> tuple[Callable[..., Any], Any, list[bool]]:
    """Traces `f` and drops what its outputs do not need: f, output types, which leaves it needs."""
    closed, out = jax.make_jaxpr(f, return_shape=True)(*types)
    needed, used = versions.live(closed)
    run = jex.jaxpr_as_fun(needed)

    def call(*args):
        leaves = jax.tree.leaves(args, is_leaf=lambda leaf: leaf is None)
        taken = [leaf for leaf, use in zip(leaves, used, strict=True) if use]
        return jax.tree.unflatten(jax.tree.structure(out), run(*taken))

    return call, out, used
