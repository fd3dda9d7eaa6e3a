"""Physical removal of channels: the same program on smaller arrays, whoever wrote it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_jax.core import host, interpreter, paths
from hybrid_jax.core.channels import keep_indices
from hybrid_jax.core.graph import Graph, abstract, memoize_trace, trace
from hybrid_jax.core.resize import Kept, Plan, take


@dataclasses.dataclass(frozen=True, eq=False)
class Certificate:
    """What `shrink` removed, and that it changed nothing.

    `difference` is the largest between the outputs of the masked and the small network, None if the
    inputs were only shapes. `macs`, for one example, and `parameters` are (before, after). `kept`
    are the indices that stay, for `narrow`, `slice_tree` and `slice_state`.
    """

    difference: float | None
    macs: tuple[int, int]
    parameters: tuple[int, int]
    kept: Kept


def shrink(
    fn: Callable[..., Any], params: Any, masks: Any, *inputs: Any
) -> tuple[Callable[..., Any], Any, Certificate]:
    """Removes every channel of which all coupled parameters are masked.

    What is masked without its whole group (unstructured sparsity) stays, as zeros. `masks` are bool
    like `params`, True where kept, with `optax.MaskedNode()` where nothing is masked, as `expand`
    makes them. `params` come with statistics (in Linen, the whole variables dict). Of inputs, or
    parameters, that are `jax.ShapeDtypeStruct`s no outputs are compared.

    Returns:
      (small_fn, small_params, certificate). `small_fn(small_params, *inputs)` takes inputs of any
      batch size, and can be jitted, differentiated, vmapped and exported.
    """
    host.check_known("shrink", params=params, masks=masks, inputs=inputs)
    traced = memoize_trace(fn)
    graph = traced(params, *inputs)
    kept = kept_indices(graph, masks)
    small_fn, small_params = _narrowed(traced, params, kept), slice_tree(params, kept)
    if _is_abstract((params, inputs)):
        difference = None
    else:
        masked = mask_removed(params, kept)
        difference = _difference(
            jax.jit(fn)(masked, *inputs), jax.jit(small_fn)(small_params, *inputs)
        )
    after = trace(small_fn, small_params, *inputs)
    return (
        small_fn,
        small_params,
        Certificate(
            difference,
            (graph.macs, after.macs),
            (_count(graph.parameters), _count(after.parameters)),
            kept,
        ),
    )


def kept_indices(graph: Graph, masks: Any) -> Kept:
    """Which indices of each parameter's axes stay, once fully masked groups are removed."""
    alive, keep = {}, {}
    for path, mask in paths.flatten_paths(masks).items():
        if path not in graph.parameters:
            names = ", ".join(graph.parameters)
            raise ValueError(f"masks must have paths of params, got {path!r}, expected {names}")
        if paths.is_masked_node(mask):
            continue
        mask, shape = np.asarray(mask, bool), graph.parameters[path].shape
        if mask.shape != shape:
            raise ValueError(f"masks must have shape {shape} at {path!r}, got {mask.shape}")
        rank = range(mask.ndim)
        alive[path] = [mask.any(axis=tuple(b for b in rank if b != a)) for a in rank]
    for group in graph.groups:
        if all(member.path in alive for member in group.members):
            own = [alive[m.path][m.axis][m.index].any(axis=1) for m in group.members]
            keep[group.name] = np.any(own, axis=0)
    return keep_indices(keep, graph.groups, graph.parameters)


def slice_tree(tree: Any, kept: Kept) -> Any:
    """Slices parameters, or what has their paths and shapes: gradients, averages, some of them.

    Leaves may be arrays, shapes or `optax.MaskedNode()`s; the path of each is a parameter's. The
    state of an optimizer is sliced by `slice_state`. `kept` is a certificate's.
    """

    def cut(path, leaf):
        if path not in kept:
            raise ValueError(
                f"tree must have the paths of parameters, got {path!r} among: {', '.join(kept)}"
            )
        return _sliced(path, leaf, kept[path])

    return paths.map_with_path(cut, tree)


def slice_state(tx: optax.GradientTransformation, state: Any, params: Any, kept: Kept) -> Any:
    """Slices what an optimizer's state holds for each parameter: moments, averages, held masks.

    `params` are those that it is of, or their shapes: the whole pytree, before the removal. `kept`
    is a certificate's. Entries that have not their parameter's shape (factored moments) are an
    error.
    """
    slice_tree(jax.tree.map(lambda leaf: optax.MaskedNode(), params), kept)
    whole = paths.map_with_path(lambda path, leaf: _Whole(path, np.shape(leaf)), params)

    def cut(entry, own):
        if not paths.is_masked_node(entry) and np.shape(entry) != own.shape:
            raise ValueError(
                f"state must have shape {own.shape} for {own.path!r}, got {np.shape(entry)}"
            )
        return _sliced(own.path, entry, kept[own.path])

    return paths.map_state(tx, cut, state, whole)


@dataclasses.dataclass(frozen=True)
class _Whole:
    path: str
    shape: tuple[int, ...]


def _sliced(path: str, leaf: Any, indices: Sequence[np.ndarray]) -> Any:
    if paths.is_masked_node(leaf):
        return leaf
    if len(indices) != np.ndim(leaf) or any(
        len(i) and i[-1] >= n for i, n in zip(indices, np.shape(leaf), strict=True)
    ):
        raise ValueError(f"tree must have the shape of {path!r} there, got {np.shape(leaf)}")
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(tuple(map(len, indices)), leaf.dtype)
    if isinstance(leaf, jax.core.Tracer):
        return take(leaf, indices)
    return host.on_device(np.asarray(leaf)[np.ix_(*indices)])


def mask_removed(params: Any, kept: Kept) -> Any:
    """Sets to zero what `slice_tree` removes; the small network computes what these compute."""

    def cut(path, leaf):
        inside = np.zeros(np.shape(leaf), bool)
        inside[np.ix_(*kept[path])] = True
        if inside.all():
            return leaf
        if isinstance(leaf, jax.core.Tracer):
            return jnp.where(inside, leaf, jnp.zeros((), leaf.dtype))
        return host.on_device(np.where(inside, np.asarray(leaf), np.zeros((), leaf.dtype)))

    return paths.map_with_path(cut, params)


def narrow(fn: Callable[..., Any], params: Any, kept: Kept) -> Callable[..., Any]:
    """The same removal for another function of the same parameters, as the one for training.

    `params` are those before the removal, or their shapes, and `kept` is a certificate's.
    small_fn(small_params, *inputs) is traced for each new shape of the inputs; outputs that have
    the removed channels (new BatchNorm statistics) come out sliced. It raises if `fn` makes use of
    a removed channel.
    """
    return _narrowed(memoize_trace(fn), params, kept)


def _narrowed(traced: Callable[..., Graph], params: Any, kept: Kept) -> Callable[..., Any]:
    """`narrow` of a function whose traces are remembered."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    small = slice_tree(shapes, kept)
    plans: dict[Graph, Plan] = {}

    def small_fn(small_params, *inputs):
        if jax.tree.structure(small_params) != jax.tree.structure(small):
            raise ValueError(
                f"params must have structure {jax.tree.structure(small)}, "
                f"got {jax.tree.structure(small_params)}"
            )
        got = paths.flatten_paths(jax.tree.map(abstract, small_params))
        for path, leaf in paths.flatten_paths(small).items():
            if got[path].shape != leaf.shape:
                raise ValueError(
                    f"params must have shape {leaf.shape} at {path!r}, got {got[path].shape}"
                )
        # The type is that of the parameters given, in another precision perhaps.
        full = paths.map_with_path(lambda path, leaf: got[path].update(shape=leaf.shape), shapes)
        graph = traced(full, *inputs)
        if graph not in plans:
            plans.clear()  # one is enough, and others would be kept alive
            plans[graph] = Plan(graph, kept)
        plan = plans[graph]
        leaves = jax.tree.leaves((small_params, *inputs))
        outs, _ = interpreter.evaluate(
            graph.jaxpr.jaxpr,
            graph.jaxpr.consts,
            leaves,
            plan.rule(),
            plan.active.__contains__,
            resize=plan.cut_constants,
        )
        return jax.tree.unflatten(graph.out_tree, outs)

    return small_fn


def _is_abstract(tree: Any) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def _count(parameters: Mapping[str, Any]) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in parameters.values())


def _difference(a: Any, b: Any) -> float:
    """Largest absolute difference; equal infinities, and NaN in both, are none."""

    def gap(x, y):
        x, y = _numbers(x), _numbers(y)
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        with np.errstate(invalid="ignore"):
            return np.max(np.abs(np.where(same, 0, x - y)), initial=0)

    return float(np.max(jax.tree.leaves(jax.tree.map(gap, a, b)), initial=0))


def _numbers(x: Any) -> np.ndarray:
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    wide = np.complex128 if jnp.issubdtype(x.dtype, jnp.complexfloating) else np.float64
    return np.asarray(x).astype(wide)
