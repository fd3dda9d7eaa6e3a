"""Granularities: which weights of a leaf compete for being kept."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from hybrid_jax import core


@dataclasses.dataclass(frozen=True)
class Granularity:
    """A leaf seen as rows of units, and back.

    Units of a row compete with each other; every row loses equally many.

    Attributes:
      name: How errors call it.
      split: `split(path, leaf) -> (rows, units)`.
      merge: `merge(path, rows, shape) -> leaf`, the inverse of `split` on the mask.
      max_sparsity: The largest fraction a row may lose.
    """

    name: str
    split: Callable[[str, jax.Array], jax.Array]
    merge: Callable[[str, jax.Array, tuple[int, ...]], jax.Array]
    max_sparsity: float = 1.0


def unstructured() -> Granularity:
    """Every weight is a unit of its own, in one row for the whole leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> unstructured().split('kernel', jnp.zeros((3, 3, 8, 16))).shape
      (1, 1152)
    """
    return Granularity(
        name="unstructured",
        split=lambda path, leaf: leaf.reshape(1, -1),
        merge=lambda path, rows, shape: rows.reshape(shape),
    )


def n_m(n: int, m: int, axis: int | Mapping[str, int] = -2) -> Granularity:
    """At least `n` of every `m` consecutive weights along the contracted axis are kept.

    Every block of m loses floor(sparsity · m + ½) weights: exactly m − n at sparsity 1 − n/m,
    fewer on the way there with a schedule. A. Mishra et al., Accelerating Sparse Deep Neural
    Networks (arXiv 2104.08378).

    Args:
      n: Weights kept of each block, from 1.
      m: Length of a block; must divide the axis.
      axis: The contracted axis: −2 is C of kernels (H, W, C, O) and (C, O). For other layouts
        {path: axis}.

    Raises:
      ValueError: If `n` is not in [1, m]. From `masks`, if `m` does not divide the axis of a
        leaf, or `axis` is none of its axes.

    Example:
      >>> import jax.numpy as jnp
      >>> n_m(2, 4).split('kernel', jnp.zeros((3, 3, 8, 16))).shape  # 3·3·16·8/4 blocks
      (288, 4)
    """
    core.check_integer("m", m, 1)
    core.check_integer("n", n, 1, m)

    def moved_axis(path, shape):
        given = axis[path] if isinstance(axis, Mapping) and path in axis else axis
        if not isinstance(given, int) or not -len(shape) <= given < len(shape):
            raise ValueError(
                f"axis must be the contracted axis of {path!r} with shape {shape}, got {given!r}"
            )
        if shape[given] % m:
            raise ValueError(
                f"m must divide axis {given} of {path!r} with shape {shape}, got {m}; "
                "exempt the path or choose another m"
            )
        return given % len(shape)

    def split(path, leaf):
        return jnp.moveaxis(leaf, moved_axis(path, leaf.shape), -1).reshape(-1, m)

    def merge(path, rows, shape):
        along = moved_axis(path, shape)
        last = (*shape[:along], *shape[along + 1 :], shape[along])
        return jnp.moveaxis(rows.reshape(last), -1, along)

    return Granularity(f"n_m({n}, {m})", split, merge, max_sparsity=1 - n / m)
