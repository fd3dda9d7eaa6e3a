"""Ranges and observers, integer grids, and fake-quantization of a model's weights and activations.

The way through it:

    spec = quantization.spec(graph, weight_bits=4)
    ranges = quantization.calibrate(fn, params, batches, spec, method='mse')
    q_fn = quantization.fake_quantized(fn, spec)      # q_fn(params, ranges, *inputs)

Ranges are a pytree of floats to be trained along with the parameters, bits are data.
"""

from hybrid_jax.quantization.calibration import calibrate
from hybrid_jax.quantization.gptq import gptq
from hybrid_jax.quantization.gradients import fake_quant, lsq, pact
from hybrid_jax.quantization.grids import (
    OFF,
    Grid,
    Range,
    dequantize,
    extent,
    nearest,
    quantize,
    spread,
)
from hybrid_jax.quantization.model import Integers, fake_quantized, integer_kernels
from hybrid_jax.quantization.observers import (
    Observer,
    entropy,
    mean_abs,
    minmax,
    moving_average,
    mse,
    percentile,
    ternary,
)
from hybrid_jax.quantization.schedules import annealing
from hybrid_jax.quantization.schemes import affine, binary, e4m3, e5m2, power_of_two, symmetric
from hybrid_jax.quantization.specs import Quantizer, SiteSpec, Spec, range_shape, spec
from hybrid_jax.quantization.surrogate import with_gradient

__all__ = [
    "OFF",
    "Grid",
    "Integers",
    "Observer",
    "Quantizer",
    "Range",
    "SiteSpec",
    "Spec",
    "affine",
    "annealing",
    "binary",
    "calibrate",
    "dequantize",
    "e4m3",
    "e5m2",
    "entropy",
    "extent",
    "fake_quant",
    "fake_quantized",
    "gptq",
    "integer_kernels",
    "lsq",
    "mean_abs",
    "minmax",
    "moving_average",
    "mse",
    "nearest",
    "pact",
    "percentile",
    "power_of_two",
    "quantize",
    "range_shape",
    "spec",
    "spread",
    "symmetric",
    "ternary",
    "with_gradient",
]
