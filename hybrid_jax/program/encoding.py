"""How tensors and kernels are stored: shapes, scales, zero points and integers."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core

UNBOUNDED = (-math.inf, math.inf)


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How a tensor's values are stored: scale · (q − zero_point), q in [low, high], in a uint8."""

    scale: float  # above 0; a float32 number
    zero_point: int = 0  # in [low, high]; 0 after a ReLU
    low: int = 0  # at least 0
    high: int = 255  # at most 255; 2^bits − 1 for fewer bits

    def __post_init__(self):
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be a finite number above 0, got {self.scale}")
        if not 0 <= self.low <= self.zero_point <= self.high <= 255:
            raise ValueError(
                "encoding must have 0 <= low <= zero_point <= high <= 255, "
                f"got {self.low}, {self.zero_point}, {self.high}"
            )

    @property
    def whole(self) -> bool:
        """Whether it has as many values as 8 bits."""
        return self.high - self.low >= 254


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An edge: what lies between the operation that makes it and those that read it."""

    shape: tuple[int, ...]  # of one example, without the batch
    encoding: Encoding | None = None  # how it is stored; None is float32
    dtype: str = "float32"  # of what the traced function has there, whose values these are


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """A kernel with a bias for each output channel."""

    # (kh, kw, C / groups, O) or (C, O); float32, or int8 in [−127, 127], below 8 bits in [−63, 63]
    # and multiples of `integer_step(bits)`; with 1 bit none is 0
    values: np.ndarray
    scale: np.ndarray | None  # float32 (O,), the kernel is values · scale; None for a float kernel
    bias: np.ndarray  # float32 (O,), as a value, not in steps
    bits: int = 32  # of each entry of `values` in a packed file; 32 for a float kernel

    def __post_init__(self):
        if self.scale is None:
            return
        step = integer_step(core.check_integer("bits", self.bits, 1, 8))
        most = step * max(2 ** (self.bits - 1) - 1, 1)
        sizes = np.abs(self.values.astype(np.int16))
        off = sizes != step if self.bits == 1 else (sizes % step != 0) | (sizes > most)
        if off.any():
            multiples = f"multiples of {step} in [−{most}, {most}]"
            wanted = f"−{step} and {step}" if self.bits == 1 else multiples
            raise ValueError(
                f"values must be {wanted} with bits {self.bits}, got {self.values[off][0]}"
            )


def integer_step(bits: jax.Array | int) -> Any:
    """What the stored integers of a symmetric or binary kernel of that many bits are multiples of.

    2^(7 − bits) below 8 bits, so that all but kernels of 8 bits lie in [−63, 63]: two products with
    a uint8 then add up in an int16, as they must on an x86 without VNNI (see
    `arithmetic.saturates`). The scale is as many times smaller than that of the grid, so the kernel
    is the same, and the bias is rounded to steps that are as many times finer. Signs, of 1 bit, are
    −32 and 32: those of 2 bits without a zero. `bits` may be traced.

    Example:
      >>> [integer_step(bits) for bits in (8, 4, 2, 1)]
      [1, 8, 32, 32]
    """
    if isinstance(bits, int):
        return 2 ** (7 - min(max(bits, 2), 7))
    return 2 ** (7 - jnp.clip(bits, 2, 7))
