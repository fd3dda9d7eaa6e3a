"""The dense parent: trained, or taken from another run."""

import pathlib
from collections.abc import Callable
from typing import Any

from hybrid_jax import models, training
from hybrid_jax.recipes.job import Job, Network, optimizer


def network(job: Job) -> tuple[Network, Callable[[], Any]]:
    """Returns the dense network of the configuration, and what makes its first variables."""
    settings = job.config.model
    overrides = {key: settings[key] for key in ("widths", "shortcut") if settings[key]}
    module = models.create(settings.name, job.splits.num_classes, **overrides)
    dense = Network(
        predict=lambda variables, x: module.apply(variables, x, train=False),
        train=lambda variables, x: module.apply(variables, x, train=True, mutable=["batch_stats"]),
    )
    return dense, lambda: job.init(module, "parent")


def parent(job: Job) -> tuple[Network, Any]:
    """Returns the dense network and its variables after `config.parent.steps` steps.

    Where `config.parent.restore` names the checkpoints of another run's parent, these are taken.
    """
    dense, init = network(job)
    variables = init()
    settings = job.config.parent

    def forward(params, state, images, key):
        del key
        return dense.train(params | state, images)

    params, state = {"params": variables["params"]}, {"batch_stats": variables["batch_stats"]}
    tx = optimizer(settings.learning_rate, settings.weight_decay, settings.steps)
    train_state = job.start("parent", params, state, tx)
    if settings.restore:
        checkpoints = training.Checkpoints(pathlib.Path(settings.restore).expanduser())
        trained = checkpoints.restore(checkpoints.latest(), train_state)
    else:
        loss_fn = training.classification(forward, smoothing=settings.label_smoothing)
        step = training.make_step(loss_fn, job.augment, choices=job.choices)
        trained = job.fit("parent", step, train_state, settings.steps, settings.batch_size)
    return dense, trained.params | trained.state
