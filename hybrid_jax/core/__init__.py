"""Paths and rules, argument checks, tracing to sites and channels, and the interpreter."""

from hybrid_jax.core.checks import (
    check_choice,
    check_finite,
    check_fraction,
    check_integer,
    check_positive,
    check_same_structure,
)
from hybrid_jax.core.paths import (
    REQUIRED,
    flatten_paths,
    is_masked_node,
    map_with_path,
    match_rules,
    path_string,
)

__all__ = [
    "REQUIRED",
    "check_choice",
    "check_finite",
    "check_fraction",
    "check_integer",
    "check_positive",
    "check_same_structure",
    "flatten_paths",
    "is_masked_node",
    "map_with_path",
    "match_rules",
    "path_string",
]
