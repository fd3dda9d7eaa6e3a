"""What costs are asked at, checked: masks, bits of the sites, scales of the kernels."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from hybrid_jax import core

FLOAT_BITS = 32


def kept_counts(graph: core.Graph, masks: Any) -> dict[str, int]:
    """How many entries of each parameter `masks` keep; {path: count}."""
    kept = {path: leaf.size for path, leaf in graph.parameters.items()}
    for path, mask in core.flatten_paths(masks).items():
        if core.is_masked_node(mask):
            continue
        core.check_choice("path of masks", path, kept)
        if np.shape(mask) != graph.parameters[path].shape:
            raise ValueError(
                f"masks must have shape {graph.parameters[path].shape} at {path!r}, "
                f"got {np.shape(mask)}"
            )
        kept[path] = int(np.count_nonzero(np.asarray(mask)))
    return kept


def all_bits(name: str, sites: Iterable[str], bits: Mapping[str, int] | None) -> dict[str, int]:
    """The bits of every site, 32 where `bits` says nothing; the name is for the message."""
    found = dict.fromkeys(sites, FLOAT_BITS)
    for site, value in (bits or {}).items():
        core.check_choice(f"site of {name}", site, found)
        found[site] = core.check_integer(f"{name} of {site!r}", value, 1, FLOAT_BITS)
    return found


def scales_of_kernels(graph: core.Graph, scales: Mapping[str, int] | None) -> dict[str, int]:
    """{path: scales} of the kernels that store another number than one per output channel."""
    paths = {site.name: site.path for site in graph.sites}
    given: dict[str, int] = {}
    for name, value in (scales or {}).items():
        path = paths[core.check_choice("site of scales", name, paths)]
        value = core.check_integer(f"scales of {name!r}", value, 0)
        given[path] = max(value, given.get(path, 0))
    channels: dict[str, int] = {}
    for site in graph.sites:  # A kernel is stored with the channels that its first site has.
        columns = math.prod(site.kernel_shape[axis] for axis in site.kernel_in_axes)
        channels.setdefault(site.path, -(-graph.parameters[site.path].size // max(columns, 1)))
    return {path: n for path, n in given.items() if n != channels[path]}
