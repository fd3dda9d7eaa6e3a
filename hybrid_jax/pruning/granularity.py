"""Granularities: which weights leave together, and which compete for being kept.

A unit is what leaves as a whole: a weight, a block, a kernel, a channel. Units of a row compete.
Here are the granularities inside a leaf; that of coupled channels is in `coupling.py`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from hybrid_jax import core

Leaves = dict[str, Any]
Units = dict[str, jax.Array]
Kernels = Mapping[str, core.Kernel]

REDUCTIONS = {
    "sum": lambda entries: entries.sum(axis=-1),
    "mean": lambda entries: entries.mean(axis=-1),
    "max": lambda entries: entries.max(axis=-1),
    "l2": lambda entries: entries.__array_namespace__().sqrt((entries * entries).sum(axis=-1)),
}
"""How the scores of a unit's weights, on the last axis, make that of the unit."""


@dataclasses.dataclass(frozen=True)
class Granularity:
    """A pytree of scores seen as rows of units, and back. Rows have a name, or share one.

    `leaves` are {path: scores, or `optax.MaskedNode()`}, arrays of NumPy where they are known.

    Attributes:
      name: How errors call it.
      paths: `paths(leaves) -> {name: path}` of all there is to prune: the leaves, each with its own
        path for a name, or the groups of channels by theirs, with the paths of their kernels.
      split: `split(leaves, names) -> {name: (rows, n) scores of units}`.
      merge: `merge({name: (rows, n) bool}, leaves) -> {path: mask}`.
      max_sparsity: The largest fraction that every single row may lose.
      at_least: How many units a row keeps whatever the sparsity; all, if it has not so many.
      multiple: Rows are kept in whole steps of so many units.
    """

    name: str
    paths: Callable[[Leaves], dict[str, str]]
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
      >>> import jax.numpy as jnp
      >>> from hybrid_jax.pruning import masks
      >>> masks({'w': jnp.array([[4.0, 1.0], [3.0, 2.0]])}, 0.5, unstructured())['w'].tolist()
      [[True, False], [True, False]]
    """
    return _within_leaves(
        "unstructured",
        lambda path, leaf: leaf.reshape(1, -1, 1),
        lambda path, weights, shape: weights.reshape(shape),
        at_least=at_least,
    )


def n_m(kernels: Kernels, n: int, m: int) -> Granularity:
    """At least `n` of every `m` consecutive weights along the contracted axis are kept.

    Every m weights are a row that loses floor(sparsity · m + ½): exactly m − n at sparsity
    1 − n/m, fewer on the way there with a schedule. A. Mishra et al., Accelerating Sparse Deep
    Neural Networks (arXiv 2104.08378).

    Args:
      kernels: `core.trace(...).kernels`, which know the inputs C that an output sums over.
      n: Weights kept of each m, from 1.
      m: Length of a row; must divide C.

    Raises:
      ValueError: If `n` is not in [1, m]. From `masks`, if `m` does not divide the C of a kernel,
        what is scored is no kernel, or the allocation is not `uniform()`.

    Example:
      >>> import jax.numpy as jnp
      >>> from hybrid_jax.pruning import masks
      >>> params = {'w': jnp.array([[1.0, 2.0, 4.0, 3.0]])}  # O = 1, C = 4
      >>> kernels = core.trace(lambda p, x: x @ p['w'].T, params, jnp.ones((1, 4))).kernels
      >>> masks(params, 0.5, n_m(kernels, 2, 4))['w'].tolist()
      [[False, False, True, True]]
    """
    core.check_integer("m", m, 1)
    core.check_integer("n", n, 1, m)

    def cut(kernel):
        layers, taps, c, o = kernel.known_sizes()
        _check_divides("m", m, "C", c, kernel)
        return (layers, taps, c // m, m, o), (0, 1, 2, 4, 3), (-1, m, 1)

    return _within_kernels(f"n_m({n}, {m})", kernels, cut, max_sparsity=1 - n / m)


def blocks(
    kernels: Kernels, bc: int, bo: int, reduce: str = "sum", at_least: int = 0
) -> Granularity:
    """Blocks of `bc` input by `bo` output channels leave as a whole, at each place of a kernel.

    S. Narang, E. Undersander, G. Diamos, Block-Sparse Recurrent Neural Networks
    (arXiv 1711.02782). Of equal scores the block kept is the first in (H, W, C/bc, O/bo).

    Args:
      kernels: As for `n_m`.
      bc: Input channels of a block; must divide C.
      bo: Output channels of a block; must divide O.
      reduce: 'sum', 'mean', 'max' or 'l2' of the scores in a block.
      at_least: Blocks that each leaf keeps whatever the sparsity.

    Raises:
      ValueError: If a size is below 1, or `reduce` unknown. From `masks`, if a block does not
        divide a kernel (no part of a block is a unit, so exempt the path), or what is scored is no
        kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> from hybrid_jax.pruning import masks
      >>> params = {'w': jnp.array([[9.0, 0.0, 3.0, 4.0]])}  # C = 1, O = 4
      >>> kernels = core.trace(lambda p, x: x @ p['w'], params, jnp.ones((1, 1))).kernels
      >>> masks(params, 0.5, blocks(kernels, 1, 2))['w'].tolist()  # 9 + 0 and 3 + 4
      [[True, True, False, False]]
    """
    core.check_integer("bc", bc, 1)
    core.check_integer("bo", bo, 1)

    def cut(kernel):
        layers, taps, c, o = kernel.known_sizes()
        _check_divides("bc", bc, "C", c, kernel)
        _check_divides("bo", bo, "O", o, kernel)
        dims = layers, taps, c // bc, bc, o // bo, bo
        return dims, (0, 1, 2, 4, 3, 5), (1, -1, bc * bo)

    return _within_kernels(f"blocks({bc}, {bo})", kernels, cut, reduce, at_least=at_least)


def kernels(kernels: Kernels, reduce: str = "sum", at_least: int = 0) -> Granularity:
    """The H×W kernel of one input and one output channel leaves as a whole.

    In a dense layer, or one of 1×1 convolutions, this is a single weight. H. Mao et al.,
    Exploring the Regularity of Sparse Structure in Convolutional Neural Networks
    (arXiv 1705.08922).

    Args:
      kernels: As for `n_m`.
      reduce: 'sum', 'mean', 'max' or 'l2' of the scores in a kernel. Under `global_`, where
        kernels of several sizes compete, a sum favours the large ones.
      at_least: Kernels that each leaf keeps whatever the sparsity.

    Raises:
      ValueError: If `reduce` is unknown. From `masks`, if what is scored is no kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> from hybrid_jax.pruning import masks
      >>> params = {'w': jnp.array([[[[1.0, 3.0]]], [[[5.0, 0.0]]]])}  # O = 2, C = H = 1, W = 2
      >>> fn = lambda params, x: jax.lax.conv(x, params['w'], (1, 1), 'SAME')
      >>> known = core.trace(fn, params, jnp.ones((1, 1, 2, 2))).kernels
      >>> masks(params, 0.5, kernels(known))['w'][:, 0, 0].tolist()  # 1 + 3 and 5 + 0
      [[False, False], [True, True]]
    """

    def cut(kernel):
        sizes = kernel.known_sizes()
        return sizes, (0, 2, 3, 1), (1, -1, sizes[1])

    return _within_kernels("kernels", kernels, cut, reduce, at_least=at_least)


def _within_kernels(
    name: str,
    kernels: Kernels,
    cut: Callable[[core.Kernel], tuple[tuple[int, ...], tuple[int, ...], tuple[int, int, int]]],
    reduce: str = "sum",
    at_least: int = 0,
    **attributes: Any,
) -> Granularity:
    """The granularity whose units are parts of a kernel in the form (L, T, C, O).

    `cut(kernel) -> (dims, order, view)`: reshaped to `dims`, its axes transposed to `order`, and
    reshaped to `view` that form is (rows, n, weights of a unit).
    """

    def known(path):
        if path not in kernels:
            raise ValueError(
                f"scores must be of kernels with {name}, got some at {path!r}, expected at: "
                f"{', '.join(kernels) or 'none'}"
            )
        return kernels[path], *cut(kernels[path])

    def arrange(path, leaf):
        kernel, dims, order, view = known(path)
        return kernel.canonical(leaf).reshape(dims).transpose(order).reshape(view)

    def restore(path, weights, shape):
        kernel, dims, order, _ = known(path)
        moved = weights.reshape([dims[axis] for axis in order])
        return kernel.restore(moved.transpose(np.argsort(order)))

    return _within_leaves(name, arrange, restore, reduce, at_least, **attributes)


def _within_leaves(
    name: str,
    arrange: Callable[[str, jax.Array], jax.Array],
    restore: Callable[[str, jax.Array, tuple[int, ...]], jax.Array],
    reduce: str = "sum",
    at_least: int = 0,
    **attributes: Any,
) -> Granularity:
    """The granularity whose units are parts of one leaf.

    `arrange(path, leaf)` is (rows, n, weights of a unit), and `restore(path, it, shape)` the leaf.
    """
    core.check_choice("reduce", reduce, REDUCTIONS)
    core.check_integer("at_least", at_least, 0)

    def units(path, leaf):
        return REDUCTIONS[reduce](arrange(path, leaf))

    def mask(path, kept, shape):
        size = math.prod(shape) // kept.size
        xp = kept.__array_namespace__()
        return restore(path, xp.broadcast_to(kept[..., None], (*kept.shape, size)), shape)

    return Granularity(
        name,
        lambda leaves: {p: p for p, leaf in leaves.items() if not core.is_masked_node(leaf)},
        split=lambda leaves, names: {path: units(path, leaves[path]) for path in names},
        merge=lambda kept, leaves: {p: mask(p, x, leaves[p].shape) for p, x in kept.items()},
        at_least=at_least,
        **attributes,
    )


def _check_divides(name: str, size: int, axis: str, length: int, kernel: core.Kernel) -> None:
    if length % size:
        raise ValueError(
            f"{name} must divide {axis} = {length} of {kernel.path!r} with shape {kernel.shape}, "
            f"got {size}; exempt the path or choose another {name}"
        )
