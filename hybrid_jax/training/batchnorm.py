"""Re-estimation of BatchNorm's running statistics: after pruning or quantization they are wrong."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core
from hybrid_jax.training.statistics import PROBE, replaced, running_statistics
from hybrid_jax.training.steps import Forward

Leaves = dict[str, Any]


def reestimate_batchnorm(
    forward: Forward,
    params: Any,
    state: Any,
    batches: Iterable[jax.Array],
    key: jax.Array | None = None,
    *,
    statistics: Mapping[str, str | None] | None = None,
) -> Any:
    """Replaces running statistics by those of the population of `batches`, in float32.

    mean = E[mean_B], var = E[var_B + mean_B²] - E[mean_B]², each batch weighed by its size. A
    batch's own are read off one update new = m old + (1 - m) statistic, whatever the momentum m of
    the model. Source: Wu and Johnson, Rethinking "Batch" in BatchNorm, arXiv 2105.07576, section 3.

    `forward`, (params, state, images, key) -> (outputs, new_state), is in training mode, and
    compiled for each B; for a stack of experts map it over the leading axis E first. Batches are
    images (B, H, W, C); each gets a key of its own from `key`. `statistics` says which leaves of
    `state` these are, {path: None of a mean, the path of its mean of a variance}; None asks
    `running_statistics`.

    Example:
      >>> def forward(params, state, x, key):
      ...     old, axes = state['bn'], (0, 1, 2)
      ...     return x, {'bn': {'mean': 0.9 * old['mean'] + 0.1 * x.mean(axes),
      ...                       'var': 0.9 * old['var'] + 0.1 * x.var(axes)}}
      >>> state = {'bn': {'mean': jnp.zeros(1), 'var': jnp.ones(1)}}
      >>> batches = [jnp.full((2, 1, 1, 1), value) for value in (1.0, 3.0)]
      >>> new = reestimate_batchnorm(forward, {}, state, batches)
      >>> new['bn']['mean'].round(4).item(), new['bn']['var'].round(4).item()
      (2.0, 1.0)
    """
    batches = core.check_batches((batch,) for batch in batches)
    first = next(batches)
    if statistics is None:
        statistics = running_statistics(forward, params, state, first[0], key)
    else:
        _check_statistics(statistics, core.flatten_paths(state))

    @jax.jit
    def update(params: Any, old: float, images: jax.Array, key: jax.Array | None) -> Leaves:
        leaves = core.flatten_paths(state)
        # Wide, for a narrower state rounds away what is read off an update.
        start = {path: jnp.full_like(core.widen(leaves[path]), old) for path in statistics}
        new = core.flatten_paths(forward(params, replaced(state, start), images, key)[1])
        return {path: core.widen(new[path]) for path in statistics}

    @jax.jit
    def pool(total: Leaves, moved: Leaves, rate: Leaves, share: jax.Array) -> Leaves:
        """Adds a batch that has this share of all images so far, without cancellation."""
        gap = {path: moved[path] / rate[path] - total[path] for path in total}
        for path, mean in statistics.items():
            if mean is not None:
                gap[path] += (1 - share) * gap[mean] ** 2
        return {path: total[path] + share * gap[path] for path in total}

    total, rate, seen = None, None, 0
    for count, (images,) in enumerate(itertools.chain([first], batches), 1):
        batch_key = None if key is None else jax.random.fold_in(key, count)
        seen += len(images)
        moved = update(params, 0.0, images, batch_key)
        if rate is None:
            rate = _rate(moved, update(params, PROBE, images, batch_key))
            total = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), moved)
        total = pool(total, moved, rate, np.float32(len(images) / seen))
    old = core.flatten_paths(state)
    return replaced(state, {path: leaf.astype(old[path].dtype) for path, leaf in total.items()})


def _rate(from_zero: Leaves, from_probe: Leaves) -> Leaves:
    """1 - m, from two updates that differ in the old statistics alone."""
    seen = jax.device_get((from_zero, from_probe))
    rate = jax.tree.map(lambda a, b: (a.dtype.type(PROBE) - (b - a)) / a.dtype.type(PROBE), *seen)
    for path, values in rate.items():
        if not (values > 0).all():
            raise ValueError(
                f"forward must update the running statistic {path!r}, got it back as it was; "
                "is it in training mode?"
            )
    return rate


def _check_statistics(statistics: Mapping[str, str | None], leaves: Leaves) -> None:
    for path, mean in statistics.items():
        means = [None, *(other for other, role in statistics.items() if role is None)]
        if path not in leaves or mean not in means:
            raise ValueError(
                f"statistics must give None, or the path of a mean, for paths of state, got "
                f"{path!r}: {mean!r}"
            )
        if mean is not None and np.shape(leaves[path]) != np.shape(leaves[mean]):
            raise ValueError(f"statistics must pair equal shapes, got {path!r}: {mean!r}")
