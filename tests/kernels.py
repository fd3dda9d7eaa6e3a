"""The numbers that a fake-quantized model's kernels stand for."""

import jax

from hybrid_jax import core
from hybrid_jax import quantization as q
from hybrid_jax.quantization.lookup import range_of


def stored_kernels(fn, spec, params, ranges, *inputs):
    """{site: (numbers, grid)} of the kernels that the spec quantizes; see `q.dequantize`."""

    def rule(site, x, kernel, apply):
        quantizer = spec[site.name].weight
        span = range_of(spec, ranges, site, "weight")
        if span is None:
            span = quantizer.range_of(kernel, q.range_shape(site, quantizer))
        grid = quantizer.grid(span)
        return apply(x, kernel), (q.quantize(kernel, grid), grid)

    wanted = [site.name for site in spec.sites if site.weight.bits != q.OFF]
    found = jax.jit(lambda params: core.at_sites(fn, rule)(params, *inputs)[1])(params)
    return {name: found[name] for name in wanted}
