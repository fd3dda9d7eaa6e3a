"""Lowering: from any traced function to the inference graph of its target.

The function is traced with all inner calls inlined. What comes from parameters alone is computed
once; every other equation becomes an operation, or part of one: BatchNorm and other per-channel
affine chains go into the weights before them, activations into the bounds of a result, padding into
the convolution behind it. What the closed list cannot express is an error that names the equation.
"""

import collections
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from hybrid_jax import core
from hybrid_jax.core import interpreter, versions
from hybrid_jax.deploy.builder import Builder, Node
from hybrid_jax.deploy.encoding import encode
from hybrid_jax.deploy.primitives import RULES
from hybrid_jax.deploy.program import Program, Tensor
from hybrid_jax.quantization import Range, Spec

_BATCH = 2  # any size does; equations are the same


def lower(
    fn: Callable[..., Any],
    params: Any,
    spec: Spec | None,
    ranges: Mapping[str, Mapping[str, Range]] | None,
    x: jax.Array,
) -> Program:
    """Makes the inference graph of a function, in integers where `spec` quantizes it.

    The integers of the kernels are those that `quantization.fake_quantized` computes with, whatever
    follows a site is folded into their scales. Tensors that enter no site (a residual sum) are
    stored in 8 bits as well: with the range of their join where `spec` has joins, so that all is
    rounded as in training, otherwise with the one that they take for the inputs `x`.

    Args:
      fn: fn(params, x) -> y, in evaluation mode, one input (B, …) and one output (B, …). Whoever
        wrote it: Linen, NNX, Haiku, Equinox, bare JAX. Images may be NHWC or NCHW.
      params: Its parameters, arrays.
      spec: How each site is quantized; None for a graph in floats.
      ranges: The ranges, as `quantization.calibrate` or training left them; None without `spec`.
      x: float32 (B, …), real inputs where `spec` is given; otherwise only the shape is read.

    Raises:
      ValueError: If an equation is not of the closed list (names it), `ranges` lack a site, or a
        quantizer has no integer kernels (groups, 8-bit floats, dynamic ranges).

    Example:
      >>> import jax.numpy as jnp
      >>> def fn(params, x):
      ...     return jax.nn.relu((x @ params['a']) * params['scale'] + 1.0) @ params['b']
      >>> params = {'a': jnp.ones((3, 4)), 'scale': jnp.ones((1, 4)), 'b': jnp.ones((4, 2))}
      >>> program = lower(fn, params, None, None, jnp.ones((1, 3)))
      >>> for op in program.operations:
      ...     print(type(op).__name__, op.inputs, op.output, op.clip)
      Dense ('x',) a (0.0, inf)
      Dense ('a',) b (-inf, inf)
    """
    program, builder = _lower_floats(fn, params, x)
    if spec is None:
        return program
    x = np.asarray(x, np.float32)
    return encode(program, builder.sources, builder.joins, spec, ranges or {}, x)


def _lower_floats(fn, params, x) -> tuple[Program, Builder]:
    like = jax.ShapeDtypeStruct((_BATCH, *x.shape[1:]), np.float32)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), params)
    graph = core.trace(_inlined(fn), shapes, like)
    if len(graph.jaxpr.jaxpr.outvars) != 1:
        count = len(graph.jaxpr.jaxpr.outvars)
        raise ValueError(f"fn must return one array, got {count}")
    jaxpr = graph.jaxpr.jaxpr
    known = _known_values(graph, jax.tree.leaves(params))
    builder = Builder()
    builder.tensors["x"] = Tensor(tuple(x.shape[1:]))
    sizes = like.shape
    node = Node("x", sizes[1:], tuple(range(len(sizes))), sizes)
    env: dict[Any, Node] = {jaxpr.invars[-1]: node}
    readers = collections.Counter(
        atom
        for eqn in jaxpr.eqns
        for atom in eqn.invars
        if not isinstance(atom, jex.Literal) and atom not in known
    )
    for index, eqn in enumerate(jaxpr.eqns):
        if not any(not isinstance(atom, jex.Literal) and atom in env for atom in eqn.invars):
            continue
        values = [
            atom.val if isinstance(atom, jex.Literal) else env[atom] if atom in env else known[atom]
            for atom in eqn.invars
        ]
        outs = _step(builder, graph, index, eqn, values)
        for join in graph.found_joins.at.get((index,), ()):
            builder.join(join.name, outs[0] if join.operand is None else values[join.operand])
        for var, out in zip(eqn.outvars, outs, strict=True):
            # What several equations read is a tensor: built upon, it would be computed twice.
            shared = readers[var] > 1 and not out.softmax
            env[var] = builder.made(out) if shared else out
    (out,) = jaxpr.outvars
    if isinstance(out, jex.Literal) or out not in env:
        raise ValueError("fn must return what depends on x, got a constant")
    try:
        result = builder.arranged(env[out], range(len(env[out].sizes)))
    except ValueError as error:
        raise ValueError(f"fn must return (B, …): {error}") from None
    program = Program("x", result.result, builder.tensors, tuple(builder.operations))
    return program, builder


def _step(builder, graph, index, eqn, values):
    rule = RULES.get(eqn.primitive.name)
    site = graph.site_at.get((index,))
    try:
        if rule is None:
            raise ValueError(f"'{eqn.primitive.name}' is none of {', '.join(sorted(RULES))}")
        return rule(builder, eqn, values, site)
    except ValueError as error:
        raise ValueError(
            f"fn must lower to the operations of an inference graph, got equation {index}, "
            f"`{str(eqn)[:200]}`: {error}"
        ) from None


def _known_values(graph, leaves) -> dict[Any, np.ndarray]:
    """What comes from parameters alone and is read by something else, computed in one go."""
    jaxpr = graph.jaxpr.jaxpr
    alone = {*jaxpr.constvars, *jaxpr.invars[:-1]}
    wanted, steps = [], []
    for eqn in jaxpr.eqns:
        operands = [atom for atom in eqn.invars if not isinstance(atom, jex.Literal)]
        if all(atom in alone for atom in operands):
            alone |= set(eqn.outvars)
            steps.append(eqn)
        else:
            wanted += [atom for atom in operands if atom in alone]
    wanted = list(dict.fromkeys(wanted))

    def compute(consts, leaves):
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars[:-1]], [*consts, *leaves], strict=True))
        for eqn in steps:
            values = [a.val if isinstance(a, jex.Literal) else env[a] for a in eqn.invars]
            env.update(zip(eqn.outvars, interpreter.bind(eqn, values), strict=True))
        return [env[var] for var in wanted]

    values = jax.jit(compute)(list(graph.jaxpr.consts), list(leaves))
    return dict(zip(wanted, map(np.asarray, values), strict=True))


def _inlined(fn):
    """The same function with every inner call inlined, and without what its result does not need.

    Derivative rules go: what is deployed is not differentiated.
    """

    def run(closed, args):
        jaxpr = closed.jaxpr
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
        for eqn in jaxpr.eqns:
            values = [a.val if isinstance(a, jex.Literal) else env[a] for a in eqn.invars]
            if eqn.primitive.name in (*versions.CALLS, *versions.REMAT, *versions.CUSTOM):
                outs = run(versions.body(eqn), values)
            else:
                outs = interpreter.bind(eqn, values)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [a.val if isinstance(a, jex.Literal) else env[a] for a in jaxpr.outvars]

    def flat(params, x):
        leaves = jax.tree.leaves((params, x))
        closed = jax.make_jaxpr(fn)(params, x)
        inlined = jax.make_jaxpr(lambda *args: run(closed, args))(*leaves)
        return jex.jaxpr_as_fun(versions.live(inlined, keep=True)[0])(*leaves)

    return flat
