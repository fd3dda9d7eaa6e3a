"""Bias correction: quantization shifts the mean of a channel, and the bias takes it back."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax

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

        bias := bias + E[float output] − E[quantized output]

    for each output channel, before it is clipped and stored; the means are taken over examples and
    positions. The program runs on all batches once for each operation, and is compiled twice.

    `planned` has the weights of the float model, `ranges` are as `calibrate_edges` returns them,
    and batches of one shape. Corrected are `params`, such as `adaround` returns, by default the
    plan's.

    Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction,
    arXiv 1906.04721, section 4.2 and appendix D (empirical bias correction).
    """
    batches = list(core.check_batches(batches, alike=True))
    for name in planned.stored:
        range_at(ranges, name, "activation", ())
    planned = _with_sums(planned)
    names = [op.output for op in planned.program.weighted]

    def means(values):
        return {name: values[name].mean(tuple(range(values[name].ndim - 1))) for name in names}

    @jax.jit
    @core.fast_convolutions
    def exact(params, batch):
        return means(p.edges(planned.program.replace(params), batch))

    @jax.jit
    @core.fast_convolutions
    def stored(params, batch):
        return means(deployed.edges(planned.replace(params), ranges, batch))

    def over_batches(mean, params):
        each = [mean(params, batch) for batch in batches]
        return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *each)

    corrected = dict(planned.program.params if params is None else params)
    expected = over_batches(exact, planned.program.params)
    for name in names:
        shift = expected[name] - over_batches(stored, corrected)[name]
        core.check_finite("the shift of the mean", {name: shift})
        corrected[name] = {**corrected[name], "bias": corrected[name]["bias"] + shift}
    return corrected


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
