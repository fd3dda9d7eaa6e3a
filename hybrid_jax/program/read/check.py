"""Whether an inference graph computes what the function that it was read from does."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from hybrid_jax.core import interpreter, versions
from hybrid_jax.program import evaluate
from hybrid_jax.program.graph import Program
from hybrid_jax.program.read.flat import EXAMPLES

_TOLERANCE = 1e-4
_HALF = 2.0**-5
_FEW = 1e-4
_NUDGE, _FAR = 2.0**-22, 8
_HELD = 2**26  # numbers of edges that are compared on the host, 256 MB


def verify(
    program: Program, reading: Any, fn: Callable[..., Any], params: Any, inputs: Sequence[Any]
) -> None:
    """Raises ValueError, naming the first operation that differs, if program and function do."""
    given = [_examples(x, i) for i, x in enumerate(inputs)]
    leaves = jax.tree.leaves(params)
    order = {name: i for i, name in enumerate(program.tensors)}
    places = [(var, node.value.held, node) for var, node in reading.env.items()]
    places = sorted((p for p in places if p[1] in order), key=lambda place: order[place[1]])

    def values(leaves, weights, given):
        # Weights are arguments: XLA computes with constants while it compiles.
        own, env = program.replace(weights), _values(reading.graph.jaxpr, [*leaves, *given])
        made = evaluate.edges(own, given)
        pairs = [(env[var], _as_traced(made[name], node)) for var, name, node in places]
        # Not the first of the three: one alone is summed in another order.
        one = [x[:1] for x in given]
        alone = jax.tree.leaves(fn(jax.tree.unflatten(jax.tree.structure(params), leaves), *one))
        whole = jax.tree.leaves(evaluate.results(own, evaluate.edges(own, one)))
        found = pairs, list(zip(alone, whole, strict=True))
        return found if held else _differences(found, jnp)

    # Compiled quickly, and without what compares, which takes as long: it runs once.
    held = sum(var.aval.size for var, *_ in places) <= _HELD
    arguments = leaves, program.params, given
    compiled = jax.jit(values).lower(*arguments).compile(versions.run_once())
    found = jax.device_get(compiled(*arguments))
    with np.errstate(all="ignore"):
        pairs, alone = _differences(found, np) if held else found
    for (var, name, _), (share, most, largest) in zip(places, pairs, strict=True):
        if share > 0 and most > _FAR * _wobble(reading, leaves, given, var):
            raise ValueError(_MESSAGE.format(repr(name), most, largest, EXAMPLES))
    ends = zip(reading.graph.jaxpr.jaxpr.outvars, program.outputs, alone, strict=True)
    for var, name, (share, most, largest) in ends:
        if share > 0 and most > _FAR * _wobble(reading, leaves, given, var):
            raise ValueError(_MESSAGE.format(repr(name), most, largest, 1))


_MESSAGE = (
    "fn must compute what its inference graph does, got another result where the graph has {}: "
    "they differ by up to {:.3g} of {:.3g} for {} examples"
)


def _wobble(reading, leaves, given, var):
    """How far a variable moves if all before it do by some units in their last place.

    What cancels, as a variance from two means, may differ as much without being wrong.
    """

    @jax.jit
    def moved(leaves, given):
        args = [*leaves, *given]
        pair = (_values(reading.graph.jaxpr, args, nudge)[var] for nudge in (0.0, _NUDGE))
        return jnp.max(jnp.abs(jnp.subtract(*(x.astype(jnp.float32) for x in pair))))

    return moved(leaves, given)


def _examples(x, seed):
    """So many examples of an input, or of noise."""
    shape = (EXAMPLES, *np.shape(x)[1:])
    if not isinstance(x, jax.ShapeDtypeStruct) and np.shape(x)[0]:
        return jnp.asarray(np.resize(np.asarray(x), shape))
    random = np.random.default_rng(seed)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.asarray(random.standard_normal(shape), x.dtype)
    return jnp.asarray(random.integers(0, 2 if x.dtype == bool else 256, shape), x.dtype)


def _values(closed, args, nudge=0.0):
    """Every variable's value; with `nudge` each equation's is that part off, up or down."""
    jaxpr = closed.jaxpr
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
    for index, eqn in enumerate(jaxpr.eqns):
        values = [a.val if isinstance(a, jex.Literal) else env[a] for a in eqn.invars]
        outs = interpreter.bind(eqn, values)
        if nudge:
            factor = 1 + nudge * (-1) ** index
            floats = [jnp.issubdtype(out.dtype, jnp.floating) for out in outs]
            outs = [y * jnp.asarray(factor, y.dtype) if f else y for y, f in zip(outs, floats)]
        env.update(zip(eqn.outvars, outs, strict=True))
    return env


def _as_traced(edge, node):
    there = [axis for axis in node.axes if axis is not None]
    order = [*there, *(i for i in range(edge.ndim) if i not in there)]
    lengths = [1 if axis is None else edge.shape[axis] for axis in node.axes]
    return jnp.broadcast_to(edge.transpose(order).reshape(lengths), node.sizes).reshape(node.traced)


def _differences(found, xp):
    return [[_difference(*pair, xp) for pair in pairs] for pairs in found]


def _difference(wanted, got, xp):
    """How many entries differ beyond the few that may, by how much at most, and of what."""
    half = jnp.issubdtype(wanted.dtype, jnp.floating) and jnp.finfo(wanted.dtype).bits < 32
    tolerance = _HALF if half else _TOLERANCE
    wanted, got = wanted.astype(np.float32), got.astype(np.float32)
    largest = xp.max(xp.abs(wanted), initial=0.0, where=xp.isfinite(wanted))
    gap = xp.where(wanted == got, 0.0, xp.abs(wanted - got))
    gap = xp.where(xp.isnan(wanted) & xp.isnan(got), 0.0, gap)
    # What is not finite in one alone is a difference.
    gap = xp.where(xp.isnan(gap), np.inf, gap)
    beyond = xp.sum(gap > tolerance * xp.maximum(largest, 1e-30))
    return beyond - int(_FEW * wanted.size), xp.max(gap, initial=0.0), largest
