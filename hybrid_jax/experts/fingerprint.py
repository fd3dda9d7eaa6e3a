"""Which experts a gate was fitted to: a gate over experts that have changed since is wrong."""

import hashlib
from typing import Any

import jax
import numpy as np

from hybrid_jax import core


def fingerprint(experts: Any) -> str:
    """Twelve hexadecimal digits that change with any bit of the experts; to be kept with a gate.

    Args:
      experts: Pytree of concrete arrays, a stack or a list of experts.

    Example:
      >>> fingerprint({'w': np.zeros((2, 3), np.float32)})
      '16bff1756c96'
      >>> fingerprint({'w': np.zeros((3, 2), np.float32)})
      'f00d4e1f06ea'
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(core.flatten_paths(jax.device_get(experts)).items()):
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{path} {leaf.dtype} {leaf.shape} ".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()[:12]


def check_fitted(fitted_to: str, experts: Any) -> None:
    """Raises unless a gate was fitted to these experts.

    Args:
      fitted_to: `fingerprint` of the experts that it was fitted to.
      experts: Those that it is to choose from.

    Raises:
      ValueError: If they are others.

    Example:
      >>> experts = {'w': np.zeros((2, 3))}
      >>> fitted_to = fingerprint(experts)
      >>> check_fitted(fitted_to, experts)
      >>> check_fitted(fitted_to, {'w': np.ones((2, 3))})
      Traceback (most recent call last):
      ...
      ValueError: gate must be fitted to the experts 4a5486f1edcd, got 162cb2b4d264: fit it again
    """
    ours = fingerprint(experts)
    if fitted_to != ours:
        raise ValueError(
            f"gate must be fitted to the experts {ours}, got {fitted_to}: fit it again"
        )
