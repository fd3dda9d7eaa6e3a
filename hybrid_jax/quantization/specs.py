"""What is quantized and how: one specification per site, made from a graph and rules."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax import core
from hybrid_jax.quantization import grids, observers
from hybrid_jax.quantization.learning import LEARNING
from hybrid_jax.quantization.schemes import SCHEMES, power_of_two

ROLES = ("weight", "activation")


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How one tensor is quantized.

    Attributes:
      bits: 2 to 8 for 'symmetric', 1 to 8 for 'affine', 1 for 'binary', 8 for 'e4m3' and 'e5m2'; or
        32 for off.
      scheme: 'symmetric' (signed, narrow, zero point 0; ternary at 2 bits), 'affine' (unsigned,
        with zero point), 'binary' (signs, for kernels that are not pruned: it has no zero), or the
        8-bit floats 'e4m3' and 'e5m2'.
      per_channel: One range per output channel, rather than one for the tensor.
      learning: Where the range comes from, of `LEARNING`: 'lsq' and 'pact' start from the
        calibrated one and learn it, each by its gradient; 'fixed' keeps the calibrated one;
        'dynamic' takes that of the tensor at every call, and needs no calibration.
      group: One range for so many consecutive weights of an output channel, in the order of
        `core.kernel_matrix`; None for all of them.
      power_of_two: Whether the scale is rounded up to a power of two.
      method: How the range is found, of `observers.METHODS`. None takes what `calibrate` is given,
        or 'minmax' if 'dynamic'; for 'binary' it is 'mean_abs'.

    'pact', whose gradient is that of clipping at the range's own ends, needs 'affine' and no
    rounded scale; 'lsq' gives no gradient beyond the ends, which for 'binary' are its values; a
    `group` is one of a channel.
    """

    bits: int = 8
    scheme: str = "symmetric"
    per_channel: bool = False
    learning: str = "lsq"
    group: int | None = None
    power_of_two: bool = False
    method: str | None = None

    def __post_init__(self):
        core.check_choice("scheme", self.scheme, SCHEMES)
        core.check_choice("learning", self.learning, LEARNING)
        core.check_integer("bits", self.bits)
        self.check_bits("bits", self.bits)
        own = LEARNING[self.learning]
        core.check_choice(f"scheme with learning {self.learning!r}", self.scheme, own.schemes)
        if self.power_of_two and not own.rounded:
            raise ValueError(
                f"power_of_two must be False with learning {self.learning!r}, got True"
            )
        if self.group is not None:
            core.check_integer("group", self.group, 1)
            if not self.per_channel:
                raise ValueError(f"per_channel must be True with a group, got group {self.group}")
        if self.method is not None:
            core.check_choice("method", self.method, observers.METHODS)
        elif self.scheme == "binary":
            object.__setattr__(self, "method", "mean_abs")

    @property
    def dynamic(self) -> bool:
        """Whether the range is that of the tensor at every call."""
        return LEARNING[self.learning].dynamic

    def check_bits(self, name: str, bits: Any) -> Any:
        """Returns `bits` if the scheme has it, as `grids.check_bits` does."""
        return grids.check_bits(name, bits, SCHEMES[self.scheme].bits)

    def grid(self, span: grids.Range, bits: jax.Array | int | None = None) -> grids.Grid:
        """The grid of this scheme over `span`, at `bits` or else at the bits stated here.

        Ranges are float32: those of float64, as of JAX with 64 bits, are rounded to it.
        """
        span = grids.Range(
            *(jnp.asarray(end, jnp.float32) if _is_wide(end) else end for end in span)
        )
        grid = SCHEMES[self.scheme].grid(span, self.bits if bits is None else bits)
        return power_of_two(grid) if self.power_of_two else grid

    def range_of(
        self, x: jax.Array, shape: tuple[int, ...], bits: jax.Array | int | None = None
    ) -> grids.Range:
        """The range of that shape that its method, or else 'minmax', finds for `x` alone."""
        watch = observers.observer(self.method or "minmax")
        states = observers.observe(watch, x, shape)
        return observers.conclude(
            watch, states, shape, self.grid, self.bits if bits is None else bits
        )


@dataclasses.dataclass(frozen=True)
class SiteSpec:
    """How the kernel and the input activation of one site are quantized.

    An activation is never per channel: the sum over input channels is an integer sum only if they
    have one scale. Nor is it binary: padding needs a zero.
    """

    name: str
    weight: Quantizer
    activation: Quantizer

    def __post_init__(self):
        if self.activation.per_channel:
            raise ValueError(f"activation must be per tensor, got per channel for {self.name!r}")
        if self.activation.scheme == "binary":
            raise ValueError(f"activation must have a zero, got scheme 'binary' for {self.name!r}")


@dataclasses.dataclass(frozen=True)
class Spec:
    """How each site of a model is quantized, in the order in which they run."""

    sites: tuple[SiteSpec, ...]

    def __getitem__(self, name: str) -> SiteSpec:
        for own in self.sites:
            if own.name == name:
                return own
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
            site.name: {role: jnp.int32(getattr(site, role).bits) for role in ROLES}
            for site in self.sites
        }


def spec(
    graph: core.Graph,
    rules: Iterable[tuple[str, Mapping[str, Quantizer | int]]] | None = None,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    first_last_bits: int = 8,
    weight_learning: str = "lsq",
    activation_learning: str = "lsq",
) -> Spec:
    """Says for every site of `graph` how it is quantized.

    Unless a rule says otherwise, kernels are symmetric per output channel and activations affine
    per tensor (which is plain unsigned where nothing is negative), with ranges learned as
    `weight_learning` and `activation_learning` say; the first and the last site have at least
    `first_last_bits`. A kernel used at several sites has one quantizer, and a range at each.
    `rules` are (pattern on the site's name, what differs) pairs, of which the first match counts:
    {'weight', 'activation' or both: bits, or a whole `Quantizer`}.

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
        grids.check_bits(f"{name}_bits", bits, range(1 if name == "activation" else 2, 9))
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
            weight = Quantizer(weight, "symmetric", per_channel=True, learning=weight_learning)
        if not isinstance(activation, Quantizer):
            activation = Quantizer(activation, "affine", learning=activation_learning)
        range_shape(site, weight)
        sites.append(SiteSpec(site.name, weight, activation))
    _check_shared(graph, sites)
    return Spec(tuple(sites))


def range_shape(site: core.Site, quantizer: Quantizer) -> tuple[int, ...]:
    """The shape of the range of a site's kernel: () or of the kernel's rank.

    A quantizer's group has to cut the kernel into blocks: from the last axis that is summed over to
    the first, it divides the axis, or is a multiple of it.

    Example:
      >>> fn = lambda params, x: x @ params['w']
      >>> site = core.trace(fn, {'w': jnp.ones((8, 3))}, jnp.ones((1, 8))).sites[0]
      >>> range_shape(site, Quantizer(4)), range_shape(site, Quantizer(4, per_channel=True))
      ((), (1, 3))
      >>> range_shape(site, Quantizer(4, per_channel=True, group=4))
      (2, 3)
    """
    if not quantizer.per_channel:
        return ()
    inner = site.kernel_in_axes
    shape = [1 if axis in inner else n for axis, n in enumerate(site.kernel_shape)]
    left = quantizer.group or 1
    for axis in reversed(inner) if quantizer.group else ():
        n = site.kernel_shape[axis]
        block = n if left % n == 0 else left
        if n % block:
            break
        shape[axis], left = n // block, left // block
    if left > 1:
        sizes = tuple(site.kernel_shape[axis] for axis in inner)
        raise ValueError(
            f"group must divide the summed axes {sizes} of {site.name!r} into blocks, "
            f"got {quantizer.group}"
        )
    return tuple(shape)


def kernel_range_shape(shape: tuple[int, ...], quantizer: Quantizer) -> tuple[int, ...]:
    """The shape of the range of a program's kernel (…, O)."""
    return (*(1 for _ in shape[1:]), shape[-1]) if quantizer.per_channel else ()


def apply(
    x: jax.Array,
    quantizer: Quantizer,
    span: grids.Range | None,
    bits: jax.Array | int,
    shape: tuple[int, ...],
    count: int,
    key: jax.Array | None = None,
) -> jax.Array:
    """Fake-quantizes one tensor as its quantizer says.

    `span` is its range, None where it is 'dynamic', and then of `shape`. `bits` may be traced, and
    32 returns `x` to the bit. `count` says how many values share a scale, for the gradient of LSQ;
    with a random `key` it is rounded stochastically.
    """
    if isinstance(bits, int) and bits == grids.OFF:
        return x
    if quantizer.dynamic:
        span = quantizer.range_of(x, shape, bits)
    y = LEARNING[quantizer.learning].quantize(x, quantizer, span, bits, count, key)
    return y if isinstance(bits, int) else jnp.where(bits == grids.OFF, x, y)


def _is_wide(end: Any) -> bool:
    return isinstance(end, jax.Array) and end.dtype == jnp.float64


def _check_shared(graph: core.Graph, sites: list[SiteSpec]) -> None:
    first: dict[str, SiteSpec] = {}
    for path, site in zip((site.path for site in graph.sites), sites, strict=True):
        other = first.setdefault(path, site)
        if other.weight != site.weight:
            raise ValueError(
                f"sites that share kernel {path!r} must quantize it alike, "
                f"got {other.weight} at {other.name!r} and {site.weight} at {site.name!r}"
            )
