"""Operations over axes and windows of an example."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hybrid_jax.program import forms
from hybrid_jax.program.operations.base import Operation, Pairs, along, finish, steps_from_zero
from hybrid_jax.program.operations.moves import Move


@dataclasses.dataclass(frozen=True, eq=False)
class Mean(Operation):
    """The mean over axes of an example, which go: (H, W, C) to (C,)."""

    axes: tuple[int, ...] = (0, 1)

    returns_floats = True

    def floats(self, x):
        return x.sum(self._places) / np.float32(self.count(x.shape[1:]))

    def integers(self, values, encodings, output):
        """Σ (x − z_x), divided by the count with the scales."""
        (x,), (encoding,) = values, encodings
        total = steps_from_zero(x, encoding).sum(self._places)
        return finish(total, [encoding.scale], output, count=self.count(x.shape[1:]))

    def count(self, shape: tuple[int, ...]) -> int:
        """Entries of an example of that shape that become one."""
        return math.prod(shape[axis] for axis in self.axes)

    @property
    def _places(self):
        return tuple(axis + 1 for axis in self.axes)


@dataclasses.dataclass(frozen=True, eq=False)
class Largest(Move):
    """The largest value over axes of an example, which go."""

    axes: tuple[int, ...]

    def move(self, x, zero):
        return x.max(tuple(axis + 1 for axis in self.axes))


@dataclasses.dataclass(frozen=True, eq=False)
class MaxPool(Move):
    """The largest value of each window of (H, W, C), padding aside."""

    window: tuple[int, int]
    strides: tuple[int, int]
    padding: Pairs = ((0, 0), (0, 0))

    def move(self, x, zero):
        least = 0 if x.dtype == jnp.uint8 else -np.inf
        return _windows(self, x, least, lax.max, least)


@dataclasses.dataclass(frozen=True, eq=False)
class AveragePool(Operation):
    """The mean of each window of (H, W, C); padding counts as zeros, or not at all."""

    window: tuple[int, int]
    strides: tuple[int, int]
    padding: Pairs = ((0, 0), (0, 0))
    count_padding: bool = True

    returns_floats = True

    def floats(self, x):
        counts = self.counts(x.shape[1:]).astype(np.float32)
        return _windows(self, x, 0, lax.add, 0) / along(counts, x)

    def integers(self, values, encodings, output):
        """Σ (x − z_x) over the window, divided by the count with the scales."""
        (x,), (encoding,) = values, encodings
        total = _windows(self, steps_from_zero(x, encoding), 0, lax.add, 0)
        return finish(total, [encoding.scale], output, count=self.counts(x.shape[1:]))

    def counts(self, shape: tuple[int, ...]) -> np.ndarray:
        """Entries of which each place's is the mean: () or, without padding, (H', W', 1)."""
        if self.count_padding:
            return np.int32(math.prod(self.window))
        along = []
        for n, size, stride, (before, after) in zip(
            shape, self.window, self.strides, self.padding, strict=False
        ):
            starts = np.arange(0, n + before + after - size + 1, stride) - before
            along.append(np.minimum(starts + size, n) - np.maximum(starts, 0))
        return np.int32(along[0][:, None, None] * along[1][None, :, None])


def _windows(op, x, start, reduce, zero):
    x = forms.pad(x, [*op.padding, (0, 0)], zero)
    # A traced start hides from JAX which reduction it is, and so its derivative.
    return lax.reduce_window(
        x, np.asarray(start, x.dtype)[()], reduce, (1, *op.window, 1), (1, *op.strides, 1), "VALID"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Softmax(Operation):
    """Softmax over an axis of an example, in floats."""

    axis: int = -1

    integral = False

    def floats(self, x):
        return jax.nn.softmax(x, self.axis + 1 if self.axis >= 0 else self.axis)


@dataclasses.dataclass(frozen=True, eq=False)
class Normalize(Operation):
    """(x − mean) / √(variance + epsilon) over axes of an example, in floats.

    Source: Ba et al., Layer Normalization, arXiv 1607.06450; over the axes of a group of channels
    Wu and He, Group Normalization, arXiv 1803.08494.
    """

    axes: tuple[int, ...]
    epsilon: float

    integral = False

    def floats(self, x):
        places = tuple(axis + 1 for axis in self.axes)
        centred = x - x.mean(places, keepdims=True)
        variance = jnp.square(centred).mean(places, keepdims=True)
        return centred * lax.rsqrt(variance + np.float32(self.epsilon))
