"""Programs of the trained digits network that tests of every target share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowered import in_integers

from hybrid_jax import core, quantization
from hybrid_jax import program as p


class Lowered(NamedTuple):
    """The digits network as graphs, with what fake-quantization makes of all of its images."""

    floats: p.Program
    integers: p.Program
    images: np.ndarray
    expected: np.ndarray
    float_logits: np.ndarray


@pytest.fixture(scope="session")
def lowered(digits):
    graph = core.trace(digits.fn, digits.params, digits.images[:1])
    spec = quantization.spec(graph)
    ranges = quantization.calibrate(digits.fn, digits.params, [(digits.images,)], spec)
    fake = jax.jit(quantization.fake_quantized(digits.fn, spec))
    images = jnp.concatenate([digits.images, digits.held_out_images])
    return Lowered(
        p.lower(digits.fn, digits.params, images[:1]),
        in_integers(digits.fn, digits.params, spec, ranges, digits.images),
        np.asarray(images),
        np.asarray(fake(digits.params, ranges, images)),
        np.asarray(jax.jit(digits.fn)(digits.params, images)),
    )
