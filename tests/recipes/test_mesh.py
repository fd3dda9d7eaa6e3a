"""A run on several devices computes what it computes on one, stage by stage."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import core, data, recipes, training
from hybrid_jax.recipes import demands, gate, pipeline, prune, ptq, train
from hybrid_jax.recipes.config import expert_specs
from tests.recipes import strangers


class Net(nn.Module):
    """BatchNorm, whose statistics are to be those of the whole batch, and dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
        x = nn.relu(nn.Conv(6, (3, 3), (2, 2))(x)).mean((1, 2))
        return nn.Dense(10)(nn.Dropout(0.1, deterministic=not train)(x))


@pytest.fixture(scope="module")
def settings():
    config = recipes.default_config()
    config.parent.update(steps=20, batch_size=16)
    config.experts.update(count=2, steps=20, batch_size=16, deployed=0.0, sparsity=0.25)
    # The gradient of a range jumps where a value rounds to its other side, which the last bit of a
    # sum decides.
    config.experts.update(weight_learning="fixed", activation_learning="fixed")
    config.gate.update(steps=20, batch_size=16, features=(4,))
    return recipes.read(config)


@pytest.fixture
def tasks(settings, tmp_path, monkeypatch):
    """The same task on one device and on four; that every step keeps where its state lies."""
    images, labels = strangers.digits()
    splits, net = data.take((images[:160], labels[:160])), Net()
    given = net, net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))

    def fit(step, state, batches, **options):
        after, _ = step(core.copy(state), next(batches(0)))
        for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
            assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
        return whole_fit(step, state, batches, **options)

    whole_fit = training.fit
    monkeypatch.setattr(training, "fit", fit)

    def make(name, devices):
        effort = recipes.EFFORTS["mixture"]
        task = pipeline.prepare(given, splits, settings, tmp_path / name, effort).task
        return dataclasses.replace(task, devices=devices)

    return make("one", ()), make("four", jax.devices())


def assert_close(got, want):
    """To 1e-5; what is got lies on one device."""
    got, want = core.flatten_paths(got), core.flatten_paths(want)
    assert got.keys() == want.keys()
    for path, leaf in got.items():
        assert not isinstance(leaf, jax.Array) or len(leaf.devices()) == 1
        np.testing.assert_allclose(leaf, want[path], rtol=1e-5, atol=1e-5, err_msg=path)


def cut(task, settings):
    """Two networks of one shape, cut by two criteria."""
    return prune.prune(task, task.parent, expert_specs(settings), jax.random.key(0))


def test_a_plain_stage(tasks, settings):
    one, four = (train.parent(task, task.parent, settings.parent) for task in tasks)
    assert_close(four.cut.variables, one.cut.variables)


@pytest.mark.parametrize("count", [1, 2])
def test_a_stage_quantized_at_sites(tasks, settings, count):
    """One network, and a stack of two that is divided by expert, each with images of its own."""
    task, *_ = tasks
    assert [task.mesh(16, count), tasks[1].mesh(16, count).shape] == [
        None,
        {"batch": 4} if count == 1 else {"expert": 2, "batch": 2},
    ]
    made = cut(task, settings)[:count]
    weights = np.random.default_rng(0).uniform(size=(count, 160)).astype(np.float32)
    own = {"weights": weights} if count > 1 else {}
    one, four = (
        train.compress(task, task.parent, made, "experts", settings.experts, 0.5, **own)
        for task in tasks
    )
    assert_close([m.params for m in four], [m.params for m in one])


def test_a_gate_and_what_it_is_evaluated_by(tasks, settings):
    task, *_ = tasks
    made = [
        ptq.calibrate(task, ptq.quantized(model, model.cut.bits), 64, "minmax")
        for model in cut(task, settings)
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
    _, task = tasks
    assert task.mesh(6).size == 2
    assert task.mesh(5) is None
    gate = dataclasses.replace(settings.gate, batch_size=6)
    assert demands.undivided(task, settings) == []
    assert demands.undivided(task, dataclasses.replace(settings, gate=gate)) == [
        "config.gate.batch_size must be a multiple of the 4 devices for all of them to work, "
        "got batches of 6, which 2 share"
    ]
