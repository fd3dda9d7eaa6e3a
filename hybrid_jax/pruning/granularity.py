"""Granularities: which weights leave together, and which compete for being kept.

A unit is what leaves as a whole: a weight, a block, a kernel, a channel. Units of a row compete.
Here are the granularities inside a leaf; that of coupled channels is in `coupling.py`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core

Leaves = dict[str, Any]
Units = dict[str, jax.Array]
Shape = tuple[int, ...]
Axes = int | tuple[int, int]

REDUCTIONS = {
    "sum": lambda entries: jnp.sum(entries, axis=-1),
    "mean": lambda entries: jnp.mean(entries, axis=-1),
    "max": lambda entries: jnp.max(entries, axis=-1),
    "l2": lambda entries: jnp.sqrt(jnp.sum(jnp.square(entries), axis=-1)),
}
"""How the scores of a unit's weights, on the last axis, make that of the unit."""


@dataclasses.dataclass(frozen=True)
class Granularity:
    """A pytree of scores seen as rows of units, and back. Rows have a name, or share one.

    `leaves` are {path: scores, or `optax.MaskedNode()`}.

    Attributes:
      name: How errors call it.
      shapes: `shapes(leaves) -> {name: shape}` of all there is to prune: the leaves by their
        paths, or the groups of channels by theirs, with the shapes of their kernels.
      split: `split(leaves, names) -> {name: (rows, n) scores of units}`.
      merge: `merge({name: (rows, n) bool}, leaves) -> {path: mask}`.
      max_sparsity: The largest fraction that every single row may lose.
      at_least: How many units a row keeps whatever the sparsity; all, if it has not so many.
      multiple: Rows are kept in whole steps of so many units.
    """

    name: str
    shapes: Callable[[Leaves], dict[str, Shape]]
    split: Callable[[Leaves, Iterable[str]], Units]
    merge: Callable[[Units, Leaves], Leaves]
    max_sparsity: float = 1.0
    at_least: int = 0
    multiple: int = 1


def unstructured(at_least: int = 0) -> Granularity:
    """Every weight is a unit of its own.

    Args:
      at_least: Weights that each leaf keeps whatever the sparsity. With 1 no layer dies where
        `global_` or a high sparsity would take all of it.

    Raises:
      ValueError: If `at_least` is negative.

    Example:
      >>> from hybrid_jax.pruning import masks
      >>> masks({'w': jnp.array([[4.0, 1.0], [3.0, 2.0]])}, 0.5, unstructured())['w'].tolist()
      [[True, False], [True, False]]
    """

    def arrange(path, shape):
        del path
        return shape, range(len(shape)), (1, math.prod(shape), 1)

    return _within_leaves("unstructured", arrange, at_least=at_least)


def n_m(n: int, m: int, axis: int | Mapping[str, int] = -2) -> Granularity:
    """At least `n` of every `m` consecutive weights along the contracted axis are kept.

    Every m weights are a row that loses floor(sparsity · m + ½): exactly m − n at sparsity
    1 − n/m, fewer on the way there with a schedule. A. Mishra et al., Accelerating Sparse Deep
    Neural Networks (arXiv 2104.08378).

    Args:
      n: Weights kept of each m, from 1.
      m: Length of a row; must divide the axis.
      axis: The contracted axis: −2 is C of kernels (H, W, C, O) and (C, O). For other layouts
        {path: axis}.

    Raises:
      ValueError: If `n` is not in [1, m]. From `masks`, if `m` does not divide the axis of a
        leaf, `axis` is none of its axes, or the allocation is not `uniform()`.

    Example:
      >>> from hybrid_jax.pruning import masks
      >>> scores = jnp.array([[1.0], [2.0], [4.0], [3.0]])  # C = 4, O = 1
      >>> masks({'w': scores}, 0.5, n_m(2, 4))['w'][:, 0].tolist()
      [False, False, True, True]
    """
    core.check_integer("m", m, 1)
    core.check_integer("n", n, 1, m)

    def arrange(path, shape):
        (along,) = _own_axes("axis must be the contracted axis", axis, path, shape, 1)
        return *_cut(path, shape, {along: ("m", m)}), (-1, m, 1)

    return _within_leaves(f"n_m({n}, {m})", arrange, max_sparsity=1 - n / m)


def blocks(
    bc: int,
    bo: int,
    axes: tuple[int, int] | Mapping[str, tuple[int, int]] = (-2, -1),
    reduce: str = "sum",
    at_least: int = 0,
) -> Granularity:
    """Blocks of `bc` input by `bo` output channels leave as a whole, at each place of a kernel.

    S. Narang, E. Undersander, G. Diamos, Block-Sparse Recurrent Neural Networks
    (arXiv 1711.02782). Of equal scores the block kept is the first in (H, W, C/bc, O/bo).

    Args:
      bc: Input channels of a block; must divide C.
      bo: Output channels of a block; must divide O.
      axes: The axes of C and O, as in kernels (H, W, C, O) and (C, O). For other layouts
        {path: (axis, axis)}.
      reduce: 'sum', 'mean', 'max' or 'l2' of the scores in a block.
      at_least: Blocks that each leaf keeps whatever the sparsity.

    Raises:
      ValueError: If a size is below 1, or `reduce` unknown. From `masks`, if a block does not
        divide a leaf: no part of a block is a unit, so exempt the path.

    Example:
      >>> from hybrid_jax.pruning import masks
      >>> scores = jnp.array([[9.0, 0.0, 3.0, 4.0]])  # C = 1, O = 4
      >>> masks({'w': scores}, 0.5, blocks(1, 2))['w'].tolist()  # 9 + 0 and 3 + 4
      [[True, True, False, False]]
    """
    core.check_integer("bc", bc, 1)
    core.check_integer("bo", bo, 1)

    def arrange(path, shape):
        c, o = _own_axes("axes must be those of C and O", axes, path, shape, 2)
        return *_cut(path, shape, {c: ("bc", bc), o: ("bo", bo)}), (1, -1, bc * bo)

    return _within_leaves(f"blocks({bc}, {bo})", arrange, reduce, at_least=at_least)


def kernels(
    axes: tuple[int, int] | Mapping[str, tuple[int, int]] = (-2, -1),
    reduce: str = "sum",
    at_least: int = 0,
) -> Granularity:
    """The H×W kernel of one input and one output channel leaves as a whole.

    In a dense layer, or one of 1×1 convolutions, this is a single weight. H. Mao et al.,
    Exploring the Regularity of Sparse Structure in Convolutional Neural Networks
    (arXiv 1705.08922).

    Args:
      axes: The axes of C and O, as in kernels (H, W, C, O). For other layouts
        {path: (axis, axis)}.
      reduce: 'sum', 'mean', 'max' or 'l2' of the scores in a kernel. Under `global_`, where
        kernels of several sizes compete, a sum favours the large ones.
      at_least: Kernels that each leaf keeps whatever the sparsity.

    Raises:
      ValueError: If `reduce` is unknown. From `masks`, if `axes` are not two axes of a leaf.

    Example:
      >>> from hybrid_jax.pruning import masks
      >>> scores = jnp.array([[[[1.0, 5.0]], [[3.0, 0.0]]]])  # H = 1, W = 2, C = 1, O = 2
      >>> masks({'w': scores}, 0.5, kernels())['w'][0, :, 0].tolist()  # 1 + 3 and 5 + 0
      [[False, True], [False, True]]
    """

    def arrange(path, shape):
        own = _own_axes("axes must be those of C and O", axes, path, shape, 2)
        spatial = [axis for axis in range(len(shape)) if axis not in own]
        size = math.prod(shape[axis] for axis in spatial)
        return shape, [*own, *spatial], (1, -1, size)

    return _within_leaves("kernels", arrange, reduce, at_least=at_least)


def _within_leaves(
    name: str,
    arrange: Callable[[str, Shape], tuple[Iterable[int], Iterable[int], Shape]],
    reduce: str = "sum",
    at_least: int = 0,
    **attributes: Any,
) -> Granularity:
    """The granularity whose units are parts of one leaf.

    `arrange(path, shape) -> (dims, order, view)`: reshaped to `dims`, its axes transposed to
    `order`, and reshaped to `view` a leaf is (rows, n, weights of a unit).
    """
    core.check_choice("reduce", reduce, REDUCTIONS)
    core.check_integer("at_least", at_least, 0)

    def shapes(leaves):
        return {path: x.shape for path, x in leaves.items() if not core.is_masked_node(x)}

    def units(path, leaf):
        dims, order, view = arrange(path, leaf.shape)
        return REDUCTIONS[reduce](leaf.reshape(dims).transpose(order).reshape(view))

    def mask(path, kept, shape):
        dims, order, view = arrange(path, shape)
        size = view[-1]
        entries = jnp.broadcast_to(kept[..., None], (*kept.shape, size))
        entries = entries.reshape([dims[axis] for axis in order])
        return entries.transpose(np.argsort(order)).reshape(shape)

    return Granularity(
        name,
        shapes,
        split=lambda leaves, names: {path: units(path, leaves[path]) for path in names},
        merge=lambda kept, leaves: {p: mask(p, x, leaves[p].shape) for p, x in kept.items()},
        at_least=at_least,
        **attributes,
    )


def _own_axes(
    expected: str, axes: Axes | Mapping[str, Axes], path: str, shape: Shape, count: int
) -> list[int]:
    """The `count` axes of one leaf, counted from 0."""
    given = axes.get(path) if isinstance(axes, Mapping) else axes
    own = given if isinstance(given, tuple) else (given,)
    rank = len(shape)
    valid = all(isinstance(axis, int) and -rank <= axis < rank for axis in own)
    own = [axis % rank for axis in own] if valid else []
    if len(set(own)) != count:
        raise ValueError(f"{expected} of {path!r} with shape {shape}, got {given!r}")
    return own


def _cut(
    path: str, shape: Shape, sizes: Mapping[int, tuple[str, int]]
) -> tuple[list[int], list[int]]:
    """Cuts axes into parts of a size, {axis: (its name, size)}: new dims, the order of them.

    In that order the axes inside the parts come last.
    """
    dims, outer, inner = [], [], []
    for axis, length in enumerate(shape):
        name, size = sizes.get(axis, ("", 1))
        if length % size:
            raise ValueError(
                f"{name} must divide axis {axis - len(shape)} of {path!r} with shape {shape}, "
                f"got {size}; exempt the path or choose another {name}"
            )
        dims += [length // size, size]
        outer.append(2 * axis)
        inner.append(2 * axis + 1)
    return dims, outer + inner
