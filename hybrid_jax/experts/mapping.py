"""One function over the expert axis: vmapped, in a loop or unrolled, chosen by measurement.

The semantics are one, so the choice is a matter of speed alone. In each the convolutions have the
forms that are the fastest there, see `core.fast_convolutions`: without these a loop of training
steps is many times slower on a CPU than separate steps, and so is a vmapped convolution.
"""

import functools
import hashlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core
from hybrid_jax.experts import sharding
from hybrid_jax.experts.stacking import count, stack, unstack


def map_experts(
    fn: Callable[..., Any],
    method: str = "auto",
    in_axes: Sequence[int | None] | None = None,
    choices: core.Choices | None = None,
) -> Callable[..., Any]:
    """Applies `fn` to each expert: `jax.vmap(fn, in_axes)` by the fastest of three methods.

    'vmap'; 'map' (one expert after the other in a loop, compiled once); 'unroll' (one after the
    other, each compiled); or 'auto', see `fastest`, of a function that does not close over traced
    values (hand them in with axis None) and is one object kept between calls, for which the choice
    is made once. The methods agree up to rounding, and `fn` may be differentiated, or itself hold
    `jax.grad`. `in_axes` are for each argument 0 (a pytree with leading axis E) or None (shared by
    all experts), by default 0; outputs have a leading axis E. Where a stack lies on an
    `expert_mesh`, each device maps over its own experts. What is measured is kept in `choices`: a
    run that is to be bit-equal has its own.

    Example:
      >>> dot = map_experts(lambda w, x: x @ w, 'unroll', in_axes=(0, None))
      >>> dot(jnp.ones((4, 3)), jnp.ones(3))
      Array([3., 3., 3., 3.], dtype=float32)
    """
    core.check_choice("method", method, ["auto", *_METHODS])

    @functools.wraps(fn, updated=())
    def mapped(*args):
        axes = _axes(in_axes, args)
        _size(axes, args)
        own = sharding.share(axes, args)
        chosen = method
        if method == "auto":
            chosen = fastest(fn, *own, in_axes=axes, choices=choices)
        run = _METHODS[chosen](fn, axes, choices)
        return sharding.on_each_device(run, axes, args)(*args)

    return mapped


def map_each(
    fns: Sequence[Callable[..., Any]], method: str = "auto", choices: core.Choices | None = None
) -> Callable[..., Any]:
    """Applies each of E functions to its own parameters; those of one function as one stack.

    mapped(params_list, *shared) -> outputs with a leading axis E, in the order of `fns`, each of
    which is fn(params, *shared) -> outputs of one structure and shape. Experts of one program have
    one function, see `alike`; those are mapped by `method`, as for `map_experts`.
    """
    groups: dict[Callable[..., Any], list[int]] = {}
    for e, fn in enumerate(fns):
        groups.setdefault(fn, []).append(e)

    def mapped(params_list, *shared):
        outputs: dict[int, Any] = {}
        for fn, members in groups.items():
            axes = (0, *(None for _ in shared))
            own = stack([params_list[e] for e in members])
            run = map_experts(fn, method if len(members) > 1 else "unroll", axes, choices)
            outputs |= zip(members, unstack(run(own, *shared)), strict=True)
        return jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *(outputs[e] for e in range(len(fns)))
        )

    return mapped


def alike(
    fns: Sequence[Callable[..., Any]], params_list: Sequence[Any], *shared: Any
) -> list[Callable[..., Any]]:
    """One function for all that are the same program of parameters of the same shapes.

    Of `fns`, each fn(params, *shared) -> outputs, those of one program become the first of them;
    what they close over must be known. `shared` are arrays or `jax.ShapeDtypeStruct`s.

    Example:
      >>> fns = [lambda w, x: w * x, lambda w, x: w * x, lambda w, x: w + x]
      >>> first, second, third = alike(fns, [1.0, 2.0, 3.0], 1.0)
      >>> first is second, first is third
      (True, False)
    """
    first: dict[Any, Callable[..., Any]] = {}
    found = []
    for fn, params in zip(fns, params_list, strict=True):
        closed, out = jax.make_jaxpr(fn, return_shape=True)(params, *shared)
        consts = [np.asarray(const) for const in closed.consts]
        held = tuple((const.dtype.str, const.shape, const.tobytes()) for const in consts)
        trees = jax.tree.structure(params), jax.tree.structure(out)
        found.append(first.setdefault((str(closed.jaxpr), held, trees), fn))
    return found


def fastest(
    fn: Callable[..., Any],
    *args: Any,
    in_axes: Sequence[int | None] | None = None,
    choices: core.Choices | None = None,
) -> str:
    """Which of 'vmap' and 'map' runs `fn` of one expert faster on the default backend.

    Both are compiled once, however many experts there are ('unroll' must be named; a single expert
    is 'unroll', without a measurement). On a CPU it is 'map' without a measurement: a step of 4
    stacked ResNet-20 takes 0.95 to 1.0 times as long as 4 separate ones, by 'vmap' 1.25, by
    'unroll', which compiles 4 copies, 1.07. Arguments are as for `map_experts(fn)`; only their
    shapes and dtypes are read, so it works in the midst of tracing.
    """
    axes = _axes(in_axes, args)
    leaves, structure = jax.tree.flatten(args)
    shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    if not all(isinstance(n, int) for shape, _ in shapes for n in shape):
        raise ValueError(
            f"method must be one of {', '.join(_METHODS)} where a shape is symbolic, got 'auto', "
            "which has to run the function"
        )
    if _size(axes, args) == 1:
        return "unroll"
    if jax.default_backend() == "cpu":
        return "map"
    choices = core.CHOICES if choices is None else choices
    return _fastest(jax.default_backend(), fn, axes, choices, structure, shapes)


@functools.lru_cache(maxsize=256)
def _fastest(backend, fn, axes, choices, structure, shapes):
    del backend  # part of the cache's key
    specs = structure.unflatten([jax.ShapeDtypeStruct(*shape) for shape in shapes])
    forms = {name: _METHODS[name](fn, axes, choices) for name in ("vmap", "map")}
    program = str(jax.make_jaxpr(forms["map"])(*specs))
    asked = f"experts {hashlib.sha256(program.encode()).hexdigest()[:16]}"
    return choices.choose(asked, forms, *specs)


def _axes(in_axes, args):
    axes = (0,) * len(args) if in_axes is None else tuple(in_axes)
    if len(axes) != len(args) or not set(axes) <= {0, None} or 0 not in axes:
        raise ValueError(
            f"in_axes must hold 0 or None for each of {len(args)} arguments and at least one 0, "
            f"got {axes}"
        )
    return axes


def _size(axes, args):
    return count([arg if axis == 0 else None for axis, arg in zip(axes, args, strict=True)])


def _vmap(fn, axes, choices):
    return core.fast_convolutions(jax.vmap(fn, axes), choices=choices)


def _map(fn, axes, choices):
    fn = core.fast_convolutions(fn, loop=True, choices=choices)

    def mapped(*args):
        def body(stacked):
            own = iter(stacked)
            return fn(*_replaced(axes, args, lambda _: next(own)))

        return jax.lax.map(body, [arg for axis, arg in zip(axes, args, strict=True) if axis == 0])

    return mapped


def _unroll(fn, axes, choices):
    fn = core.fast_convolutions(fn, choices=choices)

    def mapped(*args):
        def at(e):
            return functools.partial(jax.tree.map, operator.itemgetter(e))

        outputs = [fn(*_replaced(axes, args, at(e))) for e in range(_size(axes, args))]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    return mapped


def _replaced(axes, args, own):
    """The arguments with own(argument) for those that have an expert axis."""
    return [own(arg) if axis == 0 else arg for axis, arg in zip(axes, args, strict=True)]


_METHODS = {"vmap": _vmap, "map": _map, "unroll": _unroll}
