"""Ranges and observers, integer grids, and fake-quantization of a model's weights and activations.

The way through it:

    spec = quantization.spec(graph, weight_bits=4)
    ranges = quantization.calibrate(fn, params, batches, spec, method='mse')
    q_fn = quantization.fake_quantized(fn, spec)      # q_fn(params, ranges, *inputs)

Ranges are a pytree of floats to be trained along with the parameters, bits are data. For a model
that will compute in integers, `spec(..., deployable=True)` also rounds what a device stores between
the layers: residual sums, concatenations, means. What recovers
accuracy without training stands between: on a function folded by `core.fold`, `equalize` before
calibration, and then `adaround` (or `gptq`) and `correct_biases`, whose parameters q_fn takes.

Each site its own bits, within budgets (with `widths`, how many channels each group keeps, too):

    damage = quantization.sensitivity(fn, params, batches, spec, {2: ranges, 4: ranges, 8: ranges})
    formula = cost.formula(graph, scales=quantization.scale_counts(graph, spec))
    found = quantization.allocate_bits(damage, formula, spec, {'bytes': 20_000})
    spec = quantization.with_bits(spec, found.bits)   # or q_fn(..., bits=found.bits)
"""

from hybrid_jax.quantization.allocation import Allocation, allocate_bits, with_bits
from hybrid_jax.quantization.calibration import calibrate
from hybrid_jax.quantization.correction import correct_biases
from hybrid_jax.quantization.equalization import equalize
from hybrid_jax.quantization.fractional import bit_operations, fractional, round_bits
from hybrid_jax.quantization.gptq import gptq
from hybrid_jax.quantization.gradients import fake_quant, lsq, pact
from hybrid_jax.quantization.grids import (
    LEAST_SCALE,
    OFF,
    Grid,
    Range,
    dequantize,
    extent,
    integer_step,
    nearest,
    quantize,
    spread,
)
from hybrid_jax.quantization.lookup import range_at
from hybrid_jax.quantization.model import (
    Integers,
    at_biases,
    at_joins,
    fake_quantized,
    integer_kernels,
    scale_counts,
)
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
from hybrid_jax.quantization.reconstruction import adaround
from hybrid_jax.quantization.schedules import annealing
from hybrid_jax.quantization.schemes import affine, binary, e4m3, e5m2, power_of_two, symmetric
from hybrid_jax.quantization.sensitivity import (
    hessian_sensitivity,
    hessian_trace,
    increase,
    kl_divergence,
    sensitivity,
)
from hybrid_jax.quantization.specs import JoinSpec, Quantizer, SiteSpec, Spec, range_shape, spec
from hybrid_jax.quantization.surrogate import with_gradient

__all__ = [
    "LEAST_SCALE",
    "OFF",
    "Allocation",
    "Grid",
    "Integers",
    "JoinSpec",
    "Observer",
    "Quantizer",
    "Range",
    "SiteSpec",
    "Spec",
    "adaround",
    "affine",
    "allocate_bits",
    "annealing",
    "at_biases",
    "at_joins",
    "binary",
    "bit_operations",
    "calibrate",
    "correct_biases",
    "dequantize",
    "e4m3",
    "e5m2",
    "entropy",
    "equalize",
    "extent",
    "fake_quant",
    "fake_quantized",
    "fractional",
    "gptq",
    "hessian_sensitivity",
    "hessian_trace",
    "increase",
    "integer_kernels",
    "integer_step",
    "kl_divergence",
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
    "range_at",
    "range_shape",
    "round_bits",
    "scale_counts",
    "sensitivity",
    "spec",
    "spread",
    "symmetric",
    "ternary",
    "with_bits",
    "with_gradient",
]
