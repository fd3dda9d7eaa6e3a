"""Operations of which every entry depends on that entry of the inputs alone."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from hybrid_jax.program import arithmetic, functions
from hybrid_jax.program.encoding import UNBOUNDED
from hybrid_jax.program.operations.base import (
    Array,
    Operation,
    along,
    clipped,
    convert,
    finish,
    requantize,
    steps_from_zero,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Add(Operation):
    """The sum of two tensors, or their difference, clipped; lengths of 1 broadcast."""

    clip: tuple[float, float] = UNBOUNDED  # bounds of the result
    minus: bool = False  # whether it is the difference

    in_place = True

    def floats(self, a, b):
        return clipped(a - b if self.minus else a + b, self.clip)

    def integers(self, values, encodings, output):
        """(a − z_a) · A ± (b − z_b) · B."""
        first, second, multiplier = arithmetic.addition(*encodings, output)
        a, b = map(steps_from_zero, values, encodings)
        total = a * first - b * second if self.minus else a * first + b * second
        return requantize(total, multiplier, output, self.clip)


@dataclasses.dataclass(frozen=True, eq=False)
class Multiply(Operation):
    """The product of two tensors, clipped; lengths of 1 broadcast."""

    clip: tuple[float, float] = UNBOUNDED

    returns_floats = True
    in_place = True

    def floats(self, a, b):
        return clipped(a * b, self.clip)

    def integers(self, values, encodings, output):
        """(a − z_a) · (b − z_b)."""
        a, b = map(steps_from_zero, values, encodings)
        return finish(a * b, [e.scale for e in encodings], output, self.clip)


@dataclasses.dataclass(frozen=True, eq=False)
class Maximum(Operation):
    """The larger of two tensors' values; lengths of 1 broadcast."""

    in_place = True
    pick: ClassVar[Callable[..., Array]] = staticmethod(jnp.maximum)

    def floats(self, a, b):
        return self.pick(a, b)

    def integers(self, values, encodings, output):
        """Both in the encoding of the result, in which larger integers are larger values."""
        return self.pick(*(convert(x, e, output) for x, e in zip(values, encodings, strict=True)))


@dataclasses.dataclass(frozen=True, eq=False)
class Minimum(Maximum):
    """The smaller of two tensors' values; lengths of 1 broadcast."""

    pick = staticmethod(jnp.minimum)


@dataclasses.dataclass(frozen=True, eq=False)
class Clip(Operation):
    """The values between `low` and `high`, in an encoding of their own."""

    low: float
    high: float

    in_place = True

    def floats(self, x):
        return clipped(x, (self.low, self.high))

    def integers(self, values, encodings, output):
        (x,), (encoding,), clip = values, encodings, (self.low, self.high)
        if encoding == output:
            low, high = arithmetic.bounds(output, clip)
            return jnp.clip(x, np.uint8(low), np.uint8(high))
        return finish(steps_from_zero(x, encoding), [encoding.scale], output, clip)


@dataclasses.dataclass(frozen=True, eq=False)
class Function(Operation):
    """An expression of each value: of one encoded tensor a table of 256 entries, else in floats."""

    # Of the expression, see `functions.Step`: operands are inputs, then constants, then steps
    steps: tuple[functions.Step, ...]
    constants: tuple[np.ndarray, ...] = ()  # float32 or integers, () or (C,) along the last axis

    in_place = True

    @property
    def integral(self) -> bool:
        """Whether it is a table: with one input."""
        return len(self.inputs) == 1

    @property
    def kind(self) -> str | None:
        """The name of its only step, if that takes the input alone."""
        alone = len(self.steps) == 1 and self.steps[0].operands == (0,)
        return self.steps[0].name if alone and not self.steps[0].options else None

    def floats(self, *values):
        constants = [along(c, values[0]) if np.ndim(c) else c for c in self.constants]
        made = functions.evaluate(self.steps, [*map(jnp.asarray, values), *constants])
        shape = jnp.broadcast_shapes(*(value.shape for value in values))
        return jnp.broadcast_to(jnp.asarray(made).astype(jnp.float32), shape)

    def integers(self, values, encodings, output):
        (x,), (encoding,) = values, encodings
        table = jnp.asarray(arithmetic.table(self.steps, self.constants, encoding, output))
        if table.ndim == 1:
            return table[x.astype(jnp.int32)]
        return table[x.astype(jnp.int32), jnp.arange(x.shape[-1])]


@dataclasses.dataclass(frozen=True, eq=False)
class Convert(Operation):
    """The same values in the output's encoding: quantizes, requantizes or dequantizes."""

    returns_floats = True
    in_place = True

    def floats(self, x):
        return x

    def integers(self, values, encodings, output):
        return convert(values[0], encodings[0], output)
