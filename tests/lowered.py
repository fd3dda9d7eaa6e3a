"""From a quantized function to its integers in one call, as tests of deployment need them."""

from collections.abc import Callable
from typing import Any

from hybrid_jax import program as p
from hybrid_jax import quantization


def in_integers(fn: Callable[..., Any], params: Any, spec: Any, ranges: Any, x: Any) -> p.Program:
    return quantization.encode(p.lower(fn, params, x), spec, ranges, x)
