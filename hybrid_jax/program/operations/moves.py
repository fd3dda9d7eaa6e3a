"""Operations that move entries, and what they move beside those of an input."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from hybrid_jax.program import forms
from hybrid_jax.program.encoding import Encoding
from hybrid_jax.program.operations.base import Array, Operation, Pairs, convert, quantize


@dataclasses.dataclass(frozen=True, eq=False)
class Move(Operation):
    """Entries of the input, and zeros: in its encoding."""

    same_encoding = True

    def floats(self, x):
        return self.move(x, 0.0)

    def integers(self, values, encodings, output):
        return self.move(values[0], output.zero_point)

    def move(self, x: Array, zero: float | int) -> Array:
        """The entries of x, with what stands for zero."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class Reshape(Move):
    """The same values in row-major order under another shape."""

    shape: tuple[int, ...]

    def move(self, x, zero):
        return x.reshape(x.shape[0], *self.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Transpose(Move):
    """Axis i of the output is axis permutation[i] of an example."""

    permutation: tuple[int, ...]

    def move(self, x, zero):
        return x.transpose(0, *(axis + 1 for axis in self.permutation))


@dataclasses.dataclass(frozen=True, eq=False)
class Broadcast(Move):
    """Axes of length 1 repeated to the lengths of `shape`."""

    shape: tuple[int, ...]

    def move(self, x, zero):
        return jnp.broadcast_to(x, (x.shape[0], *self.shape))


@dataclasses.dataclass(frozen=True, eq=False)
class Pad(Move):
    """A value around the values, (before, after) along each axis; it is 0, or what is stated."""

    padding: Pairs
    value: float = 0.0

    def floats(self, x):
        return self.move(x, self.value)

    def integers(self, values, encodings, output):
        return self.move(values[0], self.fill(output))

    def fill(self, encoding: Encoding | None) -> float | int:
        """The value as it is stored."""
        if encoding is None:
            return self.value
        step = np.rint(self.value / encoding.scale) + encoding.zero_point
        return int(np.clip(step, encoding.low, encoding.high))

    def move(self, x, zero):
        return forms.pad(x, self.padding, zero)


@dataclasses.dataclass(frozen=True, eq=False)
class Slice(Move):
    """Entries start, start + stride, … before stop along each axis."""

    starts: tuple[int, ...]
    stops: tuple[int, ...]
    strides: tuple[int, ...]

    def move(self, x, zero):
        return x[(slice(None), *map(slice, self.starts, self.stops, self.strides))]


@dataclasses.dataclass(frozen=True, eq=False)
class Gather(Move):
    """The entries of these indices along an axis of an example, in their order."""

    axis: int
    indices: tuple[int, ...]

    def move(self, x, zero):
        return jnp.take(x, np.int32(self.indices), self.axis + 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Concatenate(Operation):
    """The inputs one after the other along `axis` of an example."""

    axis: int

    def floats(self, *values):
        return self._joined(values)

    def integers(self, values, encodings, output):
        return self._joined([convert(x, e, output) for x, e in zip(values, encodings, strict=True)])

    def _joined(self, values):
        batch = next((n for value in values if (n := value.shape[0]) != 1), 1)
        parts = [jnp.broadcast_to(value, (batch, *value.shape[1:])) for value in values]
        return jnp.concatenate(parts, self.axis + 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Constant(Operation):
    """The same for every example, float32: a position embedding, a scale of each place."""

    value: np.ndarray

    def floats(self):
        return jnp.asarray(self.value)[None]

    def integers(self, values, encodings, output):
        return quantize(self.floats(), output)
