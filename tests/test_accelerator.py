"""What an accelerator computes, beside this machine's processor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybrid_jax as hj
from hybrid_jax import core, models, quantization

pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.skipif(jax.default_backend() == "cpu", reason="there is no GPU or TPU"),
]


@pytest.fixture(scope="module")
def network():
    module = models.create("resnet8", 10, widths=(8, 16, 16))
    x = jax.random.normal(jax.random.key(0), (32, 16, 16, 3))
    return module.apply, jax.jit(module.init)(jax.random.key(1), x[:1]), x


def on_cpu(fn, *given):
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.jit(fn)(*jax.device_get(given))


def test_what_is_deployed_answers_alike(network):
    fn, params, x = network
    graph = core.trace(fn, params, x)
    planned = quantization.plan(hj.lower(fn, params, x), quantization.spec(graph, weight_bits=4))
    ranges = quantization.calibrate_edges(planned, [(x,)])
    deployed = quantization.as_deployed(planned)
    given = dict(planned.program.params), ranges, x
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(jax.jit(deployed)(*given))
    theirs = np.asarray(on_cpu(deployed, *given))
    # A step of rounding may go the other way: few answers, and by little.
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.95
    np.testing.assert_allclose(ours, theirs, atol=0.1 * np.abs(theirs).max())


def test_convolutions_stay_as_they_are(network):
    fn, params, x = network

    def loss(params):
        return jnp.square(fn(params, x)).mean()

    plain = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert plain == str(jax.make_jaxpr(core.fast_convolutions(jax.grad(loss)))(params))
