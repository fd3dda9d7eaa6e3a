"""Allocations: how one sparsity is spread over the rows of units of a network."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from hybrid_jax import core
from hybrid_jax.pruning.granularity import Kernels, Units
from hybrid_jax.pruning.selection import in_steps, keep_best, removed_count, whole_steps


@dataclasses.dataclass(frozen=True)
class Allocation:
    """How many units each leaf, or group of channels, loses; of equal scores the lower index stays.

    `allocate(units, paths, sparsity, at_least) -> kept`, where `units` are {name: (rows, n) scores}
    as a granularity splits them, `paths` {name: path of the kernel}, `kept` {name: (rows, n) bool},
    and a row keeps `at_least` units. `by_row` says that every row loses the same fraction.
    """

    name: str
    allocate: Callable[[Units, dict[str, str], float | jax.Array, int], Units]
    by_row: bool = False


def uniform() -> Allocation:
    """Every row of n units loses floor(sparsity · n + ½) of them."""

    def allocate(units, paths, sparsity, at_least):
        del paths

        def keep(rows):
            n = rows.shape[-1]
            xp, left = rows.__array_namespace__(), n - removed_count(sparsity, n)
            return keep_best(rows, xp.maximum(left, min(at_least, n)))

        return {name: keep(rows) for name, rows in units.items()}

    return Allocation("uniform", allocate, by_row=True)


def global_() -> Allocation:
    """All n units of the network compete, and it loses floor(sparsity · n + ½) of them.

    Scores have to compare between leaves, as those of `taylor`, `fisher` and `lamp` do. Of equal
    scores the earlier leaf is kept, or the group of channels first by name. A leaf of low scores
    may lose every unit, unless its granularity has `at_least=1`; then the others lose more.
    """

    def allocate(units, paths, sparsity, at_least):
        del paths
        sizes = [rows.size for rows in units.values()]
        held = [_hold(rows, at_least).ravel() for rows in units.values()]
        xp = held[0].__array_namespace__()
        scores = xp.concatenate(held)
        least = sum(len(rows) * min(at_least, rows.shape[-1]) for rows in units.values())
        wanted = xp.maximum(scores.size - removed_count(sparsity, scores.size), least)
        parts = xp.split(keep_best(scores, wanted), np.cumsum(sizes)[:-1])
        return {
            name: part.reshape(rows.shape)
            for (name, rows), part in zip(units.items(), parts, strict=True)
        }

    return Allocation("global_", allocate)


def erk(kernels: Kernels) -> Allocation:
    """Keeps in each kernel a fraction in proportion to (sum of its sizes) / (product of its sizes).

    The Erdős–Rényi-Kernel densities of U. Evci et al., Rigging the Lottery (arXiv 1911.11134), with
    the sizes H, W, C and O: small kernels stay denser; one that would exceed 1 is dense and the
    others share what is left. The network loses exactly floor(sparsity · n + ½) of its n units, and
    each leaf keeps its share rounded up or down.

    Example:
      >>> import jax.numpy as jnp
      >>> from hybrid_jax.pruning import masks
      >>> params = {'a': jnp.ones((4, 4)), 'b': jnp.ones((8, 8))}  # (4+4)/16 : (8+8)/64 = 2 : 1
      >>> fn = lambda p, x: (x[:, :4] @ p['a'], x @ p['b'])
      >>> kernels = core.trace(fn, params, jnp.ones((1, 8))).kernels
      >>> kept = masks(params, 0.7, allocation=erk(kernels))  # 24 = 8 + 16 are kept
      >>> [int(mask.sum()) for mask in kept.values()]
      [8, 16]
    """

    def raw_density(path):
        if path not in kernels:
            raise ValueError(
                f"scores must be of kernels with erk, got some at {path!r}, expected at: "
                f"{', '.join(kernels) or 'none'}"
            )
        _, _, c, o = kernels[path].known_sizes()
        sizes = *kernels[path].taps, c, o
        return sum(sizes) / np.prod(sizes)

    def allocate(units, paths, sparsity, at_least):
        sizes = np.array([rows.size for rows in units.values()])
        raw = np.array([raw_density(paths[name]) for name in units])
        total = int(sizes.sum())
        counts = _erk_counts(raw, sizes, total - removed_count(sparsity, total))
        counts = _lift(counts, sizes, at_least)
        return {
            name: keep_best(rows, count)
            for (name, rows), count in zip(units.items(), counts, strict=True)
        }

    return Allocation("erk", allocate)


ALLOCATIONS: dict[str, Callable[[core.Graph], Allocation]] = {
    "uniform": lambda graph: uniform(),
    "global": lambda graph: global_(),
    "erk": lambda graph: erk(graph.kernels),
}
"""Every allocation by name, for a graph; open to users."""


@np.errstate(over="ignore", invalid="ignore")
def keep_units(
    units: Units,
    paths: dict[str, str],
    sparsity: float | jax.Array,
    allocation: Allocation,
    at_least: int = 0,
    multiple: int = 1,
) -> Units:
    """The units that `allocation` keeps, in whole steps of `multiple`, best units first.

    A step competes with the mean of its scores. A count between two steps goes to the nearest
    (half a step up); a row always keeps its first step.
    """
    if multiple == 1:
        return allocation.allocate(units, paths, sparsity, at_least)
    steps = {name: in_steps(rows, multiple) for name, rows in units.items()}
    kept = allocation.allocate(steps, paths, sparsity, max(at_least, multiple))
    return {name: whole_steps(rows, kept[name], multiple) for name, rows in units.items()}


def _hold(rows: jax.Array, at_least: int) -> jax.Array:
    """Ranks the `at_least` best of each row above all else."""
    if not at_least:
        return rows
    best = keep_best(rows, min(at_least, rows.shape[-1]))
    return rows.__array_namespace__().where(best, np.float32(np.inf), rows)


def _erk_counts(raw: np.ndarray, sizes: np.ndarray, kept: int | jax.Array) -> jax.Array:
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
    xp = core.namespace(kept)
    left = kept - xp.asarray(dense_sizes.sum(axis=1), np.int32)
    row = xp.argmax(left.astype(np.float32) <= xp.asarray(capacity, np.float32))
    # Differences of rounded-down running totals add up exactly. They are lifted by the error of
    # three float32 roundings, so that a share which is whole is not rounded down.
    running = np.cumsum(share, axis=1)
    finished = running >= 1 - 1e-12
    lifted = xp.asarray(running * (1 + 2.0**-22), np.float32)
    ends = xp.floor(left[row].astype(np.float32) * lifted[row])
    ends = xp.where(xp.asarray(finished)[row], left[row], ends.astype(np.int32))
    return xp.diff(ends, prepend=0) + xp.asarray(dense_sizes, np.int32)[row]


def _lift(counts: jax.Array, sizes: np.ndarray, at_least: int) -> jax.Array:
    """Raises counts to `at_least`; the largest leaves pay for it while they have more."""
    xp = counts.__array_namespace__()
    least = np.minimum(sizes, at_least).astype(np.int32)
    lifted = xp.maximum(counts, least)
    order = np.argsort(-sizes, kind="stable")
    spare = (lifted - least)[order]
    owed = (lifted - counts).sum() - (xp.cumsum(spare) - spare)
    return lifted - xp.clip(owed, 0, spare)[np.argsort(order)]
