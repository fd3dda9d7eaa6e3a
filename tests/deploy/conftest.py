"""What tests of targets share: programs of the trained digits network, and runtimes of ONNX."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowered import deployed

from hybrid_jax import program as p
from hybrid_jax.deploy import onnx_sessions


class Lowered(NamedTuple):
    """The digits network as graphs, with what fake-quantization makes of all of its images."""

    floats: p.Program
    integers: p.Program
    images: np.ndarray
    expected: np.ndarray
    float_logits: np.ndarray


@pytest.fixture(scope="session")
def lowered(digits):
    made = deployed(digits.fn, digits.params, digits.images)
    images = jnp.concatenate([digits.images, digits.held_out_images])
    return Lowered(
        made.floats,
        made.integers,
        np.asarray(images),
        np.asarray(made.fake(images)),
        np.asarray(jax.jit(digits.fn)(digits.params, images)),
    )


@pytest.fixture(scope="session")
def real_images(digits):
    """Real images for models of any size and three channels, (n, H, W, 3)."""

    def of_size(side):
        x = digits.images[:768]
        x = jax.image.resize(x, (len(x), side, side, 1), "linear") - 0.3
        return jnp.concatenate([x, x[:, ::-1], x[:, :, ::-1]], -1)

    return of_size


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """OpenVINO's package tells its makers of its use where CI is not 'true'."""
    monkeypatch.setenv("CI", "true")


@pytest.fixture(params=["onnx", "openvino"])
def session(request):
    if request.param == "openvino":
        pytest.importorskip("openvino")
        # What is compared is an operation, not the bfloat16 that it computes some floats in.
        return functools.partial(onnx_sessions.openvino_session, precision="f32")
    return onnx_sessions.onnx_session
