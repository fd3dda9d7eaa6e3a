"""Mixtures and cascades in every target: who answers, and that only what is needed runs."""

import dataclasses
import re

import choices
import jax
import numpy as np
import pytest

from hybrid_jax import deploy
from hybrid_jax import program as p
from hybrid_jax.deploy import artifact, c, litert
from hybrid_jax.program import Program, Tensor, choice


@pytest.fixture(params=deploy.TARGETS)
def opened(request, tmp_path):
    """opened(program, batch) -> fn(x): written for a target, and run there."""

    def run(program, batch=1, **options):
        path, target = tmp_path / "model", deploy.TARGETS[request.param]
        try:
            deploy.export_to(request.param, path, program, **options)
            session = target.session(path, batch=batch, threads=1)
        except ImportError as error:
            pytest.skip(str(error))
        return session

    run.target = request.param
    return run


@pytest.mark.parametrize("shape", [(2,), (1, 2)])
@pytest.mark.parametrize("share", choices.BY_HAND)
def test_three_images_by_hand(opened, share, shape):
    x, run = choices.IMAGES.reshape(-1, *shape), opened(choices.by_hand(share, shape))
    got = np.concatenate([run(x[i : i + 1]) for i in range(3)])
    np.testing.assert_array_equal(got, np.float32(choices.BY_HAND[share]).reshape(x.shape))


def test_stages_in_integers_keep_a_share(opened):
    made = dataclasses.replace(choices.cascade(), share=0.25)
    x = choices.images(12)
    want = np.asarray(jax.jit(p.run(made))(x))
    assert np.abs(want - np.asarray(p.run(choices.cascade())(x))).max() > 0.01
    run = opened(made)
    got = np.concatenate([run(x[i : i + 1]) for i in range(12)])
    if opened.target in ("c", "packed", "stablehlo"):
        np.testing.assert_array_equal(got, want)
    close = np.abs(got - want).max(-1) < 0.05 * np.abs(want).max()
    assert close.mean() > 0.9  # one that is another's in rounding may be handed on


CHOICES = {
    "mixture": choices.mixture,
    "cascade": choices.cascade,
    "mixture in floats": lambda: choices.in_floats(choices.mixture()),
    "cascade in floats": lambda: choices.in_floats(choices.cascade()),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_answers_as_it_runs_here_at_any_batch(opened, name):
    made, x = CHOICES[name](), choices.images()
    want = np.asarray(jax.jit(p.run(made))(x))
    each = np.stack([np.asarray(p.run(part)(x)) for part in made.answering])

    def who(answers):
        """The part whose answers these are: what runtimes round otherwise is far less."""
        distance = np.abs(each[:, : len(answers)] - answers).max(-1)
        assert distance.min(0).max() < 0.05 * np.abs(want).max()
        return distance.argmin(0)

    assert set(who(want)) == {0, 1, 2}
    run = opened(made)
    for batch in (1, 3, 4):
        got = np.concatenate([run(x[i : i + batch]) for i in range(0, 12, batch)])
        np.testing.assert_array_equal(who(got), who(want)[:12])
        if opened.target in ("c", "packed", "stablehlo") and "floats" not in name:
            np.testing.assert_array_equal(got, want[:12])


@pytest.mark.parametrize("kind", [p.Mixture, p.Cascade])
def test_a_choice_of_bytes(opened, kind):
    made = choices.of_bytes(kind)
    x = np.random.default_rng(1).integers(0, 256, (12, 6), np.uint8)
    run, want = opened(made), np.asarray(p.run(made)(x))
    got = np.concatenate([run(x[i : i + 1]) for i in range(12)])
    within = 1e-2 if opened.target == "openvino" else 1e-5  # which may compute in bfloat16
    np.testing.assert_allclose(got, want, atol=within * np.abs(want).max())


@pytest.mark.parametrize("name", ["mixture in floats", "cascade in floats"])
def test_a_nan_is_an_answer(opened, name):
    if opened.target == "openvino":
        pytest.skip("OpenVINO has no NaN")
    made, x = CHOICES[name](), choices.images(6)
    x[3, 2, 2, 1] = np.nan
    run = opened(made)
    got = np.concatenate([run(x[i : i + 1]) for i in range(6)])
    np.testing.assert_array_equal(np.isnan(got).all(-1), np.arange(6) == 3)
    want = np.asarray(p.run(made)(x))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.nanmax(np.abs(want)))


@pytest.mark.parametrize("count", [2, 5, 10])
def test_every_target_decides_alike_to_the_bit(opened, count):
    """On logits of a coarse grid, of which many are exactly at the threshold."""
    rng = np.random.default_rng(count)
    grid = rng.integers(-4, 5, (400, count)).astype(np.float32)
    fine = rng.normal(scale=2, size=(400, count)).astype(np.float32)
    x = np.concatenate([grid, fine])
    values = np.sort(choices.softmax(x.astype(np.float64)).max(-1))
    identity = Program("x", "x", {"x": Tensor((count,))}, ())
    for threshold in (float(values[250]), float(values[600])):
        asked = choice.below(identity, threshold)
        _, want = jax.jit(p.run(asked))(x)
        assert 0.1 < np.mean(want) < 0.9
        _, unsure = opened(asked, len(x))(x)
        assert unsure.dtype == bool
        np.testing.assert_array_equal(unsure, want)


def test_only_the_stages_that_an_image_needs_run(tmp_path):
    made = choices.cascade()
    deploy.export_to("stablehlo", tmp_path / "model", made, platforms=["cpu"])
    text = jax.export.deserialize(bytearray((tmp_path / "model").read_bytes())).mlir_module()
    assert text.count('"stablehlo.case"') == 2
    code = c.to_c(made)
    run = code[
        code.index("void model_run_in(void *memory, const float *input, float *output)\n{") :
    ]
    assert re.findall(r"part_(\d)|(return)", run)[:5] == [
        ("0", ""), ("", "return"), ("1", ""), ("", "return"), ("2", ""),
    ]  # fmt: skip
    alone = [c.export_c(tmp_path / "part", part)["ram"] for part in made.written]
    assert c.export_c(tmp_path / "model", made)["ram"] == max(alone)
    data = litert.to_litert(made)
    signatures = litert.interpret(data).get_signature_list()
    assert {name: len(ends["outputs"]) for name, ends in signatures.items()} == {
        "stage_0": 2, "stage_1": 2, "stage_2": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match="batch must be 1 for a mixture or cascade, got 2"):
        litert.litert_session(data, batch=2)


def test_branches_of_onnx_hold_the_stages(tmp_path):
    onnx = pytest.importorskip("onnx")

    def branches(graph):
        found = [n for n in graph.node if n.op_type == "If"]
        kinds = [sum(n.op_type == "Conv" for n in graph.node)]
        for node in found:
            kinds += [branches(attribute.g) for attribute in node.attribute]
        return kinds

    deploy.export_to("onnx", tmp_path / "model", choices.cascade())
    (scan,) = onnx.load(tmp_path / "model").graph.node
    # A convolution, and where that stage is unsure two, and where that is unsure two more.
    (body,) = (a.g for a in scan.attribute if a.name == "body")
    assert branches(body) in ([1, [2, [2], [0]], [0]], [1, [0], [2, [0], [2]]])


@pytest.mark.parametrize("name", ["mixture", "cascade"])
def test_the_manifest_of_a_choice(tmp_path, name):
    made = CHOICES[name]()
    bits = {"onnx": [8], "packed": [4, 8], "c": [4, 8]}
    for target in ("stablehlo", "onnx", "tflite", "packed", "c"):
        manifest = deploy.export_to(target, tmp_path / target, made)
        assert manifest["kernel_bits"] == bits.get(target, [8]), target
    _, facts = artifact.read(tmp_path / "tflite")
    assert facts["inputs"] == [{"shape": [1, *choices.SHAPE], "dtype": "float32"}]
    assert facts["outputs"] == [{"shape": [1, 4], "dtype": "float32"}]
