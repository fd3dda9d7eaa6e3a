"""One function over the expert axis: vmapped, in a loop or unrolled, chosen by measurement.

A convolution vmapped over its kernel becomes a grouped convolution, which XLA runs several times
slower on a CPU than the same convolutions one after the other; on accelerators it is the other way
round. The semantics are one, so the choice is a matter of speed alone.

A training step of 4 ResNet-20 at batch 32, over that of 4 separate ones, on a CPU with 2 cores:
'unroll' 0.8, 'vmap' 3.7, 'map' 17; 'products' 1.7 to 2.8, on a machine that was busy with other
things. Inference of them at batch 1, also on a busy one: 'unroll' 0.9, 'map' 1.05, 'products' 1.6,
'vmap' 1.7. So unrolling is best as long as it compiles in good time, and of the methods that
compile one copy no one is always best.
"""

import functools
import operator
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax import core
from hybrid_jax.experts import sharding
from hybrid_jax.experts.products import as_products
from hybrid_jax.experts.stacking import count

_UNROLL_AT_MOST = 16


def map_experts(
    fn: Callable[..., Any], method: str = "auto", in_axes: Sequence[int | None] | None = None
) -> Callable[..., Any]:
    """Applies `fn` to each expert: `jax.vmap(fn, in_axes)` by the fastest of four methods.

    Args:
      fn: Function of one expert. May be differentiated, or itself hold `jax.grad`. With 'auto' it
        must not close over traced values (hand them in with axis None) and should be one object
        kept between calls, for which the choice is made once.
      method: 'vmap'; 'map' (one expert after the other in a loop, compiled once); 'products' (the
        same with convolutions as matrix products, see `as_products`); 'unroll' (one after the
        other, each compiled); or 'auto', see `fastest`. The methods agree up to rounding: for
        bit-equal runs name the method, or keep what `fastest` returned.
      in_axes: For each argument 0 (a pytree with leading axis E) or None (shared by all experts).
        Default: 0 for all.

    Returns:
      Function of the same arguments whose outputs have a leading axis E. Where a stack lies on an
      `expert_mesh`, each device maps over its own experts.

    Raises:
      ValueError: At once if `method` is unknown; when called, if expert axes differ in size, or E
        is not a multiple of the mesh's axis 'expert'.

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
        chosen = fastest(fn, *own, in_axes=axes) if method == "auto" else method
        return sharding.on_each_device(_METHODS[chosen](fn, axes), axes, args)(*args)

    return mapped


def fastest(fn: Callable[..., Any], *args: Any, in_axes: Sequence[int | None] | None = None) -> str:
    """Measures which method of `map_experts` runs `fn` fastest on the default backend.

    Compiles 'vmap' and 'unroll' and runs them on zeros; only the arguments' shapes and dtypes are
    read, so it works in the midst of tracing. The answer is kept per backend, function and shapes.
    Above 16 experts, where E copies would take long to compile, 'map' and 'products' are tried in
    place of 'unroll'.

    Args:
      fn: Function of one expert.
      *args: Arrays, tracers or `jax.ShapeDtypeStruct`, as for `map_experts(fn)`.
      in_axes: As for `map_experts`.

    Returns:
      'vmap', 'map', 'products' or 'unroll'; for a single expert 'unroll', without a measurement.

    Raises:
      ValueError: If a shape is symbolic (name the method there), or expert axes differ in size.

    Example:
      >>> fastest(lambda w: w * 2, jnp.ones((2, 3))) in ('vmap', 'unroll')
      True
    """
    axes = _axes(in_axes, args)
    leaves, structure = jax.tree.flatten(args)
    shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    if not all(isinstance(n, int) for shape, _ in shapes for n in shape):
        raise ValueError(
            f"method must be one of {', '.join(_METHODS)} where a shape is symbolic, got 'auto', "
            "which has to run the function"
        )
    size = _size(axes, args)
    if size == 1:
        return "unroll"
    return _fastest(jax.default_backend(), fn, axes, size, structure, shapes)


@functools.lru_cache(maxsize=256)
def _fastest(backend, fn, axes, size, structure, shapes):
    del backend  # part of the cache's key
    specs = structure.unflatten([jax.ShapeDtypeStruct(*shape) for shape in shapes])
    names = ["vmap", *(["unroll"] if size <= _UNROLL_AT_MOST else ["map", "products"])]
    # Compiled ahead of time, these can run while an outer function is being traced.
    run = {name: jax.jit(_METHODS[name](fn, axes)).lower(*specs).compile() for name in names}
    with jax.ensure_compile_time_eval():
        zeros = structure.unflatten([jnp.zeros(*shape) for shape in shapes])
    seconds = {name: _seconds(run[name], zeros) for name in names}
    close = [name for name in names if seconds[name] < 2 * min(seconds.values())]
    for name in close * 3 if len(close) > 1 else ():
        seconds[name] = min(seconds[name], _seconds(run[name], zeros))
    return min(seconds, key=seconds.get)


def _seconds(compiled, args):
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    return time.perf_counter() - start


def _axes(in_axes, args):
    axes = (0,) * len(args) if in_axes is None else tuple(in_axes)
    if len(axes) != len(args) or not set(axes) <= {0, None} or 0 not in axes:
        raise ValueError(
            f"in_axes must hold 0 or None for each of {len(args)} arguments and at least one 0, "
            f"got {axes}"
        )
    return axes


def _size(axes, args):
    """E, the one size of every leading expert axis."""
    mapped = [arg if axis == 0 else None for axis, arg in zip(axes, args, strict=True)]
    return count(mapped)


def _vmap(fn, axes):
    return jax.vmap(fn, axes)


def _map(fn, axes):
    def mapped(*args):
        stacked = [arg for axis, arg in zip(axes, args, strict=True) if axis == 0]

        def body(expert):
            rest = iter(expert)
            return fn(
                *(next(rest) if axis == 0 else arg for axis, arg in zip(axes, args, strict=True))
            )

        return jax.lax.map(body, stacked)

    return mapped


def _unroll(fn, axes):
    def mapped(*args):
        def at(e):
            return [
                jax.tree.map(operator.itemgetter(e), arg) if axis == 0 else arg
                for axis, arg in zip(axes, args, strict=True)
            ]

        outputs = [fn(*at(e)) for e in range(_size(axes, args))]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    return mapped


def _products(fn, axes):
    return _map(as_products(fn), axes)


_METHODS = {"vmap": _vmap, "map": _map, "products": _products, "unroll": _unroll}
