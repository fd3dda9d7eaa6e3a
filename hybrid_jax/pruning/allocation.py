"""Allocations: how one sparsity is spread over the leaves of a network.

An allocation is a function `(units, shapes, sparsity) -> kept`: `units` {path: (rows, n) scores}
as a granularity splits the leaves, `shapes` {path: shape of the leaf}, `kept` {path: (rows, n)
bool}. Counts are exact: `removed_count` of what the allocation counts over.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.pruning.selection import keep_best, removed_count

Rows = dict[str, jax.Array]
Allocation = Callable[[Rows, dict[str, tuple[int, ...]], float | jax.Array], Rows]


def uniform() -> Allocation:
    """Every leaf of n units loses floor(sparsity · n + ½) of them.

    Example:
      >>> import jax.numpy as jnp
      >>> uniform()({'a': jnp.array([[3.0, 1.0, 2.0, 4.0]])}, {'a': (4,)}, 0.5)
      {'a': Array([[ True, False, False,  True]], dtype=bool)}
    """

    def allocate(units, shapes, sparsity):
        del shapes

        def keep(rows):
            n = rows.shape[-1]
            return keep_best(rows, n - removed_count(sparsity, n))

        return {path: keep(rows) for path, rows in units.items()}

    return allocate


def global_() -> Allocation:
    """All n units of the network compete, and it loses floor(sparsity · n + ½) of them.

    Scores have to compare between leaves, as those of `taylor`, `fisher` and `lamp` do. Of equal
    scores the earlier leaf is kept.

    Raises:
      ValueError: From `masks`, with a granularity of several rows a leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> units = {'a': jnp.array([[3.0, 1.0]]), 'b': jnp.array([[2.0, 4.0]])}
      >>> global_()(units, {'a': (2,), 'b': (2,)}, 0.25)
      {'a': Array([[ True, False]], dtype=bool), 'b': Array([[ True,  True]], dtype=bool)}
    """

    def allocate(units, shapes, sparsity):
        del shapes
        _check_one_row("global_", units)
        scores = jnp.concatenate([rows[0] for rows in units.values()])
        kept = keep_best(scores, scores.size - removed_count(sparsity, scores.size))
        ends = np.cumsum([rows.size for rows in units.values()])[:-1]
        return {path: part[None] for path, part in zip(units, jnp.split(kept, ends), strict=True)}

    return allocate


def erk() -> Allocation:
    """Keeps in each leaf a fraction in proportion to (sum of its sizes) / (product of its sizes).

    The Erdős–Rényi-Kernel densities of U. Evci et al., Rigging the Lottery (arXiv 1911.11134):
    small leaves stay denser; a leaf that would exceed 1 is dense and the others share what is
    left. The network loses exactly floor(sparsity · n + ½) of its n units, and each leaf keeps
    its share rounded up or down.

    Raises:
      ValueError: From `masks`, with a granularity of several rows a leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> units = {'a': jnp.ones((1, 16)), 'b': jnp.ones((1, 64))}  # (4+4)/16 : (8+8)/64 = 2 : 1
      >>> kept = erk()(units, {'a': (4, 4), 'b': (8, 8)}, 0.7)  # 24 = 8 + 16 are kept
      >>> [int(mask.sum()) for mask in kept.values()]
      [8, 16]
    """

    def allocate(units, shapes, sparsity):
        _check_one_row("erk", units)
        sizes = np.array([rows.size for rows in units.values()])
        raw = np.array([sum(shapes[path]) / np.prod(shapes[path]) for path in units])
        total = int(sizes.sum())
        counts = _erk_counts(raw, sizes, total - removed_count(sparsity, total))
        return {
            path: keep_best(rows, count)
            for (path, rows), count in zip(units.items(), counts, strict=True)
        }

    return allocate


def _erk_counts(raw: np.ndarray, sizes: np.ndarray, kept: jax.Array) -> jax.Array:
    """Splits `kept` units over L leaves as raw · size, no leaf above its size: (L,) int32.

    Row j supposes that the j leaves of largest `raw` are dense. All that does not depend on
    `kept` is worked out here in float64, so that compiled and eager counts are the same.
    """
    order = np.argsort(-raw, kind="stable")
    dense = np.zeros((len(raw), len(raw)), bool)
    for j in range(len(raw)):
        dense[j, order[:j]] = True
    share = np.where(dense, 0.0, raw * sizes)
    share /= share.sum(axis=1, keepdims=True)
    # The first row in which no remaining leaf overflows: the fullest one is the next in order.
    dense_sizes = np.where(dense, sizes, 0)
    capacity = np.array([sizes[i] / share[j, i] for j, i in enumerate(order)])
    left = kept - jnp.asarray(dense_sizes.sum(axis=1), jnp.int32)
    row = jnp.argmax(left.astype(jnp.float32) <= jnp.asarray(capacity, jnp.float32))
    # Differences of rounded-down running totals add up exactly. They are lifted by the error of
    # three float32 roundings, so that a share which is whole is not rounded down.
    running = np.cumsum(share, axis=1)
    finished = running >= 1 - 1e-12
    lifted = jnp.asarray(running * (1 + 2.0**-22), jnp.float32)
    ends = jnp.floor(left[row].astype(jnp.float32) * lifted[row])
    ends = jnp.where(jnp.asarray(finished)[row], left[row], ends.astype(jnp.int32))
    return jnp.diff(ends, prepend=0) + jnp.asarray(dense_sizes, jnp.int32)[row]


def _check_one_row(name: str, units: Rows) -> None:
    for path, rows in units.items():
        if len(rows) > 1:
            raise ValueError(
                f"allocation must be uniform() where every block of a leaf loses equally many "
                f"units, got {name}() with {len(rows)} blocks at {path!r}"
            )
