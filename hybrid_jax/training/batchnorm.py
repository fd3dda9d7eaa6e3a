"""Re-estimation of BatchNorm's running statistics: after pruning or quantization they are wrong."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core
from hybrid_jax.training.losses import Forward

Statistics = dict[str, tuple[Any, Any]]
"""Mean and variance (C,) of each layer."""

# As old statistics, far above any batch's own: the update then shows the momentum. A power of two
# divides out exactly.
_PROBE = 2.0**20


def reestimate_batchnorm(
    forward: Forward,
    params: Any,
    state: Any,
    batches: Iterable[jax.Array],
    key: jax.Array | None = None,
) -> Any:
    """Replaces running statistics by those of the population of `batches`.

    mean = E[mean_B], var = E[var_B + mean_B²] - E[mean_B]², each batch weighed by its size. So they
    are the moments of all images together, as a layer sees them when the layers before it normalize
    by their batch. A running average has seen old weights and forgets early batches; this has not.

    The statistics are the leaves of `state` whose paths end in 'mean' and 'var' side by side, as
    in Linen and NNX; all others stay. A batch's own statistics are read off one update
    new = m old + (1 - m) statistic, whatever the momentum m of the model.

    Source: Wu and Johnson, Rethinking "Batch" in BatchNorm, arXiv 2105.07576, section 3.

    `forward`, (params, state, images, key) -> (logits, new_state), is in training mode; for a stack
    of experts map it over the leading axis E first. Batches are images (B, H, W, C), normalized and
    augmented as `forward` expects, which is compiled for each B. Each gets a key of its own from
    `key`, for what draws in training mode, such as dropout.

    Returns:
      `state`, with new statistics, which are summed in float32 whatever their dtype.

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
    layers = _layers(state)

    @jax.jit
    def update(params: Any, old: float, images: jax.Array, key: jax.Array | None) -> Statistics:
        start = _replace(state, {layer: (old, old) for layer in layers}, wide=True)
        new = core.flatten_paths(forward(params, start, images, key)[1])
        moved = {layer: (new[f"{layer}mean"], new[f"{layer}var"]) for layer in layers}
        return jax.tree.map(core.widen, moved)

    total, rate, seen = None, None, 0
    for count, (images,) in enumerate(core.check_batches((batch,) for batch in batches), 1):
        batch_key = None if key is None else jax.random.fold_in(key, count)
        seen += len(images)
        moved = update(params, 0.0, images, batch_key)
        if rate is None:
            rate = _rate(moved, update(params, _PROBE, images, batch_key))
            total = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), moved)
        total = _accumulate(total, moved, rate, np.float32(len(images) / seen))
    return _replace(state, total)


@jax.jit
def _accumulate(
    total: Statistics, moved: Statistics, rate: Statistics, share: jax.Array
) -> Statistics:
    """Pools a batch that has this share of all images so far, without cancellation."""

    def layer(old: tuple, new: tuple) -> tuple:
        (old_mean, old_var), (batch_mean, batch_var) = old, new
        mean = old_mean + share * (batch_mean - old_mean)
        spread = (batch_mean - old_mean) * (batch_mean - mean)
        return mean, old_var + share * (batch_var + spread - old_var)

    batch = jax.tree.map(jnp.divide, moved, rate)
    return {path: layer(total[path], batch[path]) for path in total}


def _rate(from_zero: Statistics, from_probe: Statistics) -> Statistics:
    """1 - m, from two updates that differ in the old statistics alone."""
    seen = jax.device_get((from_zero, from_probe))
    rate = jax.tree.map(lambda a, b: (a.dtype.type(_PROBE) - (b - a)) / a.dtype.type(_PROBE), *seen)
    for layer, values in rate.items():
        if not all((value > 0).all() for value in values):
            raise ValueError(
                f"forward must update the running statistics of {layer!r}, got them back as they "
                "were; is it in training mode?"
            )
    return rate


def _layers(state: Any) -> list[str]:
    """Prefixes p, such as 'batch_stats/bn1/', with both leaves p + 'mean' and p + 'var'."""
    paths = core.flatten_paths(state)
    means = [path.removesuffix("mean") for path in paths if f"/{path}".endswith("/mean")]
    layers = [prefix for prefix in means if f"{prefix}var" in paths]
    if not layers:
        raise ValueError(f"state must hold running statistics '…/mean' and '…/var', got {[*paths]}")
    return layers


def _replace(state: Any, statistics: Statistics, wide: bool = False) -> Any:
    """`wide`: in float32 or wider, for a narrower state rounds away what is read off an update."""
    new = {f"{layer}mean": mean for layer, (mean, _) in statistics.items()}
    new |= {f"{layer}var": var for layer, (_, var) in statistics.items()}

    def leaf(path: str, old: jax.Array) -> jax.Array:
        if path not in new:
            return old
        dtype = core.widen(old).dtype if wide else old.dtype
        return jnp.broadcast_to(jnp.asarray(new[path], dtype), old.shape)

    return core.map_with_path(leaf, state)
