"""Mixtures of networks that other runs made, and networks with another teacher than the parent."""

import numpy as np
import pytest

from hybrid_jax import recipes
from hybrid_jax.recipes import controls, state


def tiny(**changes):
    """A run of seconds."""
    config = recipes.default_config()
    steps = {"parent": 60, "experts": 10, "gate": 4, "joint": 4}
    for stage, count in steps.items():
        config[stage].steps = count
        config[stage].batch_size = 32
    small = {"data.train_size": 400, "model.widths": (4, 8, 8), "experts.deployed": 0.0}
    controls = {"controls.same_bytes": False, "controls.same_bops": False}
    recipes.override(config, {**small, **controls, "evaluation.latency_calls": 1, **changes})
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs: of a network that is trained, and of a smaller one that learns from it."""
    folder = tmp_path_factory.mktemp("runs")
    own = {"effort": "finetune", "deploy.targets": ("packed",)}
    recipes.run(tiny(**own), folder / "dear")
    small = {
        **own,
        "model.widths": (4, 4, 4),
        "teacher.name": "resnet8",
        "teacher.widths": tiny().model.widths,
        "teacher.weights": str(folder / "dear" / "parent.safetensors"),
        "distillation.alpha": 1.0,
    }
    recipes.run(tiny(**small), folder / "cheap")
    return folder, small


def mixed(folder, **changes):
    members = (str(folder / "dear"), str(folder / "cheap"))
    own = {"mixture.members": members, "model.weights": str(folder / "dear/parent.safetensors")}
    return tiny(**{"effort": "mixture", **own, **changes})


def test_members_of_two_networks_become_a_cascade(runs, tmp_path):
    folder, _ = runs
    config = mixed(folder, **{"mixture.kind": "cascade"})
    first = recipes.run(config, tmp_path / "run")
    cheap, dear = first.state.experts
    assert (cheap.cut.origin, dear.cut.origin) == ("member 1", "member 0")
    rows = {row.name: row for row in first.results.rows}
    assert rows["expert 0"].macs < rows["expert 1"].macs
    assert rows["cascade"].files["onnx"].accuracy == pytest.approx(rows["cascade"].accuracy)
    assert first.state.facts["cascade"]["share"] == first.state.share
    again = recipes.run(config, tmp_path / "run")
    assert again.state.thresholds == first.state.thresholds
    for ours, theirs in zip(again.state.experts, first.state.experts, strict=True):
        x = ours.cut.images
        np.testing.assert_array_equal(ours.fn(ours.params, x), theirs.fn(theirs.params, x))


@pytest.mark.slow
def test_auto_takes_what_validation_prefers(runs, tmp_path):
    """Of the gate that was learned and the cascade of no more MACs than it: told anew by hand."""
    folder, _ = runs
    run = recipes.of_config(mixed(folder, **{"mixture.kind": "auto"}), tmp_path / "run")
    result, task = run(), run.task
    (path,) = (tmp_path / "run" / "stages").glob("*_gate.safetensors")
    before = state.load(path, run.start.parent.cut, run._source, task.whose)
    validation = task.splits.validation
    picks = task.outputs(before.gate.fn, before.gate.params, validation).argmax(-1)
    outputs = [task.outputs(own.fn, own.params, validation) for own in before.experts]
    answers = np.stack(outputs)[picks, np.arange(len(picks))].argmax(-1)
    of_gate, of_cascade = (answers == validation.labels).mean(), result.state.facts["cascade"]
    assert (result.state.gate is not None) == (of_gate >= of_cascade["score"])
    assert (result.state.gate is None) == bool(result.state.thresholds)
    price = [controls.cost_of(own).macs for own in (*before.experts, before.gate)]
    assert of_cascade["cost"]["macs"] <= np.take(price, picks).mean() + price[-1]


def test_members_that_do_not_keep_a_budget_are_told_at_the_start(runs, tmp_path):
    folder, _ = runs
    config = mixed(folder, **{"mixture.kind": "cascade", "budget.bytes": 3000})
    message = r"budget.bytes must be at least \d+, which config.mixture.members take, got 3000"
    with pytest.raises(ValueError, match=message):
        recipes.of_config(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.seed": 1}, r"runs on the same images, got .*dear with config.data.seed=0 where"),
        ({"mixture.members": ("nothing",)}, "nothing"),
        ({"effort": "finetune"}, "members must be given with effort 'mixture', got 'finetune'"),
    ],
)
def test_what_are_no_members(runs, tmp_path, changes, message):
    folder, _ = runs
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        recipes.of_config(mixed(folder, **changes), tmp_path / "run")


def test_one_member_is_no_mixture(runs, tmp_path):
    folder, _ = runs
    config = mixed(folder, **{"mixture.members": (str(folder / "dear"),)})
    with pytest.raises(ValueError, match="members must be two runs or more, got one"):
        recipes.of_config(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher.name": ""}, "teacher.weights must be given with teacher.name or make"),
        ({"teacher.weights": ""}, "teacher must be a trained network, got a module without"),
    ],
)
def test_what_is_no_teacher(runs, tmp_path, changes, message):
    _, small = runs
    with pytest.raises(ValueError, match=message):
        recipes.of_config(tiny(**{**small, **changes}), tmp_path / "run")
