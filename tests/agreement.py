"""Whether what is trained is what is deployed: a plan in floats and in integers, by operations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import program as p
from hybrid_jax.program import evaluate
from hybrid_jax.program.operations import dequantize, steps_from_zero
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
    def compare(ranges, *xs):
        made, found = p.edges(integers, xs), {}
        for op in planned.program.operations:
            taken = {n: dequantize(made[n], integers.encoding(n)) for n in op.inputs}
            alone = dataclasses.replace(
                planned.program,
                inputs=tuple(taken),
                outputs=(op.output,),
                tensors=plain,
                operations=(op,),
            )
            part = dataclasses.replace(planned, program=alone)
            y = deployed.edges(part, ranges, list(taken.values()))[op.output]
            z, encoding = made[op.output], integers.encoding(op.output)
            if encoding is None:
                apart, halfway = (y - z) / jnp.maximum(FLOAT_STEP * jnp.abs(z).max(), 1e-30), False
            else:
                encodings = [integers.encoding(n) for n in op.inputs]
                values = [taken[n] for n in op.inputs]
                exact = evaluate.in_floats(stored[op.output], values, encodings, None)
                exact = exact / np.float32(encoding.scale)
                halfway = jnp.abs(exact - jnp.floor(exact) - 0.5) < NEXT_TO_HALF
                apart = y / np.float32(encoding.scale) - steps_from_zero(z, encoding).astype(
                    y.dtype
                )
            apart = jnp.abs(apart)
            off = (apart > 0.5) & ~jnp.asarray(halfway)
            found[op.output] = apart.max(), off.mean(dtype=jnp.float32)
        return found

    return {name: tuple(map(float, own)) for name, own in compare(ranges, *xs).items()}


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
