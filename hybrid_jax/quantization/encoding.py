"""From an inference graph in floats to one in integers: every edge and kernel as it is stored."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from hybrid_jax import core
from hybrid_jax import program as p
from hybrid_jax.core import versions
from hybrid_jax.program import evaluate
from hybrid_jax.program.operations import dequantize
from hybrid_jax.quantization import grids
from hybrid_jax.quantization.deployed import sign_scale
from hybrid_jax.quantization.lookup import range_at
from hybrid_jax.quantization.planning import Plan, check_signs
from hybrid_jax.quantization.specs import Quantizer


def encode(
    planned: Plan,
    ranges: Mapping[str, Mapping[str, grids.Range]],
    *inputs: Any,
    check: bool = True,
) -> p.Program:
    """The program in integers: what `as_deployed` computes in floats, to the rounding of a sum.

    `ranges` are as `edge_ranges`, `calibrate_edges` or training left them. With `check` every
    operation is compared with its fake-quantized twin on the inputs, real ones (B, …): given the
    same integers they differ by one step at most, on one entry in 10⁴, or it is a ValueError.
    """
    core.check_known("encode", params=planned.program.params, ranges=ranges, inputs=inputs)
    evaluate.check_inputs(planned.program, inputs)
    core.check_finite("inputs", inputs)
    # Integers are made on the host, of weights that may come from training.
    planned = planned.replace(jax.device_get(planned.program.params))
    check_signs(planned)
    grids_ = _grids(planned, ranges)
    weights = {
        op.output: _integers(op, planned, grids_["weight"]) for op in planned.program.weighted
    }
    known = {
        name: _of_grid(slot.quantizer, grids_["activation"][name])
        for name, slot in planned.stored.items()
    }
    made = _encoded(planned, weights, _within_ratio(known))
    if check:
        count = max(1, min(_CHECKED, _NUMBERS // max(np.asarray(x)[:1].size for x in inputs)))
        _verify(made, [np.asarray(x)[:count] for x in inputs])
    return made


_CHECKED = 8  # examples, of large images as many as have so many numbers
_NUMBERS = 2**19


def _verify(program: p.Program, inputs) -> None:
    """Compares each operation's integers with its fake-quantized floats, of the same integers."""

    def both(*inputs):
        made, found = evaluate.edges(program, inputs), {}
        for op in program.operations:
            output = program.encoding(op.output)
            encodings = [program.encoding(name) for name in op.inputs]
            if output is None or None in encodings:
                continue
            values = [dequantize(made[n], e) for n, e in zip(op.inputs, encodings, strict=True)]
            # Before they are rounded: what lies halfway may go either way.
            found[op.output] = made[op.output], evaluate.in_floats(op, values, encodings, None)
        return found

    # What compares is not compiled: it would take as long as what computes.
    compiled = jax.jit(both).lower(*inputs).compile(versions.run_once())
    for name, (integers, floats) in jax.device_get(compiled(*inputs)).items():
        output = program.encoding(name)
        with np.errstate(over="ignore"):
            exact = floats / np.float32(output.scale) + np.float32(output.zero_point)
        steps = np.abs(np.clip(exact, output.low, output.high) - integers)
        most, several, size = steps.max(), (steps > _NEAREST).sum(), steps.size
        if most > 1.5 or several > max(_FEW * size, 2):
            raise ValueError(
                f"program must compute in integers what it does in floats, got at {name!r} up to "
                f"{most:.3g} steps of difference, in {several} of {size} entries"
            )


_NEAREST, _FEW = 0.51, 1e-4


def _grids(planned: Plan, ranges) -> dict[str, dict[str, Any]]:
    """{'weight': {output: (integers, scale)}, 'activation': {slot: grid}}.

    All are computed at once: one by one, compiling them takes longer than all else.
    """
    spans, kernels = {}, {}
    for op in planned.program.weighted:
        if op.output in planned.ranged:
            kernels[op.output] = op.weights.values
            spans[op.output] = range_at(ranges, op.output, "weight", op.weights.values.shape)
    activations = {name: range_at(ranges, name, "activation", ()) for name in planned.stored}

    def compute(spans, kernels, activations):
        made = {}
        for name, span in spans.items():
            grid = planned.kernels[name].grid(span)
            made[name] = grids.quantize(kernels[name], grid), grid.scale
        stored = planned.stored
        return made, {name: stored[name].quantizer.grid(s) for name, s in activations.items()}

    weights, found = jax.device_get(jax.jit(compute)(spans, kernels, activations))
    return {"weight": weights, "activation": found}


def _integers(op, planned, made) -> p.Weights:
    """The integers of a kernel, with what follows it in their scales."""
    if op.output not in planned.program.sources:
        return _signs(op.weights)
    if op.output not in made:
        return op.weights
    values, scale = made[op.output]
    quantizer = planned.kernels[op.output]
    values = np.asarray(values).astype(np.int32)
    if quantizer.scheme == "binary":
        values, scale = 2 * values - 1, scale / np.float32(2)
    scale = np.broadcast_to(scale.reshape(-1), values.shape[-1:])
    used = np.maximum(scale, grids.LEAST_SCALE).astype(np.float32)
    # As large as [−63, 63] holds them, the accumulator's steps are the finest for the bias.
    bits = _room(values, quantizer.bits)
    step = p.integer_step(bits)
    made = (values * step).astype(np.int8)
    fine = used / np.float32(step)
    moved = planned.program.sources[op.output].moved(made * fine - op.weights.values)
    return p.Weights(made, fine, np.asarray(op.weights.bias) + moved, bits)


def _room(values, bits):
    """The fewest bits, from `bits` on, that hold the values and leave half an int32 to the bias."""
    fewest = bits if values.all() else max(bits, 2)  # signs times zero are no signs
    reach = 255 * np.abs(values).sum(tuple(range(values.ndim - 1)), np.int64).max()
    enough = (b for b in range(fewest, 8) if reach * p.integer_step(b) < 2**30)
    return next(enough, 8)


def _within_reach(weights: p.Weights, x: p.Encoding | None) -> p.Weights:
    """The weights with the bias of each channel within 2^30 steps of the accumulator.

    Only a channel that is all but dead beside its bias has more. It gets a larger scale, and its
    kernel is rounded to that: what it adds is then right to a billionth of the bias.
    """
    if weights.scale is None or x is None:
        return weights
    scale = np.maximum(weights.scale, np.abs(weights.bias) / np.float32(x.scale * 2**30))
    if (scale == weights.scale).all():
        return weights
    bits = max(weights.bits, 2)  # signs that become zero are no signs
    step = p.integer_step(bits)
    values = np.rint(weights.values / step * (weights.scale / scale)) * step
    return p.Weights(values.astype(np.int8), scale.astype(np.float32), weights.bias, bits)


def _signs(weights: p.Weights) -> p.Weights:
    """A 1×1 depthwise kernel in integers: its size is all in the scale of the channel."""
    signs, scale = np.sign(weights.values).astype(np.int8), np.asarray(sign_scale(weights.values))
    return p.Weights(127 * signs, scale, weights.bias, 8)


def _of_grid(quantizer: Quantizer, grid) -> p.Encoding:
    shift = 128 if quantizer.scheme == "symmetric" else 0
    ends = (int(end) + shift for end in (grid.zero_point, grid.low, grid.high))
    return p.Encoding(float(grid.scale), *ends)


def _within_ratio(known):
    """Encodings in which what is always zero has 1/128 of the largest scale, not the least.

    XNNPACK's kernels refuse to multiply by 256 or more from one scale to the next. The zero point
    is then the one integer, so that whatever else the edge may come to hold is 0 as well.
    """
    room = max((encoding.scale for encoding in known.values()), default=1.0) / 128

    def awake(encoding):
        dead = encoding.scale == grids.LEAST_SCALE
        return p.Encoding(room, *3 * [encoding.zero_point]) if dead else encoding

    return {name: awake(encoding) for name, encoding in known.items()}


def _encoded(planned: Plan, weights, known) -> p.Program:
    program, slots = planned.program, planned.slots

    def encoding(name):
        slot = slots[name]
        return None if slot is None else slot.fixed or known[slot.name]

    tensors = {
        name: dataclasses.replace(tensor, encoding=encoding(name))
        for name, tensor in program.tensors.items()
    }
    operations = [
        dataclasses.replace(op, weights=_within_reach(weights[op.output], encoding(op.inputs[0])))
        if op.output in weights
        else op
        for op in program.operations
    ]
    return dataclasses.replace(program, tensors=tensors, operations=tuple(operations), sources={})
