"""Learned bits: a bit-width between two integers is a mixture of the two, and has a gradient."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_jax import core
from hybrid_jax.quantization import allocation, specs
from hybrid_jax.quantization.lookup import range_of
from hybrid_jax.quantization.specs import ROLES

FEWEST, MOST = 2, 8


def fractional(fn: Callable[..., Any], spec: specs.Spec) -> Callable[..., Any]:
    """The model quantized at bit-widths that are real numbers, and learned.

    At b bits, with f = b − ⌊b⌋ and Q_k the fake-quantization at k bits,

        x̂ = (1 − f) · Q_⌊b⌋(x) + f · Q_⌊b⌋+1(x)        ∂x̂/∂b = Q_⌊b⌋+1(x) − Q_⌊b⌋(x)

    and ∂x̂/∂x and the gradients of ranges are those of Q_k, mixed alike. At an integer b, x̂ is
    what `fake_quantized` computes. b = 8 counts as 7 + 1. Both grids span the same range.

    q_fn(params, ranges, bits, *inputs) -> outputs takes `ranges` as `calibrate` returns them, and
    `bits` {site name: {'weight': float32 (), 'activation': float32 ()}} in [2, 8], where they have
    to be clipped to after each step.

    Source: Yang and Jin, FracBits: Mixed Precision Quantization via Fractional Bit-Widths, arXiv
    2007.02017.

    Example:
      >>> from hybrid_jax.quantization import grids
      >>> fn = lambda params, x: x @ params['w']
      >>> params, x = {'w': jnp.array([[0.4]])}, jnp.ones((1, 1))
      >>> spec = specs.spec(core.trace(fn, params, x), [('w', {'weight': specs.Quantizer(8)})])
      >>> unit = grids.Range(jnp.float32(0.0), jnp.float32(1.0))
      >>> ranges = {'w': {'weight': unit, 'activation': unit}}
      >>> bits = {'w': {'weight': 2.5, 'activation': 8.0}}
      >>> y = fractional(fn, spec)(params, ranges, bits, x)
      >>> round(float(y[0, 0]), 4)  # 0.4 becomes 0 at 2 bits, 1/3 at 3 bits
      0.1667
    """

    def q_fn(params, ranges, bits, *inputs):
        def rule(site, x, kernel, apply):
            quantizers, learned = spec[site.name], _roles(bits, site.name)
            shape = specs.range_shape(site, quantizers.weight)
            count = kernel.size // math.prod(shape)
            span = range_of(spec, ranges, site, "weight")
            kernel = _mix(kernel, learned["weight"], quantizers.weight, span, shape, count)
            count = max(x.size // x.shape[0], 1)
            span = range_of(spec, ranges, site, "activation")
            x = _mix(x, learned["activation"], quantizers.activation, span, (), count)
            return apply(x, kernel), None

        return core.at_sites(fn, rule)(params, *inputs)[0]

    return q_fn


def bit_operations(graph: core.Graph, bits: Mapping[str, Mapping[str, Any]]) -> jax.Array:
    """BOPs for one example at bits that may be fractional: the penalty to learn them with.

        Σ MACs · weight bits · activation bits, over sites

    `bits` is {site name: {'weight': (), 'activation': ()}} of every site. At integers the result,
    float32 () and differentiable in the bits, is
    `cost.count(graph, None, weight_bits, activation_bits).bops`.
    """
    between = graph.macs - sum(site.macs for site in graph.sites)
    total = jnp.float32(between * 32**2)
    for site in graph.sites:
        roles = _roles(bits, site.name)
        weight, activation = (jnp.asarray(roles[role], jnp.float32) for role in ROLES)
        total += site.macs * weight * activation
    return total


def round_bits(
    bits: Mapping[str, Mapping[str, Any]],
    formula: Any,
    spec: specs.Spec,
    budgets: Mapping[str, int],
    choices: Iterable[int] = range(FEWEST, MOST + 1),
) -> allocation.Allocation:
    """The integers nearest to learned bits within budgets: those with Σ (bits − learned)² least.

    `bits` is {site name: {role: learned bits}}, `choices` are the bit-widths that the device has;
    the rest is what `allocate_bits` takes.
    """
    choices = tuple(choices)
    distance = {
        site: {role: {k: (float(b) - k) ** 2 for k in choices} for role, b in roles.items()}
        for site, roles in bits.items()
    }
    return allocation.allocate_bits(distance, formula, spec, budgets)


def _roles(bits, site):
    roles = bits[core.check_choice("site of bits", site, bits)]
    for role in ROLES:
        core.check_choice(f"role of bits[{site!r}]", role, roles)
    return roles


def _mix(x, b, quantizer, span, shape, count):
    for width in (FEWEST, MOST):
        quantizer.check_bits("bits of a scheme to be learned", width)
    if not isinstance(b, jax.core.Tracer) and not FEWEST <= float(b) <= MOST:
        raise ValueError(f"bits must be in [{FEWEST}, {MOST}], got {b}")
    b = jnp.asarray(b, jnp.float32)
    floor = jnp.clip(lax.stop_gradient(jnp.floor(b)), FEWEST, MOST - 1)
    part, k = (b - floor).astype(x.dtype), floor.astype(jnp.int32)
    lower, upper = (specs.apply(x, quantizer, span, k + i, shape, count) for i in (0, 1))
    return (1 - part) * lower + part * upper
