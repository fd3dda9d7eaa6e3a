"""What is given for each site and role, ranges and bits: looked up, and checked where known."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from hybrid_jax import core
from hybrid_jax.quantization import grids, specs


def entry(argument: str, tree: Mapping[str, Mapping[str, Any]], name: str, role: str) -> Any:
    """tree[name][role], of the argument of that name."""
    try:
        return tree[name][role]
    except (KeyError, TypeError):
        given = ", ".join(tree or ()) or "nothing"
        raise ValueError(f"{argument} must have [{name!r}][{role!r}], got {given}") from None


def range_at(
    ranges: Mapping[str, Any], name: str, role: str, shape: tuple[int, ...] | None = None
) -> grids.Range:
    """The range of a site, edge or kernel, the one way by which ranges are taken from an argument.

    An end beyond zero counts as zero on every grid, so that [0.2, 0.1] is [0, 0.1]; but where
    nothing is left between the ends, as in [0, −0.1], the range was learned past zero or is wrong.

    `shape` is the tensor's, which the range must cut into blocks, see `Range`; () for a range that
    must be (), and None for any. Traced ends are not looked at.
    """
    span, where = entry("ranges", ranges, name, role), f"ranges[{name!r}][{role!r}]"
    for end in span if shape is not None else ():
        given = np.shape(end)
        if given and (len(given) != len(shape) or any(n % m for m, n in zip(given, shape))):
            raise ValueError(
                f"{where} must have ends of shape (), or of one that divides {shape}, got {given}"
            )
    if not any(isinstance(end, jax.core.Tracer) for end in span):
        low, high = known = grids.Range(*(np.asarray(end, np.float32) for end in span))
        core.check_finite(where, known._asdict())
        empty = (low > high) & (low >= 0) & (high <= 0)
        if empty.any():
            raise ValueError(
                f"{where} must have low ≤ high, got low {low[empty][0]} and high {high[empty][0]}"
            )
    return span


def range_of(
    spec: specs.Spec, ranges: Mapping[str, Any], site: core.Site, role: str
) -> grids.Range | None:
    """The range, perhaps a shared one, of the kernel or input of a site; None if 'dynamic'."""
    own = spec[site.name]
    if getattr(own, role).dynamic:
        return None
    shape = site.kernel_shape if role == "weight" else ()
    return range_at(ranges, own.name, role, shape)
