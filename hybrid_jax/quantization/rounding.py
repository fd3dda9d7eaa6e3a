"""Ways to round the kernels of a plan without training, by name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from hybrid_jax import program as p
from hybrid_jax.quantization import grids
from hybrid_jax.quantization.gptq import gptq_planned
from hybrid_jax.quantization.planning import Plan
from hybrid_jax.quantization.reconstruction import adaround

Rounding = Callable[
    [Plan, Mapping[str, Mapping[str, grids.Range]], Sequence[tuple[Any, ...]], jax.Array], p.Params
]
"""rounding(planned, ranges, batches, key) -> weights; ranges are as of `calibrate_edges`."""

ROUNDINGS: dict[str, Rounding] = {
    "nearest": lambda planned, ranges, batches, key: planned.program.params,
    "gptq": lambda planned, ranges, batches, key: gptq_planned(planned, ranges, batches),
    "adaround": adaround,
}
"""Every rounding by name, open to users. What is not on its grid yet goes to the nearest value."""
