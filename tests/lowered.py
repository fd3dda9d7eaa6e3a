"""From a function to what is deployed of it in one call, as tests of deployment need it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from hybrid_jax import core, quantization
from hybrid_jax import program as p


class Deployed(NamedTuple):
    """A function as a program in floats and in integers, and fake-quantized as the latter."""

    floats: p.Program
    integers: p.Program
    fake: Callable[..., Any]


def in_integers(fn: Callable[..., Any], params: Any, spec: Any, ranges: Any, *xs: Any) -> p.Program:
    """With the ranges of sites, as training leaves them; what `lower` checks has its own tests."""
    planned = quantization.plan(p.lower(fn, params, *xs, check=False), spec)
    return quantization.encode(planned, quantization.edge_ranges(planned, ranges, *xs), *xs)


def deployed(
    fn: Callable[..., Any], params: Any, *xs: Any, method: str = "minmax", **bits: Any
) -> Deployed:
    """Calibrated on the inputs."""
    floats = p.lower(fn, params, *xs, check=False)
    spec = quantization.spec(core.trace(fn, params, *xs), **bits)
    planned = quantization.plan(floats, spec)
    ranges = quantization.calibrate_edges(planned, [xs], method)
    q_fn = jax.jit(quantization.as_deployed(planned))
    return Deployed(
        floats,
        quantization.encode(planned, ranges, *xs),
        lambda *inputs: q_fn(planned.program.params, ranges, *inputs),
    )
