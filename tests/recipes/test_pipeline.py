"""The whole run on a few digits, and what a killed one leaves."""

import dataclasses
import json
import shutil

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import core, experts, recipes, training
from hybrid_jax.recipes import controls, gate, pipeline, prune, rows
from launch import export

pytestmark = pytest.mark.slow

SOURCES = "criterion+width+classes+bootstrap"


def tiny(**changes):
    """A run of seconds: two small experts, a few steps each; all optional stages."""
    config = recipes.default_config()
    config.data.train_size = 300
    config.model.widths = (4, 8, 8)
    config.model.shortcut = "project"
    config.experts.count = 2
    config.experts.method = "map"
    config.evaluation.latency_calls = 2
    for stage, steps in (("parent", 30), ("experts", 6), ("gate", 4), ("joint", 4)):
        config[stage].steps = steps
        config[stage].batch_size = 32
    config.joint.refit = True
    config.collapse.steps = 4
    config.controls.same_bytes = False
    config.checkpoint_every = 2
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run, of a cheap and a dear expert: what it was and what it made."""
    config = tiny(experts__diversity=SOURCES)
    run = recipes.of_config(config, tmp_path_factory.mktemp("run") / "done")
    return run, run()


def of(result):
    """{name: row}."""
    return {row.name: row for row in result.results.rows}


def test_results_have_every_row_and_number(done):
    run, result = done
    found = of(result)
    assert list(found)[:7] == [
        "parent",
        "parent in int8",
        "expert 0",
        "expert 1",
        "top-1 mixture",
        "top-2 mixture",
        "soft mixture",
    ]
    assert {"random gate", "average of all experts", "oracle gate", "equal BOPs"} < set(found)
    for row in found.values():
        assert row.accuracy == pytest.approx(np.mean(row.correct))
        assert min(row.macs, row.bops, row.parameters_active) > 0
        for file in row.files.values():
            assert file.bytes == (run.task.workdir / file.artifact).stat().st_size
            assert file.agreement >= 0.98
            assert file.accuracy == pytest.approx(row.accuracy, abs=0.02)
    shipped = {name for name, row in found.items() if row.files}
    best = shipped & {"expert 0", "expert 1", "best expert"}
    assert len(best) == 1  # by validation
    fixed = {"parent", "parent in int8", "top-1 mixture", "equal BOPs", "collapsed mixture"}
    assert shipped - best == fixed
    assert found["oracle gate"].accuracy >= max(
        found[name].accuracy for name in ("expert 0", "expert 1", "top-1 mixture")
    )
    # All experts and the gate are stored; one expert, as often as it is chosen, and the gate run.
    mixture, both = found["top-1 mixture"], [found["expert 0"], found["expert 1"]]
    own = found["soft mixture"].macs - sum(e.macs for e in both)
    share = result.results.gate["share"]
    assert mixture.macs == pytest.approx(own + np.dot(share, [e.macs for e in both]))
    assert mixture.macs_worst == own + max(e.macs for e in both)
    assert np.allclose(np.sum(result.results.gate["usage"], axis=1), 1)
    assert np.sum(result.results.confusion["parent"]) == len(run.task.splits.test.labels)


def test_channels_are_physically_removed(done):
    _, result = done
    # Of widths 4, 8, 8 a half or a quarter stays: MACs fall to about the square of it.
    for model, kept in zip(result.state.experts, (0.25, 0.5), strict=True):
        assert model.facts["difference"] < 1e-5
        before, after = model.facts["macs"]
        assert kept**2 / 2 * before < after < 1.4 * kept**2 * before
    stem = "params/stem/conv/kernel"
    wide, *small = (
        core.flatten_paths(model.cut.variables)[stem].shape
        for model in (result.state.parent, *result.state.experts)
    )
    assert [wide, *small] == [(3, 3, 1, 4), (3, 3, 1, 1), (3, 3, 1, 2)]
    assert of(result)["expert 0"].macs == result.state.experts[0].facts["macs"][1]


def test_a_gate_that_was_fitted_to_other_experts_is_refused(done):
    run, result = done
    state = result.state
    assert state.gate.facts["fitted_to"] == experts.fingerprint([m.params for m in state.experts])
    with pytest.raises(ValueError, match=r"gate must be fitted to the experts .*: fit it again"):
        gate.check_fitted(state.before, state.gate)
    with pytest.raises(ValueError, match="gate must be fitted to the experts"):
        rows.evaluate(run.task, state._replace(experts=state.before))


def test_a_run_goes_on_where_it_was(done, tmp_path):
    run, result = done
    path = tmp_path / "again"
    shutil.copytree(run.task.workdir, path)
    # Killed in the midst of joint training: its last checkpoint and all that follows are missing.
    for file in (path / "stages").glob("0[4-9]*"):
        file.unlink()
    joint = path / "checkpoints" / "joint"
    shutil.rmtree(max(joint.glob("[0-9]*"), key=lambda own: int(own.name)))
    for stage in ("refit", "equal_BOPs", "collapse"):
        shutil.rmtree(path / "checkpoints" / stage)
    again = recipes.run(tiny(experts__diversity=SOURCES), path)
    for ours, theirs in zip(
        (*result.state.experts, result.state.gate, *result.state.singles.values()),
        (*again.state.experts, again.state.gate, *again.state.singles.values()),
        strict=True,
    ):
        chex.assert_trees_all_equal(ours.params, theirs.params)
    assert [row.accuracy for row in result.results.rows] == [
        row.accuracy for row in again.results.rows
    ]


def test_another_run_is_refused(done, tmp_path):
    run, _ = done
    config = tiny(experts__diversity=SOURCES)
    config.gate.steps = 5
    with pytest.raises(ValueError, match=r"config\.gate\.steps=4 where this config has 5"):
        recipes.run(config, run.task.workdir)
    config = tiny(experts__diversity=SOURCES)
    other = recipes.of_config(config, run.task.workdir)
    splits = other.task.splits
    images = splits.train.images.copy()
    images[0, 0, 0, 0] ^= 1
    changed = dataclasses.replace(splits, train=splits.train._replace(images=images))
    task = dataclasses.replace(other.task, splits=changed)
    with pytest.raises(ValueError, match="of other images and labels"):
        dataclasses.replace(other, task=task).claim()


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    with pytest.raises(FloatingPointError, match="parent: "):
        recipes.run(tiny(parent__learning_rate=10.0, parent__weight_decay=10.0), tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()


def test_pruned_weights_stay_zero_through_both_phases(tmp_path):
    result = recipes.run(
        tiny(
            experts__weight_sparsity=0.5,
            controls__same_bops=False,
            collapse__steps=0,
            joint__refit=False,
        ),
        tmp_path / "run",
    )
    for model in result.state.experts:
        assert model.masks
        for path, mask in model.masks.items():
            # A dense kernel stands in the graph as in the network, a convolution's too.
            kernel = np.asarray(model.weights[path]["kernel"])
            assert mask.mean() == 0.5
            assert not kernel[~np.asarray(mask)].any()


def test_a_parent_is_taken_from_another_run(done, tmp_path):
    run, result = done
    weights = str(run.task.workdir / "parent.safetensors")
    other = recipes.of_config(tiny(model__weights=weights), tmp_path / "run")
    assert "parent" not in [stage.name for stage in other.stages]
    chex.assert_trees_all_equal(
        other.start.parent.cut.variables,
        result.state.parent.cut.variables,
    )


def test_identical_experts_are_one(done, tmp_path):
    run, _ = done
    config = tiny(
        experts__diversity="",
        model__weights=str(run.task.workdir / "parent.safetensors"),
        joint__steps=0,
        joint__refit=False,
        collapse__steps=0,
        controls__same_bops=False,
    )
    result = recipes.run(config, tmp_path / "run")
    np.testing.assert_array_equal(result.results.disagreement, np.zeros((2, 2)))
    # Whichever the gate chooses, the mixture is that one network.
    found = of(result)
    assert found["top-1 mixture"].correct == found["expert 0"].correct


def test_padded_shortcuts_and_widths_of_ones_own_pass(tmp_path):
    config = tiny(
        model__shortcut="pad",
        collapse__steps=0,
        joint__refit=False,
        controls__same_bops=False,
        experts__diversity="criterion",
    )
    result = recipes.run(config, tmp_path / "run")
    assert of(result)["top-1 mixture"].files["onnx"].agreement >= 0.98


def test_planned_cost_is_the_cost(done):
    _, result = done
    for model in result.state.experts:
        spec = recipes.ExpertSpec(**model.facts["spec"])
        dense = result.state.parent.cut
        alike = {group.name: np.zeros(group.size, np.float32) for group in dense.graph.groups}
        keep = prune.kept_channels(dense.graph, spec, alike)
        assert controls.planned_cost(dense, spec, keep) == controls.cost_of(model)


def test_other_targets_of_a_finished_run(done, capsys):
    run, _ = done
    targets = ["stablehlo", "tflite", "packed", "c"]
    path = run.task.workdir
    argv = ["export", f"--workdir={path}", f"--target={','.join(targets)}", "--pairs=2"]
    assert export.cli(argv) == 0
    stored = json.loads((path / "results.json").read_text())
    for row in stored["rows"]:
        for target in [*targets, "onnx"] if row["files"] else ():
            file = row["files"][target]
            assert not file["error"], (row["name"], target, file["error"])
            assert (path / file["artifact"]).is_file()
            # After so few steps the classes are close: the digits network agrees to 99.9 %.
            assert file["agreement"] >= 0.9, (row["name"], target)
    assert "report: " in capsys.readouterr().out


def test_exports_need_a_run_that_is_there(tmp_path, capsys):
    for arguments, message in {
        (f"--workdir={tmp_path}", "--target=onnx"): "workdir must hold the results.json",
        (f"--workdir={tmp_path}", "--target=onx"): "--target must be one of",
        (f"--workdir={tmp_path}",): "--target must be of",
        ("--target=onnx",): "--workdir must be given",
        (f"--workdir={tmp_path}", "--target=c", "--pairs=0"): "--pairs must be",
    }.items():
        assert export.cli(["export", *arguments]) == 2
        assert message in capsys.readouterr().err


def constant(logits):
    """Experts that say the same of every image: row e of `logits` (E, N)."""

    def fn(own, images):
        return jnp.broadcast_to(own["params"], (images.shape[0], logits.shape[1]))

    return [recipes.Model(None, {}, {}, own, fn) for own in logits]


def chosen(task, config, made, weights=None):
    """The expert that a trained gate chooses for each validation image."""
    own = gate.learn_gate(task, None, made, config.gate, 0.0, "vmap", weights)
    return task.outputs(own.fn, own.params, task.splits.validation).argmax(-1)


@pytest.fixture
def gated(tmp_path):
    """A task of all digits, and a gate's settings."""
    config = recipes.default_config()
    config.gate.steps = 300
    return recipes.of_config(config, tmp_path / "gate").task, config


def test_the_gate_finds_the_expert_with_the_least_loss(gated):
    # Expert e is right on class e alone, so a gate that chooses well is a classifier. Each expert,
    # a random gate and the average of all are right on a tenth.
    task, config = gated
    right = chosen(task, config, constant(5 * jnp.eye(10))) == task.splits.validation.labels
    assert right.mean() > 0.4


def test_the_gate_learns_the_clusters_where_losses_say_nothing(gated):
    task, config = gated
    labels = task.splits.train.labels
    weights = np.stack([labels < 5, labels >= 5]).astype(np.float32)
    own = task.splits.validation.labels >= 5
    assert (chosen(task, config, constant(jnp.zeros((2, 10))), weights) == own).mean() > 0.8


def test_records_are_kept_of_every_training(done):
    run, result = done
    names = {record["name"] for record in training.read_records(run.task.workdir / "records.jsonl")}
    assert {"parent", "experts", "experts_deployed", "gate", "joint", "refit"} <= names
    assert set(result.results.history) == names


def test_a_dry_run_tells_the_plan(tmp_path):
    text = pipeline.of_config(tiny(), tmp_path / "run").describe()
    assert "params/stem/conv/kernel  4 channels" in text
    assert "is an output of the function" in text
    assert "stages: parent, prune, experts, gate, joint, refit, controls, collapse" in text
    assert not (tmp_path / "run").exists()
