"""The whole run on a few digits, and what a killed one leaves."""

import json
import shutil

import jax
import numpy as np
import pytest

from hybrid_jax import core, experts, recipes, training
from hybrid_jax.recipes import controls, deployment

pytestmark = pytest.mark.slow


def tiny(**changes):
    """A run of seconds: two small experts, a few steps each."""
    config = recipes.default_config()
    config.data.train_size = 300
    config.model.widths = (4, 8, 8)
    config.experts.count = 2
    config.experts.method = "map"
    config.evaluation.latency_calls = 2
    for stage, steps in (("parent", 30), ("experts", 6), ("gate", 4), ("joint", 4)):
        config[stage].steps = steps
        config[stage].batch_size = 32
    config.controls.same_bytes = False
    config.checkpoint_every = 2
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run: its job, what it made and its results."""
    job = recipes.prepare(tiny(), tmp_path_factory.mktemp("run") / "done")
    results = recipes.run(job)
    return job, recipes.make(job), results


def test_results_have_every_row_and_number(done):
    _, _, results = done
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
    ]
    for row in results["rows"]:
        assert row["accuracy"] == pytest.approx(np.mean(row["correct"]))
        assert min(row["bytes"], row["macs"], row["bops"], row["parameters_active"]) > 0
        assert (row["latency_ratio"] is None) == (row["name"] == "oracle gate")
    rows = {row["name"]: row for row in results["rows"]}
    assert rows["oracle gate"]["accuracy"] >= max(
        rows[name]["accuracy"] for name in ("expert 0", "expert 1", "top-1 mixture")
    )
    assert "not deployable" in rows["oracle gate"]["note"]
    assert "not deployable" in rows["random gate"]["note"]
    # All experts and the gate are stored; one expert and the gate run.
    mixture, expert = rows["top-1 mixture"], rows["expert 0"]
    assert mixture["bytes"] > 2 * expert["bytes"]
    assert mixture["macs"] - expert["macs"] == rows["soft mixture"]["macs"] - 2 * expert["macs"]
    assert rows["equal BOPs"]["bops"] <= mixture["bops"]
    assert np.allclose(np.sum(results["gate"]["usage"], axis=1), 1)


def test_channels_are_physically_removed(done):
    _, models, results = done
    for certificate in results["certificates"]:
        assert certificate["difference"] < 1e-5
        before, after = certificate["macs"]
        assert after < 0.35 * before
    dense = core.flatten_paths(models.variables)
    small = core.flatten_paths(experts.unstack(models.made.stack)[0]["params"])
    assert dense["params/stem/conv/kernel"].shape == (3, 3, 1, 4)
    assert small["stem/conv/kernel"].shape == (3, 3, 1, 2)


def test_what_is_deployed_computes_what_was_evaluated(done):
    job, models, results = done
    (record,) = results["deploy"]
    assert record["agreement"] == 1.0
    assert record["max_difference"] < 1e-4
    images = job.normalize(job.splits.validation.images[:16])
    (expert, *_), (fn, params) = (
        experts.unstack(models.made.stack),
        deployment.deployed_experts(job, models.made)[0],
    )
    assert params["kernels"]["params/stem/conv/kernel"].values.dtype == np.int8
    np.testing.assert_allclose(
        fn(params, images), models.made.predict(expert, images), atol=1e-5, rtol=1e-5
    )


def test_report_and_a_second_run(done):
    job, *_ = done
    for name in ("report.md", "report.html", "accuracy_bytes.png", "results.json"):
        assert (job.workdir / name).stat().st_size > 0
    (job.workdir / "report.md").unlink()
    assert recipes.run(job) == json.loads((job.workdir / "results.json").read_text())
    assert (job.workdir / "report.md").exists()


def test_a_killed_run_resumes_to_the_same_weights(done, tmp_path):
    job, models, _ = done
    killed = recipes.prepare(tiny(), tmp_path / "killed")
    shutil.copytree(job.workdir / "checkpoints", killed.workdir / "checkpoints")
    # Killed in the midst of joint training: its last checkpoint and all that follows are missing.
    joint = killed.workdir / "checkpoints" / "joint"
    shutil.rmtree(max(joint.glob("[0-9]*"), key=lambda path: int(path.name)))
    shutil.rmtree(killed.workdir / "checkpoints" / "equal_BOPs")
    resumed = recipes.make(killed)
    jax.tree.map(np.testing.assert_array_equal, models.made.stack, resumed.made.stack)
    jax.tree.map(np.testing.assert_array_equal, models.gate.params, resumed.gate.params)
    single, again = models.singles["equal BOPs"], resumed.singles["equal BOPs"]
    jax.tree.map(np.testing.assert_array_equal, single.stack, again.stack)


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    job = recipes.prepare(tiny(parent__learning_rate=1e30), tmp_path / "run")
    with pytest.raises(FloatingPointError, match="parent: "):
        recipes.run(job)
    assert not (job.workdir / "results.json").exists()


def test_pruned_weights_stay_zero_through_both_phases(tmp_path):
    job = recipes.prepare(
        tiny(experts__granularity="2:4", controls__same_bops=False), tmp_path / "run"
    )
    made = recipes.make(job).made
    for expert, masks in zip(experts.unstack(made.stack), made.masks, strict=True):
        masks = {p: m for p, m in core.flatten_paths(masks).items() if not core.is_masked_node(m)}
        assert masks
        for path, mask in masks.items():
            kernel = np.asarray(core.flatten_paths(expert["params"])[path])
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


def test_padded_shortcuts_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"set config\.model\.shortcut='project'"):
        recipes.prepare(tiny(model__shortcut="pad"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_planned_cost_is_the_cost(done):
    job, models, _ = done
    spec = models.made.specs[0]
    graph = controls.planned_graph(job, models.dense, models.variables, spec.sparsity, 1)
    assert controls.planned_cost(graph, spec) == controls.costs(models.made)[0]
