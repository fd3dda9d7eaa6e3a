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

from hybrid_jax.quantization.allocation import Allocation as Allocation
from hybrid_jax.quantization.allocation import allocate_bits as allocate_bits
from hybrid_jax.quantization.allocation import with_bits as with_bits
from hybrid_jax.quantization.calibration import calibrate as calibrate
from hybrid_jax.quantization.calibration import calibrate_edges as calibrate_edges
from hybrid_jax.quantization.correction import correct_biases as correct_biases
from hybrid_jax.quantization.deployed import as_deployed as as_deployed
from hybrid_jax.quantization.deployed import edge_ranges as edge_ranges
from hybrid_jax.quantization.encoding import encode as encode
from hybrid_jax.quantization.equalization import equalize as equalize
from hybrid_jax.quantization.fractional import bit_operations as bit_operations
from hybrid_jax.quantization.fractional import fractional as fractional
from hybrid_jax.quantization.fractional import round_bits as round_bits
from hybrid_jax.quantization.gptq import gptq as gptq
from hybrid_jax.quantization.gptq import gptq_planned as gptq_planned
from hybrid_jax.quantization.gradients import fake_quant as fake_quant
from hybrid_jax.quantization.gradients import lsq as lsq
from hybrid_jax.quantization.gradients import pact as pact
from hybrid_jax.quantization.grids import LEAST_SCALE as LEAST_SCALE
from hybrid_jax.quantization.grids import OFF as OFF
from hybrid_jax.quantization.grids import Grid as Grid
from hybrid_jax.quantization.grids import Range as Range
from hybrid_jax.quantization.grids import dequantize as dequantize
from hybrid_jax.quantization.grids import extent as extent
from hybrid_jax.quantization.grids import nearest as nearest
from hybrid_jax.quantization.grids import quantize as quantize
from hybrid_jax.quantization.grids import spread as spread
from hybrid_jax.quantization.learning import LEARNING as LEARNING
from hybrid_jax.quantization.learning import Learning as Learning
from hybrid_jax.quantization.lookup import range_at as range_at
from hybrid_jax.quantization.model import fake_quantized as fake_quantized
from hybrid_jax.quantization.model import scale_counts as scale_counts
from hybrid_jax.quantization.observers import Observer as Observer
from hybrid_jax.quantization.observers import entropy as entropy
from hybrid_jax.quantization.observers import mean_abs as mean_abs
from hybrid_jax.quantization.observers import minmax as minmax
from hybrid_jax.quantization.observers import moving_average as moving_average
from hybrid_jax.quantization.observers import mse as mse
from hybrid_jax.quantization.observers import percentile as percentile
from hybrid_jax.quantization.observers import ternary as ternary
from hybrid_jax.quantization.planning import Plan as Plan
from hybrid_jax.quantization.planning import plan as plan
from hybrid_jax.quantization.program import CannotBeMet as CannotBeMet
from hybrid_jax.quantization.reconstruction import adaround as adaround
from hybrid_jax.quantization.rounding import ROUNDINGS as ROUNDINGS
from hybrid_jax.quantization.schedules import annealing as annealing
from hybrid_jax.quantization.schemes import affine as affine
from hybrid_jax.quantization.schemes import binary as binary
from hybrid_jax.quantization.schemes import e4m3 as e4m3
from hybrid_jax.quantization.schemes import e5m2 as e5m2
from hybrid_jax.quantization.schemes import power_of_two as power_of_two
from hybrid_jax.quantization.schemes import symmetric as symmetric
from hybrid_jax.quantization.sensitivity import DAMAGES as DAMAGES
from hybrid_jax.quantization.sensitivity import Sensitivity as Sensitivity
from hybrid_jax.quantization.sensitivity import hessian_sensitivity as hessian_sensitivity
from hybrid_jax.quantization.sensitivity import hessian_trace as hessian_trace
from hybrid_jax.quantization.sensitivity import increase as increase
from hybrid_jax.quantization.sensitivity import kl_divergence as kl_divergence
from hybrid_jax.quantization.sensitivity import plan_sensitivity as plan_sensitivity
from hybrid_jax.quantization.sensitivity import sensitivity as sensitivity
from hybrid_jax.quantization.sensitivity import squared_difference as squared_difference
from hybrid_jax.quantization.specs import Quantizer as Quantizer
from hybrid_jax.quantization.specs import SiteSpec as SiteSpec
from hybrid_jax.quantization.specs import Spec as Spec
from hybrid_jax.quantization.specs import range_shape as range_shape
from hybrid_jax.quantization.specs import spec as spec
from hybrid_jax.quantization.surrogate import with_gradient as with_gradient
from hybrid_jax.quantization.transforms import scale_by_width as scale_by_width
