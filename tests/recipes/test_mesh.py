"""A run on several devices computes what it computes on one, stage by stage."""

import dataclasses
import functools
import signal

import jax
import numpy as np
import pytest

from hybrid_jax import core, recipes, training
from hybrid_jax.recipes import demands, gate, ptq, train
from tests.recipes import several


@pytest.fixture(scope="module")
def settings():
    return recipes.read(several.tiny("mixture"))


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    """What the stages make on one device; with `plain` the first of them."""
    task, _ = several.task(tmp_path_factory.mktemp("alone"))
    return functools.cache(lambda plain=False: several.stages(task, settings, plain))


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """The same task on one device and on four; that every step keeps where its state lies."""

    def fit(step, state, batches, **options):
        after, _ = step(core.copy(state), next(batches(0)))
        for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
            assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
        return whole_fit(step, state, batches, **options)

    whole_fit = training.fit
    monkeypatch.setattr(training, "fit", fit)
    one, four = (several.task(tmp_path / name)[0] for name in ("one", "four"))
    return one, dataclasses.replace(four, devices=jax.devices())


def assert_close(got, want):
    """To 1e-5; what is got lies on one device."""
    for leaf, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert not isinstance(leaf, jax.Array) or len(leaf.devices()) == 1
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-5)


def assert_nearly_all_close(got, want):
    """So after quantized steps: a few weights move by more.

    They do where a value rounds to its other side.
    """
    got, want = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(own)]) for own in (got, want))
    assert np.isclose(got, want, rtol=1e-5, atol=1e-5).mean() > 0.95
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_stages_in_steps_of_one_network_and_of_a_stack(tasks, alone, settings):
    """A plain one; two quantized at their sites, divided by expert, and then as deployed."""
    _, four = tasks
    (dense, *got), (expected, *others) = several.stages(four, settings), alone()
    assert_close(dense, expected)
    assert_nearly_all_close(got, others)


@pytest.mark.slow
def test_steps_in_one_program_with_the_images_on_every_device(
    alone, settings, tmp_path, monkeypatch
):
    """As an accelerator does them."""
    monkeypatch.setattr("hybrid_jax.recipes.task.on_accelerator", lambda: True)
    task = dataclasses.replace(several.task(tmp_path)[0], devices=jax.devices())
    (dense, *got), (expected, *others) = several.stages(task, settings), alone()
    assert_close(dense, expected)
    assert_nearly_all_close(got, others)


@pytest.mark.slow
def test_one_network_quantized_at_its_sites(tasks, settings):
    made = several.cut(tasks[0], settings)[:1]
    one, four = (
        train.compress(task, task.parent, made, "experts", settings.experts, 0.5)[0]
        for task in tasks
    )
    assert_nearly_all_close(four.params, one.params)


def test_a_gate_and_what_it_is_evaluated_by(tasks, settings):
    task, *_ = tasks
    made = [
        ptq.calibrate(task, ptq.quantized(model, model.cut.bits), 64, "minmax")
        for model in several.cut(task, settings)
    ]
    weights = np.random.default_rng(0).uniform(size=(2, 160)).astype(np.float32)
    one, four = (
        gate.learn_gate(task, task.parent, made, settings.gate, 0.5, "map", weights)
        for task in tasks
    )
    assert_close(four.params, one.params)
    outputs = [task.outputs(one.fn, one.params, task.splits.validation) for task in tasks]
    assert_close(*outputs)


def test_calibration_and_statistics(tasks):
    ranges = [ptq.calibrate(task, ptq.quantized(task.parent, {}), 64, "mse") for task in tasks]
    assert_close(*(model.ranges for model in ranges))
    found = [ptq.reestimate_batchnorm(task, task.parent, 64) for task in tasks]
    assert_close(*(model.cut.variables for model in found))


def test_devices_that_a_run_has(tasks, settings):
    assert demands.devices(0) == [jax.devices()[0]]  # the default device that these tests set
    with jax.default_device(None):
        assert demands.devices(0) == jax.devices()
        assert demands.devices(3) == jax.devices()[:3]
        with pytest.raises(ValueError, match=r"config\.devices must be at most the 4 there are"):
            demands.devices(5)
    one, task = tasks
    assert [one.mesh(16), dict(task.mesh(16).shape)] == [None, {"batch": 4}]
    assert dict(task.mesh(16, 2).shape) == {"expert": 2, "batch": 2}
    assert task.mesh(6).size == 2
    assert task.mesh(5) is None
    gate = dataclasses.replace(settings.gate, batch_size=6)
    assert demands.undivided(task, settings) == []
    assert demands.undivided(task, dataclasses.replace(settings, gate=gate)) == [
        "config.gate.batch_size must be a multiple of the 4 devices for all of them to work, "
        "got batches of 6, which 2 share"
    ]


@pytest.mark.parametrize("what", ["plain", pytest.param("stages", marks=pytest.mark.slow)])
def test_two_processes_of_two_devices(alone, tmp_path, what):
    """Both have the same, and all of it; the first has written the records."""
    dense, *others = alone(what == "plain")
    made = several.run(what, tmp_path / "run", 2, 2)
    assert made[0] == made[1]
    got, count = list(map(np.array, made[0]["leaves"])), len(jax.tree.leaves(dense))
    assert_close(got[:count], list(map(np.ravel, jax.tree.leaves(dense))))
    if others:
        assert_nearly_all_close(got[count:], others)
    records = training.read_records(tmp_path / "run" / "records.jsonl")
    told = [("parent", 20), ("experts", 16), ("experts_deployed", 4)]
    assert [(own["name"], own["step"]) for own in records] == told[: 3 if others else 1]


@pytest.mark.slow
def test_processes_of_which_one_is_stopped_go_on(tmp_path):
    """Both save and end, and then come to where those come that were not stopped, to the bit."""
    whole = several.run("stages", tmp_path / "whole", 2, 2)
    stopped = several.ended("stages", tmp_path / "run", 2, 2, STOPPED="1")
    assert [own.returncode for own in stopped] == [-signal.SIGTERM] * 2, stopped[0].stderr
    assert training.Checkpoints(tmp_path / "run/checkpoints/experts").latest() == 10
    assert several.run("stages", tmp_path / "run", 2, 2) == whole


@pytest.mark.slow
@pytest.mark.parametrize("effort", ["ptq", "finetune", "mixture"])
@pytest.mark.parametrize(("devices", "processes"), [(8, 1), (2, 2)])
def test_a_whole_run(tmp_path, effort, devices, processes):
    """Every process has the results, and the accuracies are near those of one device."""
    (alone,) = several.run(effort, tmp_path / "alone", 1)
    first, *others = several.run(effort, tmp_path / "run", devices, processes)
    assert all(other == first for other in others)
    assert first["rows"].keys() == alone["rows"].keys()
    for name, accuracy in alone["rows"].items():
        assert abs(first["rows"][name] - accuracy) < 0.1


@pytest.mark.slow
def test_the_command_in_two_processes(tmp_path):
    """Both end well, and the first speaks for both."""
    small = {
        "effort": "ptq",
        "parent.steps": 4,
        "ptq.images": 64,
        "data.train_size": 160,
        "model.widths": "4,8,8",
        "deploy.targets": "packed",
        "evaluation.latency_calls": 2,
    }

    def arguments(address, number):
        changes = [f"--config.{key}={value}" for key, value in small.items()]
        command = ["-m", "launch.compress", "--config=digits", f"--workdir={tmp_path / 'run'}"]
        return [*command, f"--distributed={address},2,{number}", *changes]

    first, second = several.together(arguments, 2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout.endswith(f"report: {tmp_path / 'run' / 'report.html'}\n")
    said = [line for line in second.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert (said, "the network takes" in second.stderr) == ([], False)
    assert "the network takes" in first.stderr
    assert list((tmp_path / "run" / "deploy").glob("*.safetensors"))
