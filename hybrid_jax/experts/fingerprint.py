"""Which experts a gate was fitted to: a gate over experts that have changed since is wrong."""

import hashlib
from typing import Any

import jax
import numpy as np

from hybrid_jax import core


def fingerprint(experts: Any) -> str:
    """Twelve hexadecimal digits that change with any bit of the experts; to be kept with a gate."""
    digest = hashlib.sha256()
    for path, leaf in sorted(core.flatten_paths(jax.device_get(experts)).items()):
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{path} {leaf.dtype} {leaf.shape} ".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()[:12]


def check_fitted(fitted_to: str, experts: Any) -> None:
    """Raises ValueError unless the gate was fitted to experts of this `fingerprint`."""
    ours = fingerprint(experts)
    if fitted_to != ours:
        raise ValueError(
            f"gate must be fitted to the experts {ours}, got {fitted_to}: fit it again"
        )
