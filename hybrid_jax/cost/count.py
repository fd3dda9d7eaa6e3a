"""MACs, BOPs, parameters and bytes of a traced model under masks and bit-widths."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from hybrid_jax import core
from hybrid_jax.cost.arguments import kept_counts
from hybrid_jax.cost.formula import formula


@dataclasses.dataclass(frozen=True)
class SiteCost:
    """What one site costs, for one example.

    `width` are output channels O; `macs` are with kept weights, `dense_macs` with zeros too;
    `bytes` are the kernel's in its bits, zeros included, with its scales; 0 where an earlier site
    has the same.
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

    `macs` are with kept weights and of two activations, `dense_macs` with zeros too; `bops` are
    MACs × weight bits × activation bits, 32 × 32 in products of two activations; `parameters` are
    all leaves but Linen's 'batch_stats', `bytes` of all leaves, each without gaps between its
    values.
    """

    macs: int
    dense_macs: int
    bops: int
    parameters: int
    nonzero: int
    bytes: int
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
    there are entries, the entries count. Products of parameters alone cost an example nothing;
    additions of biases and normalizations are not counted. BOPs as in van Baalen et al., Bayesian
    Bits (arXiv 2005.07093).

    `masks`, like the parameters, are True where kept, `MaskedNode` (or whole subtrees missing)
    where nothing is pruned; a zero costs no MAC, but its bytes. By the name of a site are the bits
    of its kernel and of the activation that enters, 32 where missing, and how many scales of 4
    bytes a kernel below 32 bits stores, as `quantization.scale_counts` finds them, one per output
    channel where missing. A kernel of several sites has the largest bits and most scales of theirs.

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
      >>> cost.macs, cost.bops, cost.nonzero, cost.bytes  # 40 weights, 10 scales, 10 biases
      (20, 1280, 30, 120)
      >>> count(graph, masks, {'kernel': 8}, {'kernel': 8}, {'kernel': 1}).bytes  # per tensor
      84
    """
    kept = kept_counts(graph, masks)
    at_full_width = formula(graph, masks, scales, groups=())
    chosen = at_full_width.decisions(None, weight_bits, activation_bits)
    amounts = at_full_width.amounts(chosen)
    macs, bops, stored = (amounts[name][0] for name in ("macs", "bops", "bytes"))
    sizes = {path: leaf.size for path, leaf in graph.parameters.items()}
    left, rows = dict(zip(sizes, stored, strict=True)), []
    for i, site in enumerate(graph.sites):
        rows.append(
            SiteCost(
                name=site.name,
                width=math.prod(site.kernel_shape[axis] for axis in site.kernel_out_axes),
                macs=macs[i],
                dense_macs=site.macs,
                parameters=sizes[site.path],
                nonzero=kept[site.path],
                weight_bits=chosen["weight", site.path],
                activation_bits=chosen["activation", site.name],
                bops=bops[i],
                bytes=left.pop(site.path, 0),
            )
        )
    trained = [path for path in sizes if not path.startswith("batch_stats/")]
    return Cost(
        macs=sum(macs),
        dense_macs=graph.macs,
        bops=sum(bops),
        parameters=sum(sizes[path] for path in trained),
        nonzero=sum(kept[path] for path in trained),
        bytes=sum(stored),
        sites=tuple(rows),
    )
