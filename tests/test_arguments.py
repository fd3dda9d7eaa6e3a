"""What is handed in by mistake is named in one line, wherever it is."""

import jax
import jax.numpy as jnp
import pytest

from hybrid_jax import core, deploy, pruning, quantization
from hybrid_jax import program as p

PARAMS, X = {"a": jnp.ones((2, 4)), "b": jnp.ones((4, 2))}, jnp.ones((3, 2))


def fn(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


GRAPH = core.trace(fn, PARAMS, X)
SPEC = quantization.spec(GRAPH)
Q_FN = quantization.fake_quantized(fn, SPEC)


def masks(params):
    scores = pruning.magnitude(GRAPH.kernels, params)
    return pruning.masks(scores, 0.5, pruning.channels(GRAPH.groups))


MISTAKES = {
    "groups must be the groups of a graph": lambda: pruning.channels(GRAPH),
    "ranges must be a mapping, as calibrate returns it": lambda: quantization.fake_quantized(
        fn, SPEC
    )(PARAMS, X),
    "program must be a Program, .* got function": lambda: deploy.export_to("onnx", "x", fn),
    "params must be arrays, got tracers: calibrate runs": lambda: jax.jit(
        lambda params: quantization.calibrate(fn, params, [(X,)], SPEC)
    )(PARAMS),
    "params must be arrays, got tracers: shrink runs": lambda: jax.jit(
        lambda params: core.shrink(fn, params, masks(PARAMS), X)[1]
    )(PARAMS),
    "params must be arrays, got tracers: lower runs": lambda: jax.jit(
        lambda params: p.lower(fn, params, X).params
    )(PARAMS),
    r"x must have shape \(B, 2\), got \(2,\)": lambda: p.run(p.lower(fn, PARAMS, X))(X[0]),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_named(message):
    with pytest.raises(ValueError, match=message):
        MISTAKES[message]()


def test_a_graph_says_what_it_is_in_a_line():
    assert repr(GRAPH) == "Graph(2 sites, 1 groups, 2 frozen axes, 16 MACs)"
