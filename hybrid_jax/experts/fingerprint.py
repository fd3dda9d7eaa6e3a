"""Which experts a gate was fitted to: a gate over experts that have changed since is wrong."""

from typing import Any

from hybrid_jax import core


def fingerprint(experts: Any) -> str:
    """Twelve hexadecimal digits that change with any bit of the experts; to be kept with a gate."""
    return core.digest(experts)[:12]


def check_fitted(fitted_to: str, experts: Any) -> None:
    """Raises ValueError unless the gate was fitted to experts of this `fingerprint`."""
    ours = fingerprint(experts)
    if fitted_to != ours:
        raise ValueError(
            f"gate must be fitted to the experts {ours}, got {fitted_to}: fit it again"
        )
