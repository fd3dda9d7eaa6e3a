"""MACs, BOPs, parameters and bytes of a traced model under masks and bit-widths."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from hybrid_jax import core
from hybrid_jax.cost.memory import peak_activation_bytes
from hybrid_jax.cost.packing import packed_bytes

SCALE_BYTES = 4
FLOAT_BITS = 32


@dataclasses.dataclass(frozen=True)
class SiteCost:
    """What one site costs, for one example.

    Attributes:
      name: The site's name.
      width: Output channels O.
      macs: Multiply-accumulates with kept weights.
      dense_macs: Those that a dense kernel executes, zeros or not.
      parameters: Weights of the kernel.
      nonzero: Weights kept.
      weight_bits: Width of a weight.
      activation_bits: Width of the activation that enters.
      bops: macs × weight_bits × activation_bits.
      bytes: Packed kernel with its scales; 0 where an earlier site has the same kernel.
    """

    name: str
    width: int
    macs: int
    dense_macs: int
    parameters: int
    nonzero: int
    weight_bits: int
    activation_bits: int
    bops: int
    bytes: int

    @property
    def sparsity(self) -> float:
        """Fraction of the weights removed, in [0, 1]."""
        return 1 - self.nonzero / max(self.parameters, 1)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a model costs; operations are for one example.

    Attributes:
      macs: Multiply-accumulates with kept weights, and those of two activations.
      dense_macs: Multiply-accumulates that dense kernels execute, zeros or not.
      bops: Bit operations: sum of MACs × weight bits × activation bits; products of two
        activations count 32 × 32.
      parameters: Trainable parameters: all leaves but Linen's 'batch_stats'.
      nonzero: Parameters kept.
      bytes: Packed bytes of all leaves, 'batch_stats' included.
      peak_activation_bytes: See `cost.peak_activation_bytes`.
      sites: One row for each site, in running order.
    """

    macs: int
    dense_macs: int
    bops: int
    parameters: int
    nonzero: int
    bytes: int
    peak_activation_bytes: int
    sites: tuple[SiteCost, ...]


def count(
    graph: core.Graph,
    masks: Any = None,
    weight_bits: Mapping[str, int] | None = None,
    activation_bits: Mapping[str, int] | None = None,
    scales: Mapping[str, int] | None = None,
) -> Cost:
    """Counts what a model costs.

    A convolution of a kernel H×W×C×O takes H·W·C·O MACs for each output position, padding taps
    included, and a transposed one for each input position; where padding makes more positions than
    there are entries, the entries count. Products of parameters alone, as of a
    spectral norm, are made once and cost an example nothing; additions of biases and normalizations
    are not counted. BOPs as in van Baalen et al., Bayesian Bits (arXiv 2005.07093).

    Args:
      graph: A traced model.
      masks: Pytree like the parameters of True where kept, `MaskedNode` (or whole subtrees
        missing) where nothing is pruned; None prunes nothing.
      weight_bits: {site name: bits} of its kernel; 32 where missing. A kernel of several sites is
        stored at the largest. Below 32 a kernel also stores scales of 4 bytes.
      activation_bits: {site name: bits} of the activation that enters; 32 where missing.
      scales: {site name: how many scales its kernel stores below 32 bits}, as
        `quantization.scale_counts` finds them; one per output channel where missing. A kernel of
        several sites stores the most of theirs.

    Raises:
      ValueError: If a mask has no parameter of its path or another shape, a site is unknown, bits
        are not in [1, 32], or a number of scales is none.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {'kernel': jnp.ones((4, 10)), 'bias': jnp.ones((10,))}
      >>> fn = lambda params, x: x @ params['kernel'] + params['bias'][None]
      >>> graph = core.trace(fn, params, jnp.ones((1, 4)))
      >>> cost = count(graph)
      >>> cost.macs, cost.bops, cost.parameters, cost.bytes
      (40, 40960, 50, 200)
      >>> masks = {'kernel': jnp.arange(40).reshape(4, 10) % 2 == 0}
      >>> cost = count(graph, masks, {'kernel': 8}, {'kernel': 8})
      >>> cost.macs, cost.bops, cost.nonzero  # kernel: bitmap of 5 + 20 bytes, 10 scales; bias
      (20, 1280, 30)
      >>> cost.bytes == (5 + 20) + 10 * 4 + 10 * 4
      True
      >>> count(graph, masks, {'kernel': 8}, {'kernel': 8}, {'kernel': 1}).bytes  # per tensor
      69
    """
    kept = kept_counts(graph, masks)
    names = [site.name for site in graph.sites]
    weight_bits = all_bits("weight_bits", names, weight_bits)
    activation_bits = all_bits("activation_bits", names, activation_bits)
    kernel_bits: dict[str, int] = {}
    for site in graph.sites:
        bits = weight_bits[site.name]
        kernel_bits[site.path] = max(bits, kernel_bits.get(site.path, bits))
    fixed_scales = scales_of_kernels(graph, scales)
    rows, stored = [], {}
    for site in graph.sites:
        size = graph.parameters[site.path].size
        # Every weight of a kernel takes part in equally many MACs.
        macs = site.macs * kept[site.path] // max(size, 1)
        owned = site.path not in stored
        packed = kernel_bytes(
            site, size, kept[site.path], fixed_scales.get(site.path), kernel_bits[site.path]
        )
        stored.setdefault(site.path, packed)
        rows.append(
            SiteCost(
                name=site.name,
                width=_size(site.kernel_shape, site.kernel_out_axes),
                macs=macs,
                dense_macs=site.macs,
                parameters=size,
                nonzero=kept[site.path],
                weight_bits=weight_bits[site.name],
                activation_bits=activation_bits[site.name],
                bops=macs * weight_bits[site.name] * activation_bits[site.name],
                bytes=stored[site.path] if owned else 0,
            )
        )
    for path, leaf in graph.parameters.items():
        stored.setdefault(path, packed_bytes(1, leaf.size, kept[path], FLOAT_BITS))
    trained = [path for path in graph.parameters if not path.startswith("batch_stats/")]
    between_activations = graph.macs - sum(row.dense_macs for row in rows)
    return Cost(
        macs=sum(row.macs for row in rows) + between_activations,
        dense_macs=graph.macs,
        bops=sum(row.bops for row in rows) + between_activations * FLOAT_BITS**2,
        parameters=sum(graph.parameters[path].size for path in trained),
        nonzero=sum(kept[path] for path in trained),
        bytes=sum(stored.values()),
        peak_activation_bytes=peak_activation_bytes(graph, activation_bits),
        sites=tuple(rows),
    )


def kept_counts(graph: core.Graph, masks: Any) -> dict[str, int]:
    """How many entries of each parameter `masks` keep; {path: count}.

    Raises:
      ValueError: If a mask has no parameter of its path or another shape.
    """
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
    """The bits of every site, 32 where `bits` says nothing.

    Raises:
      ValueError: If a site is unknown, or bits are not in [1, 32].
    """
    found = dict.fromkeys(sites, FLOAT_BITS)
    for site, value in (bits or {}).items():
        core.check_choice(f"site of {name}", site, found)
        found[site] = core.check_integer(f"{name} of {site!r}", value, 1, FLOAT_BITS)
    return found


def scales_of_kernels(graph: core.Graph, scales: Mapping[str, int] | None) -> dict[str, int]:
    """{path: scales} of the kernels that store another number than one per output channel.

    Raises:
      ValueError: If a site is unknown, or a number of scales is no integer of at least 0.
    """
    paths = {site.name: site.path for site in graph.sites}
    given: dict[str, int] = {}
    for name, value in (scales or {}).items():
        path = paths[core.check_choice("site of scales", name, paths)]
        value = core.check_integer(f"scales of {name!r}", value, 0)
        given[path] = max(value, given.get(path, 0))
    channels: dict[str, int] = {}
    for site in graph.sites:  # A kernel is stored with the channels that its first site has.
        channels.setdefault(site.path, _rows(site, graph.parameters[site.path].size)[0])
    return {path: n for path, n in given.items() if n != channels[path]}


def kernel_bytes(site: core.Site, size: int, kept: int, scales: int | None, bits: int) -> int:
    """Packed bytes of a kernel of `size` weights, `kept` of them, and below 32 bits its scales.

    There is one for each output channel where `scales` is None.
    """
    channels, columns = _rows(site, size)
    scales = channels if scales is None else scales
    packed = packed_bytes(channels, columns, kept, bits)
    return packed + (SCALE_BYTES * scales if bits < FLOAT_BITS else 0)


def _rows(site: core.Site, size: int) -> tuple[int, int]:
    """Output channels of `size` weights, and the weights of each."""
    columns = max(_size(site.kernel_shape, site.kernel_in_axes), 1)
    return -(-size // columns), columns


def _size(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    return int(np.prod([shape[axis] for axis in axes], dtype=np.int64))
