"""Quantizing a whole model at its sites, in floats to train with."""

import collections
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from hybrid_jax import core
from hybrid_jax.quantization import grids, specs
from hybrid_jax.quantization.lookup import entry, range_of


def fake_quantized(fn: Callable[..., Any], spec: specs.Spec) -> Callable[..., Any]:
    """The same model with the kernel and the input of every site quantized.

    `fn` is in training or evaluation mode; `spec`, static, has all of its sites. What a device
    stores between sites, and biases, stay in floats: the last part of training is on the program,
    see `as_deployed`.

    q_fn(params, ranges, *inputs, bits=None, key=None) -> outputs takes `ranges` as `calibrate`
    returns them, and `bits` as `Spec.bits` returns them, traced: one compilation serves all
    bit-widths, and under `vmap` each expert has its own; None takes the spec's, and sites whose
    bits there are 32 are then not touched. With a random `key` every kernel and activation is
    rounded stochastically, by a key of its own (the iterations of a scan share theirs). q_fn is
    differentiable in `params` and `ranges`; pruned weights stay exactly zero, but at a site that is
    'binary'. A site in a custom derivative keeps the gradient that the rule states, in which its
    ranges are not: to train the others `lax.stop_gradient` must be applied to them before they are
    given; if it is not, JAX raises.

    Example:
      >>> import jax.numpy as jnp
      >>> from hybrid_jax.quantization import calibration
      >>> fn = lambda params, x: x @ params['w']
      >>> params, x = {'w': jnp.array([[0.9], [-3.0]])}, jnp.array([[1.0, 7.0]])
      >>> graph = core.trace(fn, params, x)
      >>> spec = specs.spec(graph, rules=[('w', {'weight': 3, 'activation': 32})])
      >>> ranges = calibration.calibrate(fn, params, [(x,)], spec)
      >>> print(fake_quantized(fn, spec)(params, ranges, x))  # steps of 1: 0.9 becomes 1
      [[-20.]]
    """
    order = {site.name: i for i, site in enumerate(spec.sites)}

    def q_fn(params, ranges, *inputs, bits=None, key=None):
        if not isinstance(ranges, Mapping):
            kind = type(ranges).__name__
            raise ValueError(f"ranges must be a mapping, as calibrate returns it, got {kind}")

        def rule(site, x, kernel, apply):
            weight, activation = _choose(spec, ranges, bits, site)
            shape = specs.range_shape(site, weight[0])
            keys = (None, None)
            if key is not None:
                keys = jax.random.split(jax.random.fold_in(key, order[site.name]))
            kernel = specs.apply(kernel, *weight, shape, kernel.size // math.prod(shape), keys[0])
            x = specs.apply(x, *activation, (), max(x.size // x.shape[0], 1), keys[1])
            return apply(x, kernel), None

        return core.at_sites(fn, rule)(params, *inputs)[0]

    return q_fn


def scale_counts(graph: core.Graph, spec: specs.Spec) -> dict[str, int]:
    """How many scales each kernel stores when it is quantized, as `cost.count` takes them.

    It is one for each entry of the kernel's range: one per tensor, one for each output channel, or
    so many for each as there are groups in it. A kernel used at several sites, or in a `scan`, has
    its scales once; a parameter that sites take different parts of has those of all parts. Bits do
    not matter, so that the counts hold for all that `allocate_bits` may choose; at 32 bits `count`
    counts no scale.
    """
    stored: dict[str, int] = collections.Counter()
    for site in graph.sites:
        own = math.prod(specs.range_shape(site, spec[site.name].weight))
        whole = math.prod(site.kernel_shape) == graph.parameters[site.path].size
        stored[site.path] = own if whole else stored[site.path] + own
    return {site.name: stored[site.path] for site in graph.sites}


def _choose(spec, ranges, bits, site):
    """For the kernel and for the activation of a site: its quantizer, range and bits."""
    chosen = []
    for role in specs.ROLES:
        quantizer, span = getattr(spec[site.name], role), None
        width = quantizer.bits if bits is None else entry("bits", bits, site.name, role)
        width = quantizer.check_bits(f"bits of {site.name!r}", width)
        if not (isinstance(width, int) and width == grids.OFF):
            span = range_of(spec, ranges, site, role)
        chosen.append((quantizer, span, width))
    return chosen
