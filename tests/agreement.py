"""Whether what is trained is what is deployed: a plan in floats and in integers, by operations."""

import dataclasses

import jax
import numpy as np

from hybrid_jax import program as p
from hybrid_jax.program import evaluate
from hybrid_jax.program.operations import dequantize
from hybrid_jax.quantization import deployed

FLOAT_STEP = 2e-5
"""What a step is of an edge in floats, of its largest value."""

NEXT_TO_HALF = 1e-3
"""In steps."""


def steps_apart(planned, ranges, integers, *xs):
    """{edge: (the most steps, the share of entries off by more than half a step)}.

    Each operation of `as_deployed` is given what the integers stand for that `run` gives it. What
    lies next to half a step before it is rounded is in the one, not in the other: of 4 bits, that
    have few values, it may be many entries.
    """
    stored = integers.makers
    plain = {
        name: dataclasses.replace(tensor, dtype="float32")
        for name, tensor in planned.program.tensors.items()
    }

    @jax.jit
    def both(ranges, *xs):
        made, found = p.edges(integers, xs), {}
        for op in planned.program.operations:
            encodings = [integers.encoding(n) for n in op.inputs]
            taken = {n: dequantize(made[n], e) for n, e in zip(op.inputs, encodings, strict=True)}
            alone = dataclasses.replace(
                planned.program,
                inputs=tuple(taken),
                outputs=(op.output,),
                tensors=plain,
                operations=(op,),
            )
            part = dataclasses.replace(planned, program=alone)
            y, exact = deployed.edges(part, ranges, list(taken.values()))[op.output], None
            if integers.encoding(op.output) is not None:
                values = [taken[n] for n in op.inputs]
                exact = evaluate.in_floats(stored[op.output], values, encodings, None)
            found[op.output] = y, made[op.output], exact
        return found

    # In NumPy: compiling it would take as long as all else.
    def compared(name, y, z, exact):
        encoding = integers.encoding(name)
        if encoding is None:
            apart = np.abs(y - z) / max(FLOAT_STEP * np.abs(z).max(), 1e-30)
            return apart.max(), (apart > 0.5).mean()
        exact = exact / np.float32(encoding.scale)
        halfway = np.abs(exact - np.floor(exact) - 0.5) < NEXT_TO_HALF
        apart = np.abs(
            y / np.float32(encoding.scale) - (z.astype(np.float32) - encoding.zero_point)
        )
        return apart.max(), ((apart > 0.5) & ~halfway).mean()

    found = jax.device_get(both(ranges, *xs))
    return {name: tuple(map(float, compared(name, *own))) for name, own in found.items()}


def check_agreement(planned, ranges, integers, *xs, share=1e-3):
    """Asserts that no operation is off by more than a step, and few entries by one."""
    apart = steps_apart(planned, ranges, integers, *xs)
    # One entry of a small tensor is more than the share.
    sizes = {name: len(xs[0]) * np.prod(planned.program.tensors[name].shape) for name in apart}
    off = {
        name: own
        for name, own in apart.items()
        if own[0] > 1.01 or own[1] * sizes[name] > max(share * sizes[name], 1.5)
    }
    assert not off
