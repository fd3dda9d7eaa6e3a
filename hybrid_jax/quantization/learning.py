"""Learning: where the range of a tensor comes from, and the gradient by which training moves it."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from hybrid_jax.quantization import gradients
from hybrid_jax.quantization.schemes import SCHEMES


class Learning(NamedTuple):
    """One way of learning.

    `quantize(x, quantizer, span, bits, count, key) -> x̂` fake-quantizes `x`, float32 of any shape,
    to the range `span` by the gradient that it stands for; the other arguments are as of
    `specs.apply`. Forwards all of them give the grid's nearest value.
    """

    quantize: Callable[..., jax.Array]
    schemes: Sequence[str] = tuple(SCHEMES)  # those that it serves
    rounded: bool = True  # whether it serves scales that are rounded to a power of two
    dynamic: bool = False  # whether the range is found from each tensor anew, and is none of a file


def _lsq(x, quantizer, span, bits, count, key):
    return gradients.lsq(x, quantizer.grid(span, bits), count, key)


def _pact(x, quantizer, span, bits, count, key):
    del quantizer, count
    return gradients.pact(x, span, bits, key)


def _straight_through(x, quantizer, span, bits, count, key):
    del count
    return gradients.fake_quant(x, quantizer.grid(span, bits), key)


LEARNING: dict[str, Learning] = {
    "lsq": Learning(_lsq, [name for name in SCHEMES if name != "binary"]),
    "pact": Learning(_pact, ["affine"], rounded=False),
    "fixed": Learning(_straight_through),
    "dynamic": Learning(_straight_through, dynamic=True),
}
"""Every one by name, open to users: `LEARNING['mine'] = Learning(f)`."""


def of_scheme(scheme: str) -> list[str]:
    """Names of those that serve a scheme, and whose ranges are known, as files have them.

    Example:
      >>> of_scheme('affine'), of_scheme('symmetric')
      (['lsq', 'pact', 'fixed'], ['lsq', 'fixed'])
    """
    return [n for n, own in LEARNING.items() if scheme in own.schemes and not own.dynamic]


of_weights, of_activations = (
    functools.partial(of_scheme, scheme) for scheme in ("symmetric", "affine")
)
