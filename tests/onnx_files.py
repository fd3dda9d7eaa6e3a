"""What tests of ONNX files share: their contents, what runs of them, how far answers are apart."""

import collections

import jax
import numpy as np
import pytest

from hybrid_jax import deploy
from hybrid_jax import program as p
from hybrid_jax.deploy import onnx_sessions
from hybrid_jax.program import operations

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

IMAGE = 6, 6, 16
OUT = p.Encoding(0.0297, 120)
FOUR_BITS = p.Encoding(0.293, 0, 0, 15)


def contents(program, **options):
    return deploy.to_onnx(program, **options).SerializeToString()


def allowed(session):
    """Steps by which sums of products may differ: OpenVINO multiplies by its scales one by one."""
    return 0 if session is onnx_sessions.onnx_session else 1


def steps_apart(session, program, xs):
    """By how many steps of its encoding the last result differs from the reference's."""
    got, want = session(contents(program))(*xs), np.asarray(jax.jit(p.run(program))(*xs))
    (last,) = program.operations[-1].inputs
    return np.abs(np.rint((got - want) / program.encoding(last).scale)).astype(int)


def between(op, taken, given_, shape, made):
    """An operation of 'a' that makes 'b', between conversions; its shapes and encodings."""
    tensors = {"x": p.Tensor(taken), "a": p.Tensor(taken, given_)}
    tensors |= {"b": p.Tensor(shape, made), "y": p.Tensor(shape)}
    return p.Program("x", "y", tensors, (p.Convert(("x",), "a"), op, p.Convert(("b",), "y")))


def optimized(model, folder):
    """The nodes that ONNX Runtime, left to itself, runs for a model, those of branches included."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

    def nodes(graph):
        for node in graph.node:
            yield node
            for attribute in node.attribute:
                yield from nodes(attribute.g)

    return collections.Counter(
        node.op_type for node in nodes(onnx.load(options.optimized_model_filepath).graph)
    )


def on_grid(encoding):
    x = np.random.default_rng(0).normal(0, 1.5, (4, *IMAGE)).astype(np.float32)
    return np.asarray(operations.rounded(x, encoding))
