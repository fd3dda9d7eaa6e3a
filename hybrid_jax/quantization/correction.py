"""Bias correction: quantization shifts the mean of a channel, and the bias takes it back."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax import core
from hybrid_jax import program as p
from hybrid_jax.quantization import deployed, grids
from hybrid_jax.quantization.lookup import range_at
from hybrid_jax.quantization.planning import Plan


def correct_biases(
    planned: Plan,
    ranges: Mapping[str, Mapping[str, grids.Range]],
    batches: Iterable[tuple[Any, ...]],
    params: p.Params | None = None,
) -> p.Params:
    """Makes the mean output of every convolution and dense layer what it is in floats.

    Operation by operation, in the order in which they run, with those before it corrected,

        bias := bias + E[float output − quantized output]

    for each output channel, before it is clipped and stored. The mean is taken over the examples
    and positions at which the output in floats is within the bounds of the clip: what a ReLU or
    ReLU6 cuts off is no error, but where it is most of a channel, it would be most of the mean.

    All batches, of one shape, are one pass of one program: as many as memory holds the edges of.
    `planned` has the weights of the float model, `ranges` are as `calibrate_edges` returns them.
    Corrected are `params`, such as `adaround` returns, by default the plan's.

    Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction,
    arXiv 1906.04721, section 4.2 and appendix D (empirical bias correction).
    """
    batches = list(core.check_batches(batches, alike=True))
    for name in planned.stored:
        range_at(ranges, name, "activation", ())
    clips = {op.output: op.clip for op in planned.program.weighted}
    planned = _with_sums(planned)

    @jax.jit
    @core.fast_convolutions
    def found(exact, params, inputs):
        expected, shifts = p.edges(planned.program.replace(exact), inputs), {}

        def corrected(op, y):
            if op.output not in clips:
                return y
            (low, high), wanted = clips[op.output], expected[op.output]
            cut = (wanted <= low) | (wanted >= high)  # which a NaN is not
            counts = 1.0 - cut.astype(jnp.float32)
            axes = tuple(range(y.ndim - 1))
            error = (counts * (wanted - y)).sum(axes)
            shifts[op.output] = error / jnp.maximum(counts.sum(axes), 1.0)
            return y + jnp.broadcast_to(shifts[op.output], y.shape)

        deployed.edges(planned.replace(params), ranges, inputs, change=corrected)
        return shifts

    params = dict(planned.program.params if params is None else params)
    inputs = tuple(jnp.concatenate(arrays) for arrays in zip(*batches, strict=True))
    shifts = found(dict(planned.program.params), params, inputs)
    core.check_finite("the shift of the mean", shifts)
    return params | {
        name: {**params[name], "bias": params[name]["bias"] + shift}
        for name, shift in shifts.items()
    }


def _with_sums(planned: Plan) -> Plan:
    """The plan with an edge for what each kernel makes before it is clipped and stored."""
    program, slots, tensors = planned.program, dict(planned.slots), dict(planned.program.tensors)
    ends = {op.output: f"{op.output}/stored" for op in program.weighted}
    operations: list[p.Operation] = []
    for op in program.operations:
        name, end = op.output, ends.get(op.output)
        op = dataclasses.replace(op, inputs=tuple(ends.get(edge, edge) for edge in op.inputs))
        if end:
            operations.append(dataclasses.replace(op, clip=p.UNBOUNDED))
            op = p.Clip((name,), end, *op.clip)
            tensors[end], slots[end], slots[name] = tensors[name], slots[name], None
        operations.append(op)
    program = dataclasses.replace(program, tensors=tensors, operations=tuple(operations))
    return dataclasses.replace(planned, program=program, slots=slots)
