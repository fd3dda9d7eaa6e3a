"""Which leaves of a state are running statistics, and of what: read off the training function.

No name says it. A running statistic is a leaf that the images change. With the old value taken out
it is a function of the batch, and where all of it leads through one array x, such as what a layer
normalizes, that part of the program runs alone, on any x. So two leaves m and v are shown to be the
mean and the variance of one layer: m is linear, of ones it is 1, and v(x) = m(x²) - m(x)².
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from hybrid_jax import core
from hybrid_jax.core import versions
from hybrid_jax.core.interpreter import inline
from hybrid_jax.training.steps import Forward

# As an old value, far above any batch's own: the update then shows the momentum. A power of two
# divides out exactly.
PROBE = 2.0**20
_EXAMPLES = 8
_IMAGES = object()


class _Own(NamedTuple):
    """A batch's own statistic as a function of an array of this shape, and its program's text."""

    text: str
    shape: tuple[int, ...]
    of: Callable[[np.ndarray], np.ndarray]


def running_statistics(
    forward: Forward, params: Any, state: Any, images: Any, key: jax.Array | None = None
) -> dict[str, str | None]:
    """Finds the running means and variances in `state`, and which belong together.

    `forward`, (params, state, images, key) -> (outputs, new_state), is in training mode and blends
    new = momentum · old + (1 - momentum) · the batch's own. Of params, state and images (B, H, W,
    C) only shapes are needed. {path: None of a mean, the path of its mean of a variance} is what
    `reestimate_batchnorm` takes. A leaf that the images change and that is not shown to be either
    is an error, as where experts are run one by one and then stacked.
    """
    changed = _changed(forward, params, state, images, key)
    if not changed:
        raise ValueError(
            "forward must update running statistics in state, got every leaf back as it was; "
            "is it in training mode?"
        )
    found: dict[str, str | None] = {}
    known: dict[tuple[str, ...], bool] = {}  # layers of one kind and size are one program
    for (mean, m), (variance, v) in itertools.permutations(changed.items(), 2):
        for x in m.keys() & v.keys():
            pair = m[x](), v[x]()
            texts = tuple(own.text for own in pair)
            if texts not in known:
                known[texts] = _are_moments(*pair)
            if known[texts]:
                found |= {mean: None, variance: mean}
    for path in changed:
        if path not in found:
            raise ValueError(
                f"state must hold running means and variances, got {path!r}, which forward changes "
                "and does not show to be either; say what it is by statistics"
            )
    return {path: found[path] for path in changed}


def replaced(state: Any, leaves: Mapping[str, Any]) -> Any:
    """`state` with other leaves at some paths, broadcast to the shapes there."""

    def leaf(path: str, old: Any) -> Any:
        return jnp.broadcast_to(leaves[path], np.shape(old)) if path in leaves else old

    return core.map_with_path(leaf, state)


def _changed(forward, params, state, images, key) -> dict[str, dict[jex.Var, Callable]]:
    """Each leaf that the images change, as programs of the arrays that all of it leads through."""
    leaves = {
        path: leaf
        for path, leaf in core.flatten_paths(state).items()
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    }
    images = jax.ShapeDtypeStruct((_EXAMPLES, *images.shape[1:]), images.dtype)

    def updated(old, images, params, state, key):
        start = replaced(state, dict(zip(leaves, old)))
        new = core.flatten_paths(forward(params, start, images, key)[1])
        return [new.get(path, leaf) for path, leaf in zip(leaves, old)]

    old = [jax.eval_shape(core.widen, leaf) for leaf in leaves.values()]
    closed = inline(jax.make_jaxpr(updated)(old, images, params, state, key))
    ins, outs = closed.jaxpr.invars, dict(zip(leaves, closed.jaxpr.outvars))
    outs = {path: out for path, out in outs.items() if not isinstance(out, jex.Literal)}
    origins = _origins(closed.jaxpr, dict(zip(ins, [*leaves, _IMAGES])))
    moved = {p: var for p, var in zip(leaves, ins) if _IMAGES in origins.get(outs.get(p), ())}
    for path in moved:
        if others := sorted(origins[outs[path]] & moved.keys() - {path}):
            raise ValueError(
                f"forward must update {path!r} by its old value and the batch, got that of "
                f"{others[0]!r} in it too; say what they are by statistics"
            )
    through = _dominators(closed.jaxpr, set(ins) - set(moved.values()))
    return {
        path: {
            x: functools.cache(functools.partial(_alone, closed, x, old, outs[path]))
            for x in through[outs[path]]
            if jnp.issubdtype(x.aval.dtype, np.floating)
        }
        for path, old in moved.items()
    }


def _origins(jaxpr: jex.Jaxpr, names: Mapping[jex.Var, Any]) -> dict[jex.Var, frozenset]:
    """Which of the named inputs each value is made of."""
    found = {var: frozenset([name]) for var, name in names.items()}
    for eqn in jaxpr.eqns:
        own = frozenset().union(*(found.get(atom, ()) for atom in _variables(eqn)))
        found |= dict.fromkeys(eqn.outvars, own)
    return found


def _dominators(jaxpr: jex.Jaxpr, sources: set[jex.Var]) -> dict[jex.Var, frozenset[jex.Var]]:
    """The values through which every way from the sources to a value leads."""
    found = {var: frozenset([var]) for var in sources}
    for eqn in jaxpr.eqns:
        if known := [found[atom] for atom in _variables(eqn) if atom in found]:
            found |= {out: frozenset.intersection(*known) | {out} for out in eqn.outvars}
    return found


def _alone(closed: jex.ClosedJaxpr, x: jex.Var, old: jex.Var, out: jex.Var) -> _Own:
    """What is in `out` of x, which dominates it, and of the old value."""
    needed, eqns = {out}, []
    for eqn in reversed(closed.eqns):
        if x not in eqn.outvars and needed.intersection(eqn.outvars):
            eqns.append(eqn)
            needed.update(_variables(eqn))

    def blended(x_value, old_value):
        values = dict(zip(closed.jaxpr.constvars, closed.consts))
        values |= {x: x_value, old: old_value}
        for eqn in reversed(eqns):
            taken = [a.val if isinstance(a, jex.Literal) else values[a] for a in eqn.invars]
            values |= dict(zip(eqn.outvars, core.bind(eqn, taken)))
        return values[out]

    avals = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in (x, old)]
    run = jax.jit(blended, compiler_options=versions.run_once())

    def new(x_value, old_value):
        ins = zip((x_value, old_value), avals)
        ins = (np.broadcast_to(value, aval.shape).astype(aval.dtype) for value, aval in ins)
        return np.asarray(run(*ins), np.float64)

    def own(x_value):
        start = new(x_value, 0)
        return start / (1 - (new(x_value, PROBE) - start) / PROBE)

    program = jax.make_jaxpr(blended)(*avals)
    constants = [np.asarray(value).tobytes() for value in program.consts]
    return _Own(f"{program} {constants}", x.aval.shape, own)


def _are_moments(mean: _Own, variance: _Own) -> bool:
    """Whether these are the mean and the variance of x, within what bfloat16 leaves of them."""
    drawn, other = np.random.default_rng(0).standard_normal((2, *mean.shape))
    drawn = 1 + drawn / 2  # not around 0, where a mean square is a variance
    m, v = mean.of(drawn), variance.of(drawn)

    def equal(a, b):
        return np.allclose(a, b, rtol=0.02, atol=0.005)

    return (
        m.shape == v.shape
        and equal(v, mean.of(drawn**2) - m**2)
        and equal(mean.of(np.ones(mean.shape)), 1)
        and equal(mean.of(drawn + other), m + mean.of(other))
    )


def _variables(eqn: jex.JaxprEqn) -> list[jex.Var]:
    return [atom for atom in eqn.invars if not isinstance(atom, jex.Literal)]
