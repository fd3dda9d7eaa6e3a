"""Files of a run: their sizes, their bits and what they are compared with, of small programs."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import program as p
from hybrid_jax.program import Convert, Dense
from hybrid_jax.recipes import exporting, programs


@pytest.fixture
def job(tmp_path):
    """What `write` asks of a job: six images of two pixels."""
    images = np.random.default_rng(0).integers(0, 256, (6, 2), np.uint8)
    return types.SimpleNamespace(
        workdir=tmp_path,
        splits=types.SimpleNamespace(test=types.SimpleNamespace(images=images)),
        config=types.SimpleNamespace(deploy=types.SimpleNamespace(platforms=["cpu"])),
        normalize=lambda images: images / np.float32(255),
    )


def dense(bits=None):
    """A layer of 2 × 3 weights, in floats or in integers of 4 bits."""
    bias, ends = np.float32([0, 1, 2]), {"x": p.Tensor((2,)), "y": p.Tensor((3,))}
    values = np.int8([[8, -16, 24], [32, 40, -56]])
    if bits is None:
        weights = p.Weights(values.astype(np.float32), None, bias)
        return p.Program("x", "y", ends, (Dense(("x",), "y", "dense", weights),))
    weights = p.Weights(values, np.float32([0.01, 0.02, 0.03]), bias, bits)
    steps = Convert(("x",), "q"), Dense(("q",), "y", "dense", weights)
    tensors = ends | {"q": p.Tensor((2,), p.Encoding(1 / 255))}
    return p.Program("x", "y", tensors, steps)


def test_a_record_states_what_its_file_is(job):
    images = job.normalize(job.splits.test.images)
    other = p.lower(lambda w, x: jnp.sort(x @ w, -1), jnp.ones((2, 3)), images)
    made = {
        name: exporting.Exported(program, np.asarray(jax.jit(p.run(program))(images)))
        for name, program in (("dense", dense()), ("equal bytes", dense(bits=4)), ("best", other))
    }
    records = exporting.write(job, made, ["stablehlo", "packed", "c"], pairs=1)
    found = {(r["target"], r["model"]): r for r in records}
    # What a target cannot express is said in its place.
    assert "operations that C has" in found.pop(("c", "best"))["error"]
    assert "error" in found.pop(("packed", "best"))
    found.pop(("stablehlo", "best"))
    for (target, model), record in found.items():
        assert record["artifact"] == programs.artifact(model, target)
        path = job.workdir / record["artifact"]
        manifest = json.loads(path.with_name(path.name + ".json").read_text())
        # C is text: its size is what its constants take.
        size = manifest["flash"] if target == "c" else path.stat().st_size
        assert (record["bytes"], record["agreement"]) == (size, 1.0)
        assert record["reference"] == "dense"
        if target == "stablehlo":
            assert manifest["platforms"] == ["cpu"]
    assert {name: r["kernel_bits"] for name, r in found.items()} == {
        ("stablehlo", "dense"): [32],
        ("stablehlo", "equal bytes"): [8],
        ("packed", "dense"): [32],
        ("packed", "equal bytes"): [4],
        ("c", "dense"): [32],
        ("c", "equal bytes"): [4],
    }
