"""Ranges and observers, integer grids, and fake-quantization of a model's weights and activations.

    spec = quantization.spec(graph, weight_bits=4)
    ranges = quantization.calibrate(fn, params, batches, spec, method='mse')
    q_fn = quantization.fake_quantized(fn, spec)      # q_fn(params, ranges, *inputs)

Ranges are a pytree of floats to be trained along with the parameters, with `scale_by_width` in an
adaptive optimizer; bits are data. What a device computes is the inference graph, with every edge
stored once; the last steps of training belong there, and what recovers accuracy without training:

    program, left_out = quantization.equalize(hj.lower(fn, params, x), x)
    planned = quantization.plan(program, spec)
    ranges = quantization.calibrate_edges(planned, batches, 'mse')  # or edge_ranges, after training
    weights = quantization.adaround(planned, ranges, batches, key)   # or gptq_planned
    weights = quantization.correct_biases(planned, ranges, batches, weights)
    q_fn = quantization.as_deployed(planned)          # q_fn(weights, ranges, *inputs)
    integers = quantization.encode(planned.replace(weights), ranges, x)

Each site its own bits (and widths) within budgets:

    damage = quantization.sensitivity(fn, params, batches, spec, {2: ranges, 4: ranges, 8: ranges})
    formula = cost.formula(graph, scales=quantization.scale_counts(graph, spec))
    found = quantization.allocate_bits(damage, formula, spec, {'bytes': 20_000})
    spec = quantization.with_bits(spec, found.bits)   # or q_fn(..., bits=found.bits)
"""

from hybrid_jax.quantization.allocation import Allocation, allocate_bits, with_bits
from hybrid_jax.quantization.calibration import calibrate, calibrate_edges
from hybrid_jax.quantization.correction import correct_biases
from hybrid_jax.quantization.deployed import as_deployed, edge_ranges
from hybrid_jax.quantization.encoding import encode
from hybrid_jax.quantization.equalization import equalize
from hybrid_jax.quantization.fractional import bit_operations, fractional, round_bits
from hybrid_jax.quantization.gptq import gptq, gptq_planned
from hybrid_jax.quantization.gradients import fake_quant, lsq, pact
from hybrid_jax.quantization.grids import (
    LEAST_SCALE,
    OFF,
    Grid,
    Range,
    dequantize,
    extent,
    nearest,
    quantize,
    spread,
)
from hybrid_jax.quantization.learning import LEARNING, Learning
from hybrid_jax.quantization.lookup import range_at
from hybrid_jax.quantization.model import fake_quantized, scale_counts
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
from hybrid_jax.quantization.planning import Plan, plan
from hybrid_jax.quantization.program import CannotBeMet
from hybrid_jax.quantization.reconstruction import adaround
from hybrid_jax.quantization.rounding import ROUNDINGS
from hybrid_jax.quantization.schedules import annealing
from hybrid_jax.quantization.schemes import affine, binary, e4m3, e5m2, power_of_two, symmetric
from hybrid_jax.quantization.sensitivity import (
    DAMAGES,
    Sensitivity,
    hessian_sensitivity,
    hessian_trace,
    increase,
    kl_divergence,
    plan_sensitivity,
    sensitivity,
    squared_difference,
)
from hybrid_jax.quantization.specs import Quantizer, SiteSpec, Spec, range_shape, spec
from hybrid_jax.quantization.surrogate import with_gradient
from hybrid_jax.quantization.transforms import scale_by_width
