"""What the gate learns, over experts whose losses are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import recipes
from hybrid_jax.recipes import deployed, phase2
from hybrid_jax.recipes.job import Network


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    config = recipes.default_config()
    config.distillation.alpha = 0.0  # labels alone: the parent below knows nothing
    config.gate.steps = 300
    return recipes.prepare(config, tmp_path_factory.mktemp("run") / "gate")


def constant_experts(logits):
    """Experts that say the same of every image: row e of `logits` (E, N)."""

    def predict(expert, images):
        return jnp.broadcast_to(expert["logits"], (images.shape[0], logits.shape[1]))

    count = len(logits)
    params = [{"logits": own} for own in logits]
    return deployed.Experts((None,) * count, (predict,) * count, params, "vmap")


def chosen(job, made, weights=None):
    """The expert that a trained gate chooses for each validation image."""
    parent = Network(lambda variables, x: jnp.zeros((x.shape[0], 10)), None)
    gate = phase2.learn_gate(job, parent, {}, made, weights)
    return job.logits(gate.predict, gate.params, job.splits.validation).argmax(-1)


def test_the_gate_finds_the_expert_with_the_least_loss(job):
    # Expert e is right on class e alone, so a gate that chooses well is a classifier. Each expert,
    # a random gate and the average of all are right on a tenth.
    right = chosen(job, constant_experts(5 * jnp.eye(10))) == job.splits.validation.labels
    assert right.mean() > 0.4


def test_the_gate_learns_the_clusters_where_losses_say_nothing(job, tmp_path):
    other = recipes.prepare(job.config, tmp_path / "run")
    labels = job.splits.train.labels
    weights = np.stack([labels < 5, labels >= 5]).astype(np.float32)
    own = job.splits.validation.labels >= 5
    assert (chosen(other, constant_experts(jnp.zeros((2, 10))), weights) == own).mean() > 0.8
