"""Whole networks of many kinds: read, planned, in integers and in files, on photographs.

Of each operation's integers `encode` says itself where they are not those of the plan.
"""

import importlib.util

import jax
import numpy as np
import pytest
from architectures import ARCHITECTURES, architecture
from lowered import deployed

from hybrid_jax import core, deploy, pruning, quantization
from hybrid_jax import program as p
from hybrid_jax.deploy import onnx_sessions

# Minutes to compile.
LONG = ("unet", "unet_bilinear", "yolo")
SAME = ("stablehlo", "packed", "c")
# Rounding of some 40 inputs of SiLU in a row, of which none has trained: scores between 0 and 1.
FAR = {"yolo": 0.06}


@pytest.fixture(autouse=True)
def _as_users_write():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def apart(wanted, got):
    """(mean, largest) difference of two trees of arrays, of the range of each array."""
    pairs = list(zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True))
    assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)
    shares = [np.abs(np.asarray(a) - np.asarray(b)) / np.ptp(np.asarray(a)) for a, b in pairs]
    return max(s.mean() for s in shares), max(s.max() for s in shares)


def halved(fn, params, images):
    """With half of the channels of each group removed."""
    graph = core.trace(fn, params, images)
    scores = pruning.magnitude(graph.kernels, params)
    masks = pruning.masks(scores, 0.5, pruning.channels(graph.groups))
    return core.shrink(fn, params, masks, images)


def session(target, path, batch):
    """What runs a file; OpenVINO computes in bfloat16 by default where the processor has it."""
    if target == "openvino":
        return onnx_sessions.openvino_session(path, 1, precision="f32")
    return deploy.TARGETS[target].session(path, batch, 1)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in ARCHITECTURES],
)
def test_in_integers_it_is_near_its_floats(name):
    fn, params, images = architecture(name)
    floats = p.lower(fn, params, images[:2])
    assert not any(isinstance(op, p.Call) for op in floats.operations)
    planned = quantization.plan(floats, quantization.spec(core.trace(fn, params, images)))
    ranges = quantization.calibrate_edges(planned, [(images,)])
    run = jax.jit(p.run(quantization.encode(planned, ranges, images[:3])))
    whole = run(images[:3])
    assert apart(jax.jit(fn)(params, images[:3]), whole)[0] < FAR.get(name, 0.02)
    assert apart(jax.tree.map(lambda y: y[:1], whole), run(images[:1]))[1] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_files_of_the_halved_network(name, bits, tmp_path):
    fn, params, images = architecture(name)
    fn, params, certificate = halved(fn, params, images)
    assert certificate.macs[1] < 0.6 * certificate.macs[0]
    assert certificate.difference < 1e-5 * max(
        np.abs(y).max() for y in jax.tree.leaves(fn(params, images))
    )
    made = deployed(fn, params, images, weight_bits=bits, activation_bits=bits)
    assert apart(made.fake(images), jax.jit(p.run(made.integers))(images))[0] < 2e-3
    run = jax.jit(p.run(made.integers))
    for target, own in deploy.TARGETS.items():
        if target == "openvino" and not importlib.util.find_spec("openvino"):
            continue
        path = tmp_path / f"model{own.suffix}"
        deploy.export_to(target, path, made.integers)
        for batch in (1, 3, 4):
            x = images[:batch]
            off = apart(run(x), session(target, path, batch)(np.asarray(x)))
            # What a runtime rounds halfway may go either way.
            assert off[0] < (1e-5 if target in SAME else 5e-3), (target, batch, off)
