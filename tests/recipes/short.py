"""A run of seconds, whose stages all train, and what is asked of it after it was stopped."""

import flax.linen as nn
import jax
import numpy as np

from hybrid_jax import data, recipes, training
from hybrid_jax.recipes import pipeline
from hybrid_jax.recipes.efforts import EFFORTS


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(2)(nn.relu(nn.Conv(4, (3, 3))(x)).mean((1, 2)))


def prepared(path, seed=0):
    """A run of seconds: its parent and its one compressed network train for six steps each."""
    config = recipes.default_config()
    config.effort, config.seed, config.checkpoint_every = "finetune", seed, 2
    config.evaluation.latency_calls = 1
    config.data.padding = 0
    config.deploy.targets = ("packed",)
    for stage in ("parent", "experts"):
        config[stage].steps, config[stage].batch_size = 6, 8
    config = recipes.read(config)
    labels = np.arange(60) % 2
    images = np.random.default_rng(0).normal(100 + 60 * labels[:, None, None], 20, (60, 4, 4))
    splits = data.take((np.clip(images, 0, 255).astype(np.uint8), labels), seed=0)
    return pipeline.prepare(Net(), splits, config, path, EFFORTS["finetune"])


def trained(run):
    return recipes.state.run(run.stages, run.start, run.task.workdir, whose=run.task.whose)


def weights(state):
    return [state.parent.cut.variables, *(model.params for model in state.experts)]


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ours), theirs)


def records_of(path):
    """By the training that they are of: one that was done again wrote its own anew."""
    return sorted(training.read_records(path / "records.jsonl"), key=lambda own: own["name"])


def go_on(run):
    with run.claim():
        state = trained(run)
        return state, records_of(run.task.workdir)
