"""A planned program as a device will compute it, in floats that are differentiable."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core
from hybrid_jax import program as p
from hybrid_jax.program import evaluate
from hybrid_jax.program.operations import rounded
from hybrid_jax.quantization import grids, specs, surrogate
from hybrid_jax.quantization.lookup import range_at
from hybrid_jax.quantization.planning import Plan, site_of

Ranges = Mapping[str, Mapping[str, grids.Range]]


def as_deployed(planned: Plan) -> Callable[..., Any]:
    """The function that a plan stands for, fake-quantized: what is trained so is what is deployed.

    Every edge and kernel is rounded as it is stored, and biases to the steps of the sums that they
    are added to.

    Returns:
      q_fn(params, ranges, *inputs, bits=None) -> outputs, as `program.apply` returns them. `params`
      are those of the plan's program, `ranges` as `edge_ranges` or `calibrate_edges` returns them;
      `bits` {name: {role: int32 ()}}, traced, take the place of the plan's. Differentiable in
      `params` and `ranges`. Zeros of a kernel are rounded to zero, unless it is binary; what keeps
      them through training is `pruning.hold_masks`.
    """

    def q_fn(params, ranges, *inputs, bits: Mapping[str, Mapping[str, Any]] | None = None):
        for name in planned.stored:
            range_at(ranges, name, "activation", ())
        for name in bits or {}:
            core.check_choice("name of bits", name, {**planned.stored, **planned.kernels})
        made = planned.replace(params)
        return evaluate.results(made.program, edges(made, ranges, inputs, bits))

    return q_fn


def edges(
    planned: Plan,
    ranges: Ranges,
    inputs: Any,
    bits: Mapping[str, Mapping[str, Any]] | None = None,
    change: Callable[[p.Operation, jax.Array], jax.Array] = lambda op, y: y,
) -> dict[str, jax.Array]:
    """{edge: its values as they are stored, float32 (B, …)}; without a range as they are.

    `change` is what happens to the result of an operation before it is stored.
    """
    program, slots = planned.program, planned.slots

    def bits_of(name, role, quantizer):
        return (bits or {}).get(name, {}).get(role, quantizer.bits)

    def in_steps(bias, size, op):
        """The bias in whole steps of the integer sums, for a kernel of scales `size` (O,)."""
        slot = slots[op.inputs[0]]
        if slot is None or not (slot.fixed or _has(ranges, slot.name)):
            return bias
        if slot.fixed is not None:
            step = size * np.float32(slot.fixed.scale)
        else:
            span = range_at(ranges, slot.name, "activation", ())
            width = bits_of(slot.name, "activation", slot.quantizer)
            step = size * slot.quantizer.grid(span, width).scale
        # Of a dead channel of a dead input a bias has more steps than a float counts.
        few = jnp.abs(bias) < step * 2**24
        nearest = jnp.round(bias / jnp.where(few, step, 1)) * step
        return surrogate.with_gradient(jnp.where(few, nearest, bias), bias)

    def weights(op):
        """Its kernel and bias as a device has them."""
        kernel, quantizer = op.weights.values, planned.kernels[op.output]
        if op.output not in planned.ranged:
            if quantizer.bits == grids.OFF:
                return op.weights
            return p.Weights(kernel, None, in_steps(op.weights.bias, sign_scale(kernel), op))
        width = bits_of(op.output, "weight", quantizer)
        span = range_at(ranges, op.output, "weight", kernel.shape)
        shape = np.shape(span.low)
        count = kernel.size // int(np.prod(shape))
        stored = specs.apply(kernel, quantizer, span, width, shape, count)
        bias = op.weights.bias + program.sources[op.output].moved(stored - kernel)
        # Signs are half a grid's step from zero.
        parts = p.integer_step(width) * (2 if quantizer.scheme == "binary" else 1)
        size = quantizer.grid(span, width).scale.reshape(-1) / jnp.asarray(parts, jnp.float32)
        return p.Weights(stored, None, in_steps(bias, size, op))

    def rule(op, values, encodings, output):
        del encodings, output  # the program is one of floats
        if op.output in planned.kernels:
            op = dataclasses.replace(op, weights=weights(op))
        y, slot = change(op, op.floats(*values)), slots[op.output]
        if slot is None or planned.as_stored(op):
            return y
        if slot.fixed is not None:
            return surrogate.with_gradient(rounded(y, slot.fixed), y)
        if not _has(ranges, slot.name):
            return y
        width = bits_of(slot.name, "activation", slot.quantizer)
        span = range_at(ranges, slot.name, "activation", ())
        return specs.apply(y, slot.quantizer, span, width, (), y.size // y.shape[0])

    return evaluate.edges(program, inputs, rule)


def sign_scale(kernel: Any) -> jax.Array:
    """The scales (C,) of a 1×1 depthwise kernel, of one weight a channel: its integer is ±127."""
    size = jnp.abs(kernel).reshape(-1)
    return jnp.where(size == 0, jnp.where(size.max() == 0, 1, size.max()), size) / 127


def edge_ranges(planned: Plan, ranges: Ranges, *inputs: Any) -> dict[str, dict[str, grids.Range]]:
    """The ranges of a plan's edges and kernels, from those of the function's sites.

    An edge has the range of the site that takes it; the others have the one that they take for the
    inputs, real ones (B, …), with all that is known as it is stored. What is folded into a kernel
    scales its range. `ranges` are as `calibrate` or training left them, the result is as
    `calibrate_edges` returns it.
    """
    core.check_known("edge_ranges", ranges=ranges, inputs=inputs)
    evaluate.check_inputs(planned.program, inputs)
    core.check_finite("inputs", inputs)
    found: dict[str, dict[str, grids.Range]] = {
        op.output: {"weight": _span_of_kernel(planned, ranges, op)}
        for op in planned.program.weighted
        if op.output in planned.ranged
    }
    for name, slot in planned.stored.items():
        if slot.site is not None:
            span = range_at(ranges, slot.site, "activation", ())
            found.setdefault(name, {})["activation"] = span

    def see(found, *inputs):
        seen: dict[str, list[jax.Array]] = {}
        for name, value in edges(planned, found, inputs).items():
            slot = planned.slots[name]
            if slot and slot.fixed is None and not _has(found, slot.name):
                seen.setdefault(slot.name, []).extend((value.min(), value.max()))
        ends = {name: jnp.stack(several) for name, several in seen.items()}
        return {name: grids.Range(each.min(), each.max()) for name, each in ends.items()}

    seen = jax.jit(see)(found, *inputs)
    core.check_finite("the values that edges take for inputs", seen)
    for name, span in seen.items():
        found.setdefault(name, {})["activation"] = span
    return found


def _has(ranges, name):
    return "activation" in ranges.get(name, {})


def _span_of_kernel(planned, ranges, op):
    """The range of a kernel as the program has it, from that of its site."""
    source, kernel = planned.program.sources[op.output], op.weights.values
    rank = (1,) * (kernel.ndim - 1) + (-1,)
    site = site_of(planned.spec, source)
    uneven = source.before is not None and np.ndim(source.before[0]) > 0
    if site is None or uneven:
        quantizer = planned.kernels[op.output]
        shape = specs.kernel_range_shape(kernel.shape, quantizer)
        return quantizer.range_of(jnp.asarray(kernel), shape)
    span = range_at(ranges, site.name, "weight", None)
    factor = np.abs(source.scale)
    if source.before is not None:
        factor = factor * np.abs(source.before[0])
    ends = (np.float32(source.outputs(end) * factor).reshape(rank) for end in span)
    return grids.Range(*map(jnp.asarray, ends))
