"""The whole run on a few digits, and what a killed one leaves."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import core, experts, recipes, training
from hybrid_jax.recipes import controls, evaluation, pipeline, programs
from hybrid_jax.report import comparison, formatting
from launch import export

pytestmark = pytest.mark.slow

SOURCES = "criterion+width+classes+bootstrap"


def tiny(**changes):
    """A run of seconds: two small experts, a few steps each; all optional stages."""
    config = recipes.default_config()
    config.data.train_size = 300
    config.model.widths = (4, 8, 8)
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
    """A finished run, of a cheap and a dear expert: its job, what it made and its results."""
    config = tiny(experts__diversity=SOURCES)
    job = recipes.prepare(config, tmp_path_factory.mktemp("run") / "done")
    results = recipes.run(job)
    return job, recipes.make(job), results


def test_results_have_every_row_and_number(done):
    job, _, results = done
    report = (job.workdir / "report.md").read_text()
    assert [row["name"] for row in results["rows"]] == [
        "dense parent",
        "expert 0",
        "expert 1",
        "top-1 mixture",
        "top-2 mixture",
        "soft mixture",
        "best single expert",
        "average of all experts",
        "random gate",
        "oracle gate",
        "equal BOPs",
        "collapsed mixture",
    ]
    for row in results["rows"]:
        assert row["accuracy"] == pytest.approx(np.mean(row["correct"]))
        assert min(row["macs"], row["bops"], row["parameters_active"]) > 0
        assert (row["latency_ratio"] is None) == (row["name"] == "oracle gate")
        # A size is that of a file; what cannot be shipped as one has none.
        if row["name"] in ("average of all experts", "random gate", "oracle gate"):
            assert row["bytes"] is row["artifact"] is None
        else:
            assert row["bytes"] == (job.workdir / row["artifact"]).stat().st_size
            assert formatting.si(row["bytes"], "B") in report
    rows = {row["name"]: row for row in results["rows"]}
    assert rows["oracle gate"]["accuracy"] >= max(
        rows[name]["accuracy"] for name in ("expert 0", "expert 1", "top-1 mixture")
    )
    assert "not deployable" in rows["oracle gate"]["note"]
    assert "not deployable" in rows["random gate"]["note"]
    # All experts and the gate are stored; one expert, as often as it is chosen, and the gate run.
    mixture, both = rows["top-1 mixture"], [rows["expert 0"], rows["expert 1"]]
    assert mixture["bytes"] == rows["soft mixture"]["bytes"] > sum(e["bytes"] for e in both)
    gate = rows["soft mixture"]["macs"] - sum(e["macs"] for e in both)
    used = sum(u * e["macs"] for u, e in zip(results["gate"]["share"], both, strict=True))
    assert mixture["macs"] == pytest.approx(gate + used)
    assert np.allclose(np.sum(results["gate"]["usage"], axis=1), 1)
    # 300 images are 9 batches of 32: 4 steps are one begun epoch, in each of three stages.
    assert len(results["gate"]["per_epoch"]) == 3
    assert np.all(np.array(results["gate"]["per_epoch"]) <= np.log(2) + 1e-6)


def test_channels_are_physically_removed(done):
    _, models, results = done
    # Of widths 4, 8, 8 a half or a quarter stays: MACs fall to about the square of it.
    for certificate, kept in zip(results["certificates"], (0.25, 0.5), strict=True):
        assert certificate["difference"] < 1e-5
        before, after = certificate["macs"]
        assert kept**2 / 2 * before < after < 1.4 * kept**2 * before
    dense = core.flatten_paths(models.variables)
    cheap, dear = (own["params"] for own in models.made.params)
    assert dense["params/stem/conv/kernel"].shape == (3, 3, 1, 4)
    assert dear["params/stem/conv/kernel"]["kernel"].shape == (3, 3, 1, 2)
    assert cheap["params/stem/conv/kernel"]["kernel"].shape == (3, 3, 1, 1)
    assert results["rows"][1]["macs"] == results["certificates"][0]["macs"][1]


def test_what_is_deployed_computes_what_was_evaluated(done):
    job, _, results = done
    assert [(r["target"], r["model"], r["kernel_bits"]) for r in results["exports"]] == [
        ("stablehlo", "dense", [32]),
        ("stablehlo", "expert", [8]),
        ("stablehlo", "mixture", [8]),
    ]
    for record in results["exports"]:
        assert record["agreement"] >= 0.995
        assert record["bytes"] == (job.workdir / record["artifact"]).stat().st_size


def test_a_gate_that_was_fitted_to_other_experts_is_refused(done):
    job, models, _ = done
    assert models.gate.fitted_to == experts.fingerprint(models.made.params)
    with pytest.raises(ValueError, match=r"gate must be fitted to the experts .*: fit it again"):
        recipes.fine_tune(job, models.dense, models.variables, models.before, models.gate)
    with pytest.raises(ValueError, match="gate must be fitted to the experts"):
        recipes.lower(job, models._replace(made=models.before))


def test_a_gate_that_collapses_is_detected_and_reported(done, tmp_path):
    job, models, results = done
    # With its bias at 1000 the gate takes the first expert whatever the image, and stays there.
    params, head = models.gate.params["params"], "params/Dense_0/kernel"
    bias = params[head]["bias"].at[0].set(1e3)
    params = params | {head: params[head] | {"bias": bias}}
    forced = models.gate._replace(params=models.gate.params | {"params": params})
    gate = recipes.learn_gate(
        job, models.dense, models.variables, models.made, name="forced", start=forced
    )
    records = training.read_records(job.workdir / "records.jsonl")
    entropies = pipeline.entropy_per_epoch(records, "forced", epoch=4)
    assert entropies == [0.0]
    test = job.splits.test
    gate_logits = job.logits(gate.predict, gate.params, test)
    use = evaluation.gate_use(gate_logits, test.labels, job.splits.num_classes)
    assert use["share"] == [1.0, 0.0]
    assert (use["entropy"], use["collapsed"], use["unused"]) == (0.0, True, [1])
    found = comparison.warnings(results | {"gate": use | {"per_epoch": entropies}})
    assert "The gate collapsed: expert 0 gets 100.00 % of the images" in found


def test_report_and_a_second_run(done):
    job, *_ = done
    for name in ("report.md", "report.html", "accuracy_bytes.png", "results.json"):
        assert (job.workdir / name).stat().st_size > 0
    (job.workdir / "report.md").unlink()
    assert recipes.run(job) == json.loads((job.workdir / "results.json").read_text())
    assert (job.workdir / "report.md").exists()


def test_a_killed_run_resumes_to_the_same_weights(done, tmp_path):
    job, models, _ = done
    killed = recipes.prepare(tiny(experts__diversity=SOURCES), tmp_path / "killed")
    shutil.copytree(job.workdir / "checkpoints", killed.workdir / "checkpoints")
    # Killed in the midst of joint training: its last checkpoint and all that follows are missing.
    joint = killed.workdir / "checkpoints" / "joint"
    shutil.rmtree(max(joint.glob("[0-9]*"), key=lambda path: int(path.name)))
    for stage in ("refit", "equal_BOPs", "collapse"):
        shutil.rmtree(killed.workdir / "checkpoints" / stage)
    resumed = recipes.make(killed)
    jax.tree.map(np.testing.assert_array_equal, models.made.params, resumed.made.params)
    jax.tree.map(np.testing.assert_array_equal, models.gate.params, resumed.gate.params)
    for name, single in models.singles.items():
        jax.tree.map(np.testing.assert_array_equal, single.params, resumed.singles[name].params)


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    job = recipes.prepare(tiny(parent__learning_rate=1e30), tmp_path / "run")
    with pytest.raises(FloatingPointError, match="parent: "):
        recipes.run(job)
    assert not (job.workdir / "results.json").exists()


def test_pruned_weights_stay_zero_through_both_phases(tmp_path):
    job = recipes.prepare(
        tiny(
            experts__weight_sparsity=0.5,
            controls__same_bops=False,
            collapse__steps=0,
            joint__refit=False,
        ),
        tmp_path / "run",
    )
    made = recipes.make(job).made
    for expert, own in zip(made.each, made.params, strict=True):
        masks = core.flatten_paths({"params": expert.masks})
        masks = {path: mask for path, mask in masks.items() if not core.is_masked_node(mask)}
        assert masks
        for path, mask in masks.items():
            # A dense kernel stands in the graph as in the network, a convolution's too.
            kernel = np.asarray(own["params"][path]["kernel"])
            assert mask.mean() == 0.5
            assert not kernel[~np.asarray(mask)].any()


def test_a_parent_is_restored(done, tmp_path):
    job, models, _ = done
    other = recipes.prepare(
        tiny(parent__restore=str(job.workdir / "checkpoints" / "parent")), tmp_path / "run"
    )
    _, variables = recipes.parent(other)
    jax.tree.map(np.testing.assert_array_equal, variables, models.variables)
    assert training.Checkpoints(other.workdir / "checkpoints" / "parent").latest() is None


def test_identical_experts_are_one(done, tmp_path):
    job, *_ = done
    config = tiny(
        experts__diversity="",
        parent__restore=str(job.workdir / "checkpoints" / "parent"),
        joint__steps=0,
        joint__refit=False,
        collapse__steps=0,
        controls__same_bops=False,
    )
    degenerate = recipes.prepare(config, tmp_path / "run")
    models = recipes.make(degenerate)
    logits = programs.logits(degenerate, models.made, degenerate.splits.test)
    np.testing.assert_array_equal(experts.disagreement(jnp.asarray(logits)), np.zeros((2, 2)))
    # Whichever the gate chooses, the mixture is that one network.
    mixture = programs.top_1_logits(degenerate, models)
    np.testing.assert_allclose(mixture, logits[0], atol=1e-5)


def test_padded_shortcuts_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"set config\.model\.shortcut='project'"):
        recipes.prepare(tiny(model__shortcut="pad"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_planned_cost_is_the_cost(done):
    job, models, _ = done
    for spec, cost in zip(models.made.specs, controls.costs(models.made), strict=True):
        graph = controls.planned_graph(job, models.dense, models.variables, spec.sparsity, 1)
        assert controls.planned_cost(graph, spec) == cost


def test_exports_of_a_finished_run(done, capsys):
    job, _, results = done
    written = {
        row["artifact"]: (job.workdir / row["artifact"]).read_bytes()
        for row in results["rows"]
        if row["artifact"]
    }
    targets = ["stablehlo", "onnx", "tflite", "packed", "c"]
    argv = ["export", f"--workdir={job.workdir}", f"--target={','.join(targets)}", "--pairs=2"]
    assert export.cli(argv) == 0
    records = json.loads((job.workdir / "results.json").read_text())["exports"]
    models = ["dense", "dense int8", "expert", "mixture"]
    assert [(r["target"], r["model"]) for r in records] == [(t, m) for t in targets for m in models]
    for record in records:
        name = (record["target"], record["model"])
        assert (job.workdir / record["artifact"]).is_file(), name
        # After so few steps the classes are close together: the digits network agrees to 99.9 %.
        assert record["agreement"] >= 0.9, name
        assert set(record["latency"]) == {"1", "32"}
    bits = {r["target"]: r["kernel_bits"] for r in records if r["model"] == "mixture"}
    assert (bits["c"], bits["tflite"]) == ([4, 8], [8])
    # A packed file holds as few as the integers of each kernel need.
    assert max(bits["packed"]) == 8
    assert min(bits["packed"]) <= 4
    # One path, one file: whoever writes it.
    for path, content in written.items():
        assert (job.workdir / path).read_bytes() == content, path
    text = (job.workdir / "report.md").read_text()
    assert "## Exports" in text
    assert "flash" in capsys.readouterr().out


def test_exports_need_a_run_that_is_there(tmp_path, capsys):
    for arguments, message in {
        (f"--workdir={tmp_path}", "--target=onnx"): "workdir must hold a finished run",
        (f"--workdir={tmp_path}", "--target=onx"): "--target must be one of",
        (f"--workdir={tmp_path}",): "--target must be of",
        ("--target=onnx",): "--workdir must be given",
        (f"--workdir={tmp_path}", "--target=c", "--pairs=0"): "--pairs must be",
    }.items():
        assert export.cli(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
