"""What every criterion shares: which leaves are scored, and in what."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_jax import core


def prunable(leaf: Any) -> bool:
    """Whether a leaf is a kernel: floating, of rank 2 or more."""
    if core.is_masked_node(leaf):
        return False
    return jnp.ndim(leaf) >= 2 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def score(f: Callable[..., jax.Array], params: Any, *rest: Any) -> Any:
    """Maps `f` over the prunable leaves (and those of `rest`) in float32.

    Where a leaf is not prunable, or one of `rest` holds `optax.MaskedNode()`, so does the result.

    Raises:
      ValueError: If `params` has nothing to prune.
    """

    def leaf_score(path, leaf, *others):
        del path
        if not prunable(leaf) or any(map(core.is_masked_node, others)):
            return optax.MaskedNode()
        floats = (
            x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in others
        )
        return f(leaf.astype(jnp.float32), *floats)

    paths = core.flatten_paths(params)
    if not any(map(prunable, paths.values())):
        raise ValueError(
            "params must have a floating leaf of rank 2 or more to prune, "
            f"got only: {', '.join(paths) or 'no leaves'}"
        )
    return core.map_with_path(leaf_score, params, *rest)


def check_statistics(name: str, params: Any, statistics: Any) -> None:
    """Raises unless `statistics` have the paths and shapes of `params`, or `MaskedNode` there.

    Raises:
      ValueError: Names the first path that differs, and how.
    """
    expected, got = core.flatten_paths(params), core.flatten_paths(statistics)
    for path in [*expected, *got]:
        if path not in expected or path not in got:
            where = "statistics" if path in got else "params"
            raise ValueError(f"{name} must have the paths of params, got {path!r} in {where} only")
        if any(map(core.is_masked_node, (expected[path], got[path]))):
            continue
        if np.shape(expected[path]) != np.shape(got[path]):
            raise ValueError(
                f"{name} must have shape {np.shape(expected[path])} at {path!r}, "
                f"got {np.shape(got[path])}"
            )
