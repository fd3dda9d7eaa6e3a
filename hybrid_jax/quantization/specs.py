"""What is quantized and how: one specification per site, made from a graph and rules."""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from hybrid_jax import core
from hybrid_jax.quantization import gradients, grids

SCHEMES = {"symmetric": grids.symmetric, "affine": grids.affine}
LEARNING = ("lsq", "pact", "fixed", "dynamic")


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How one tensor is quantized.

    Attributes:
      bits: 2 to 8, or 32 for off.
      scheme: 'symmetric' (signed, narrow, zero point 0) or 'affine' (unsigned, with zero point).
      per_channel: One range per output channel, rather than one for the tensor.
      learning: Where the range comes from: 'lsq' and 'pact' start from the calibrated one and learn
        it, each by its gradient; 'fixed' keeps the calibrated one; 'dynamic' takes the least and
        greatest value of the tensor at every call, and needs no calibration.

    Raises:
      ValueError: If a field has none of these values, or 'pact' is not with 'affine'.

    Example:
      >>> Quantizer(bits=4, scheme='affine', learning='pact').per_channel
      False
      >>> Quantizer(bits=12)
      Traceback (most recent call last):
      ...
      ValueError: bits must be 2 to 8, or 32 for off, got 12
    """

    bits: int = 8
    scheme: str = "symmetric"
    per_channel: bool = False
    learning: str = "lsq"

    def __post_init__(self):
        core.check_integer("bits", self.bits)
        grids.check_bits("bits", self.bits)
        core.check_choice("scheme", self.scheme, SCHEMES)
        core.check_choice("learning", self.learning, LEARNING)
        if self.learning == "pact" and self.scheme != "affine":
            raise ValueError(f"scheme must be 'affine' with learning 'pact', got {self.scheme!r}")

    def grid(self, span: grids.Range, bits: jax.Array | int | None = None) -> grids.Grid:
        """The grid of this scheme over `span`, at `bits` or else at the bits stated here."""
        return SCHEMES[self.scheme](span, self.bits if bits is None else bits)


@dataclasses.dataclass(frozen=True)
class SiteSpec:
    """How the kernel and the input activation of one site are quantized.

    Attributes:
      name: The site's name.
      weight: Quantizer of the kernel.
      activation: Quantizer of the input, per tensor.

    Raises:
      ValueError: If the activation is to be quantized per channel: the sum over input channels is
        an integer sum only if they have one scale.
    """

    name: str
    weight: Quantizer
    activation: Quantizer

    def __post_init__(self):
        if self.activation.per_channel:
            raise ValueError(f"activation must be per tensor, got per channel for {self.name!r}")


@dataclasses.dataclass(frozen=True)
class Spec:
    """How each site of a model is quantized, in the order in which they run.

    Attributes:
      sites: A `SiteSpec` per site.
    """

    sites: tuple[SiteSpec, ...]

    def __getitem__(self, name: str) -> SiteSpec:
        for site in self.sites:
            if site.name == name:
                return site
        names = ", ".join(site.name for site in self.sites)
        raise ValueError(f"spec must cover every site, got none for {name!r} among: {names}")

    @property
    def weight_bits(self) -> dict[str, int]:
        """{site name: bits of its kernel}, as `cost.count` takes it."""
        return {site.name: site.weight.bits for site in self.sites}

    @property
    def activation_bits(self) -> dict[str, int]:
        """{site name: bits of its input}, as `cost.count` takes it."""
        return {site.name: site.activation.bits for site in self.sites}

    def bits(self) -> dict[str, dict[str, jax.Array]]:
        """The bit-widths as data: {site name: {'weight': int32 (), 'activation': int32 ()}}."""
        return {
            site.name: {
                "weight": jnp.int32(site.weight.bits),
                "activation": jnp.int32(site.activation.bits),
            }
            for site in self.sites
        }


def spec(
    graph: core.Graph,
    rules: Iterable[tuple[str, Mapping[str, Quantizer | int]]] | None = None,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    first_last_bits: int = 8,
) -> Spec:
    """Says for every site of `graph` how it is quantized.

    Unless a rule says otherwise, kernels are symmetric per output channel and activations affine
    per tensor (which is plain unsigned where nothing is negative), with LSQ ranges. A kernel used
    at several sites has one quantizer, and a range at each.

    Args:
      graph: The traced model.
      rules: (pattern on the site's name, what differs) pairs; the first match wins. What differs is
        a dictionary with 'weight', 'activation' or both: bits, or a whole `Quantizer`.
      weight_bits: Bits of kernels.
      activation_bits: Bits of the inputs of sites.
      first_last_bits: The least bits of the first and of the last site, where no rule matches.

    Returns:
      The specification, static and hashable.

    Raises:
      ValueError: If bits are not 2 to 8 or 32, a rule matches no site or has another key, or sites
        that share a kernel get different quantizers for it.

    Example:
      >>> def mlp(params, x):
      ...     return jax.nn.relu(x @ params['a']) @ params['b'] @ params['c']
      >>> params = {name: jnp.ones((3, 3)) for name in 'abc'}
      >>> graph = core.trace(mlp, params, jnp.ones((1, 3)))
      >>> spec(graph, weight_bits=4).weight_bits
      {'a': 8, 'b': 4, 'c': 8}
      >>> spec(graph, rules=[('a', {'weight': 2})]).weight_bits
      {'a': 2, 'b': 8, 'c': 8}
    """
    default = {"weight": weight_bits, "activation": activation_bits}
    for name, bits in [*default.items(), ("first_last", first_last_bits)]:
        core.check_integer(f"{name}_bits", bits)
        grids.check_bits(f"{name}_bits", bits)
    names = [site.name for site in graph.sites]
    changes = core.match_rules(rules or (), names, default=None)
    sites = []
    for site in graph.sites:
        change = changes[site.name]
        for key in change or ():
            core.check_choice(f"rule for {site.name!r}", key, default)
        wanted = default | dict(change or {})
        if change is None and site.name in (names[0], names[-1]):
            wanted = {key: max(bits, first_last_bits) for key, bits in default.items()}
        weight, activation = wanted["weight"], wanted["activation"]
        if not isinstance(weight, Quantizer):
            weight = Quantizer(weight, "symmetric", per_channel=True)
        if not isinstance(activation, Quantizer):
            activation = Quantizer(activation, "affine")
        sites.append(SiteSpec(site.name, weight, activation))
    _check_shared(graph, sites)
    return Spec(tuple(sites))


def apply(
    x: jax.Array,
    quantizer: Quantizer,
    span: grids.Range | None,
    bits: jax.Array | int,
    axes: tuple[int, ...] | None,
    count: int,
) -> jax.Array:
    """Fake-quantizes one tensor as its quantizer says.

    Args:
      x: Floating-point array.
      quantizer: How.
      span: Its range; None where it is 'dynamic'.
      bits: int or int32 (); may be traced. 32 returns `x` to the bit.
      axes: Axes over which a 'dynamic' range is taken; None for all.
      count: How many values share a scale, for the gradient of LSQ.

    Returns:
      Of the shape and dtype of `x`.

    Example:
      >>> x = jnp.array([0.1, 0.6, 1.0])
      >>> print(apply(x, Quantizer(2, 'symmetric', learning='dynamic'), None, 2, None, 3))
      [0. 1. 1.]
    """
    if isinstance(bits, int) and bits == grids.OFF:
        return x
    if quantizer.learning == "dynamic":
        span = grids.extent(x, axes)
    if quantizer.learning == "lsq":
        y = gradients.lsq(x, quantizer.grid(span, bits), count)
    elif quantizer.learning == "pact":
        y = gradients.pact(x, span, bits)
    else:
        y = gradients.fake_quant(x, quantizer.grid(span, bits))
    return y if isinstance(bits, int) else jnp.where(bits == grids.OFF, x, y)


def _check_shared(graph: core.Graph, sites: list[SiteSpec]) -> None:
    first: dict[str, SiteSpec] = {}
    for path, site in zip((site.path for site in graph.sites), sites, strict=True):
        other = first.setdefault(path, site)
        if other.weight != site.weight:
            raise ValueError(
                f"sites that share kernel {path!r} must quantize it alike, "
                f"got {other.weight} at {other.name!r} and {site.weight} at {site.name!r}"
            )
