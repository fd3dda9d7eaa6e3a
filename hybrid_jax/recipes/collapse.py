"""The mixture distilled into one static network, for devices that cannot branch."""

from collections.abc import Sequence
from typing import Any

from hybrid_jax import experts, pruning
from hybrid_jax.recipes.cut import Model
from hybrid_jax.recipes.gate import check_fitted
from hybrid_jax.recipes.optimizer import optimizer
from hybrid_jax.recipes.task import Task
from hybrid_jax.recipes.taught import Taught
from hybrid_jax.recipes.train import as_forward, fit_each, held


def collapse(
    task: Task, made: Sequence[Model], gate: Model, settings: Any, method: str = "auto"
) -> Model:
    """Returns the expert that is best on validation, trained on towards the whole mixture.

    `settings.routing` decides whether the mixture that teaches is soft or top-1.

    Source: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network,
    arXiv 1503.02531.
    """
    check_fitted(made, gate)
    student = made[best(task, made)]
    routing = experts.soft() if settings.routing == "soft" else experts.top_k(1)
    moe = experts.mixture([model.fn for model in made], gate.fn, routing, method, task.choices)
    params = [model.params for model in made]
    tx = optimizer(settings.learning_rate, 0.0, settings.steps)
    ((trained, _),) = fit_each(
        task,
        "collapse",
        [as_forward(student.fn)],
        [student.params],
        [{}],
        [pruning.hold_masks(tx, held(student))],
        taught=Taught(lambda images: moe(params, gate.params, images)[0]),
        steps=settings.steps,
        batch_size=settings.batch_size,
        alpha=1.0,
    )
    return student.trained(trained)


def best(task: Task, made: Sequence[Model]) -> int:
    """Returns the index of what is best on the validation images, of equals the first."""
    return int(task.scores(made, task.splits.validation).mean(-1).argmax())
