"""The forms of one convolution, equal up to rounding.

The gradients of a convolution are convolutions too. That of the input meets the result's gradient,
its entries set apart by the strides, with the turned kernel. That of the kernel has a window as
large as a whole image, and as many places as the kernel has taps: XLA computes it badly on a CPU,
and in loops far worse; as a matrix product over all positions it is fast.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_jax.core import versions

# Entries of the patches that are side by side at a time: a megabyte stays in a core's cache.
_PATCHES = 2**18
# Channels that a product needs to be fast, found by measuring: two vectors of 16 numbers.
_ENOUGH = 32


class Conv(NamedTuple):
    """How a window meets an input, along each axis of space; negative padding cuts.

    `spread` and `dilation` are the distances of the input's and of the window's entries, `dtype` is
    that of the sums, by default the operands'.
    """

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    spread: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    precision: Any = None
    dtype: Any = None

    def places(self, space: Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
        """How many places the window has along each axis."""
        return tuple(
            ((size - 1) * spread + sum(sides) - (taps - 1) * dilation) // stride + 1
            for size, taps, stride, sides, spread, dilation in zip(
                space, window, self.strides, self.padding, self.spread, self.dilation
            )
        )

    def turned(self, space: Sequence[int], window: Sequence[int], places: Sequence[int]) -> "Conv":
        """How the turned window meets the result's gradient, for that of the input."""
        padding = []
        for i, (low, _) in enumerate(self.padding):
            reach = (window[i] - 1) * self.dilation[i]
            size = (space[i] - 1) * self.spread[i] + 1
            span = (places[i] - 1) * self.strides[i] + 1
            padding.append((reach - low, size + low - span))
        return self._replace(strides=self.spread, spread=self.strides, padding=tuple(padding))


def channels_last(conv: Conv, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """One convolution of x (B, *space, C) with (*window, C / groups, O): (B, *places, O)."""
    *along, groups, precision, dtype = conv
    return lax.conv_general_dilated(
        x,
        kernel,
        *along,
        last_numbers(x.ndim),
        groups,
        precision=precision,
        preferred_element_type=dtype,
    )


def last_numbers(rank: int) -> lax.ConvDimensionNumbers:
    """The layout with channels last, of arrays of that rank."""
    last = (0, rank - 1, *range(1, rank - 1))
    return lax.ConvDimensionNumbers(last, (rank - 1, rank - 2, *range(rank - 2)), last)


def neighbours(conv: Conv, kernel: Sequence[int], places: Sequence[int]) -> int:
    """How many places along the last axis `together` takes as one; 1 if their outputs do as is.

    No more than double the work: a place's kernel is wider by the strides to the last of them.
    """
    *_, taps, _, outputs = kernel
    if conv.groups > 1 or conv.spread[-1] > 1 or conv.dilation[-1] > 1:
        return 1
    most = min(_ENOUGH // outputs, taps // conv.strides[-1] + 1)
    return next(count for count in range(max(most, 1), 0, -1) if places[-1] % count == 0)


def together(conv: Conv, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same with `neighbours` as outputs of one place, of whose kernel a part is zero for each.

    What is not finite reaches those beside it.
    """
    *window, _, outputs = kernel.shape
    count = neighbours(conv, kernel.shape, conv.places(x.shape[1:-1], window))
    *strides, stride = conv.strides
    still = [(0, 0)] * (len(window) - 1)
    moved = [
        jnp.pad(kernel, [*still, (i * stride, (count - 1 - i) * stride), (0, 0), (0, 0)])
        for i in range(count)
    ]
    wide = jnp.concatenate(moved, -1)
    y = channels_last(conv._replace(strides=(*strides, count * stride)), x, wide)
    return y.reshape(*y.shape[:-2], -1, outputs)


def at_once(conv: Conv, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same as the product of what every place sees with the kernel."""
    *window, inner, outputs = kernel.shape
    places = conv.places(x.shape[1:-1], window)
    weights = kernel.reshape(math.prod(window) * inner, conv.groups, -1)
    y = _product(conv, _side_by_side(conv, x, window, places), weights, "mgk,kgo->mgo")
    return y.reshape(-1, *places, outputs)


def patches(conv: Conv, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same, so few images at a time that a cache holds what they see."""
    window = kernel.shape[:-2]
    count = _steps(window, conv.places(x.shape[1:-1], window), x)
    if count == 1:
        return at_once(conv, x, kernel)
    parts = x.reshape(count, -1, *x.shape[1:])
    y = lax.map(lambda part: at_once(conv, part, kernel), parts)
    return y.reshape(-1, *y.shape[2:])


def taps(conv: Conv, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same of a depthwise convolution, as a sum over the taps, element by element."""
    *window, _, channels = kernel.shape
    dtype = conv.dtype or x.dtype
    seen = _taps(conv, x, window, conv.places(x.shape[1:-1], window))
    weights = kernel.reshape(-1, *[1] * (x.ndim - 1), channels).astype(dtype)
    return sum(tap.astype(dtype) * weight for tap, weight in zip(seen, weights, strict=True))


def tall(conv: Conv, window: Sequence[int], x: jax.Array, dy: jax.Array) -> jax.Array:
    """The kernel's gradient (*window, C / groups, O), of x (B, *space, C), dy (B, *places, O)."""

    def part(x, dy):
        seen = _side_by_side(conv, x, window, dy.shape[1:-1])
        # The longer rows last: a product is faster so than the other way round.
        return _product(conv, dy.reshape(len(seen), conv.groups, -1), seen, "mgo,mgk->gok")

    count = _steps(window, dy.shape[1:-1], x)
    gradient = _summed(part, count, x, dy)
    return gradient.reshape(dy.shape[-1], -1).T.reshape(*window, -1, dy.shape[-1])


def wide(conv: Conv, window: Sequence[int], x: jax.Array, dy: jax.Array) -> jax.Array:
    """The same as x by dy seen through the taps of the turned window."""
    turned = conv.turned(x.shape[1:-1], window, dy.shape[1:-1])

    def part(x, dy):
        seen = _side_by_side(turned, dy, window, x.shape[1:-1])
        seen = seen.reshape(len(seen), conv.groups, math.prod(window), -1)
        return _product(conv, x.reshape(len(seen), conv.groups, -1), seen, "mgc,mgto->tcgo")

    count = _steps(window, x.shape[1:-1], dy)
    gradient = _summed(part, count, x, dy).reshape(*window, -1, dy.shape[-1])
    return jnp.flip(gradient, range(len(window)))


def tapped(conv: Conv, window: Sequence[int], x: jax.Array, dy: jax.Array) -> jax.Array:
    """The same of a depthwise convolution: a sum for each tap, element by element."""

    def part(x, dy):
        # A product with ones adds faster than a sum over leading axes.
        ones = jnp.ones(dy.size // dy.shape[-1], dy.dtype)
        seen = _taps(conv, x, window, dy.shape[1:-1])
        return jnp.stack([ones @ (tap * dy).reshape(len(ones), -1) for tap in seen])

    count = _steps((2,), dy.shape[1:-1], dy)
    return _summed(part, count, x, dy).reshape(*window, 1, -1)


RESULT: dict[str, Callable[..., jax.Array]] = {
    "channels last": channels_last,
    "together": together,
    "patches": patches,
    "taps": taps,
}
"""Forms of the result, and of the gradient of an input: form(conv, x, kernel)."""

GRADIENT: dict[str, Callable[..., jax.Array]] = {"tall": tall, "wide": wide, "taps": tapped}
"""Forms of the gradient of a kernel: form(conv, window, x, dy)."""


def _taps(conv, x, window, places):
    """What the places see of x through each entry of the window."""
    edges = [(*sides, spread - 1) for sides, spread in zip(conv.padding, conv.spread)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    spans = [
        [slice(i * apart, i * apart + (reached - 1) * stride + 1, stride) for i in range(size)]
        for size, reached, stride, apart in zip(window, places, conv.strides, conv.dilation)
    ]
    return [x[:, *span] for span in itertools.product(*spans)]


def _side_by_side(conv, x, window, places):
    """(positions, groups, taps and channels of a group)."""
    inner = x.shape[-1] // conv.groups
    seen = [tap.reshape(-1, conv.groups, inner) for tap in _taps(conv, x, window, places)]
    return jnp.concatenate(seen, -1)


def _product(conv, a, b, subscripts):
    """Einsum of what has an axis g of groups in every term; without it if there is one group."""
    if conv.groups == 1:
        left, right, out = (part.index("g") for part in subscripts.replace("->", ",").split(","))
        a, b = jnp.squeeze(a, left), jnp.squeeze(b, right)
        y = _product(conv._replace(groups=0), a, b, subscripts.replace("g", ""))
        return jnp.expand_dims(y, out)
    return jnp.einsum(subscripts, a, b, precision=conv.precision, preferred_element_type=conv.dtype)


def _steps(window, places, seen):
    """In how many equal parts to take the images; all at once if patches are no copies."""
    images, taps = len(seen), math.prod(window)
    fit = _PATCHES // (math.prod(places) * taps * seen.shape[-1]) if taps > 1 else images
    fit = max(1, min(images, fit))
    return next(count for count in range(-(-images // fit), images + 1) if images % count == 0)


def _summed(part, count, *arrays):
    if count == 1:
        return part(*arrays)
    parts = [a.reshape(count, -1, *a.shape[1:]) for a in arrays]
    shape = jax.eval_shape(part, *(a[0] for a in parts))
    zeros = versions.varying_as(jnp.zeros(shape.shape, shape.dtype), arrays[0])
    return lax.scan(lambda total, own: (total + part(*own), None), zeros, parts)[0]
