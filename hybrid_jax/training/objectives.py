"""What a network is for: the loss it learns by, the score it is judged by, how sure it is."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybrid_jax import core, experts
from hybrid_jax.training.losses import (
    check_labelled,
    counting,
    cross_entropy,
    distillation_loss,
    mean_of_each,
    squared_error,
)
from hybrid_jax.training.steps import Batch, Forward, LossFn, Metrics

OfLabels = Callable[[jax.Array, jax.Array], jax.Array]
"""(outputs (B, …), labels (B, …)) -> (B,), one number for each example."""


def class_probability(outputs: jax.Array) -> jax.Array:
    """The largest probability of a class (B,), of pixels its mean."""
    return mean_of_each(experts.max_probability(core.widen(outputs)))


class Objective(NamedTuple):
    """Functions of a batch of outputs, each of which gives one number for each example, (B,).

    `loss` is of (outputs, labels), `distillation` of (outputs, a teacher's), `score` of (outputs,
    labels), higher is better, and named `metric`; `confidence` of outputs is in [0, 1], or None.
    """

    loss: OfLabels
    distillation: OfLabels
    score: OfLabels
    confidence: Callable[[jax.Array], jax.Array] | None
    metric: str


def classification(smoothing: float = 0.0, temperature: float = 4.0) -> Objective:
    """Of outputs that are logits (B, N) with labels (B,), or (B, H, W, N) with labels (B, H, W).

    Cross-entropy with label `smoothing`, KL at a `temperature`, top-1 accuracy and the largest
    probability; of pixels, their means over those of an image that count, see `core.VOID`. NaN
    logits are never right.
    """
    core.check_fraction("smoothing", smoothing)
    core.check_positive("temperature", temperature)

    def score(outputs: jax.Array, labels: jax.Array) -> jax.Array:
        check_labelled(outputs, labels)
        right = core.top_class(outputs) == jnp.asarray(labels, jnp.int32)
        return mean_of_each(right, counting(labels))

    return Objective(
        functools.partial(cross_entropy, smoothing=smoothing),
        functools.partial(distillation_loss, temperature=temperature),
        score,
        class_probability,
        "accuracy",
    )


def regression() -> Objective:
    """Of outputs that are values, as many as labels: mean squared error, its negative as score."""
    return Objective(
        squared_error,
        lambda outputs, teacher: squared_error(outputs, jax.lax.stop_gradient(teacher)),
        lambda outputs, labels: -squared_error(outputs, labels),
        None,
        "negative_squared_error",
    )


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "classification": classification,
    "regression": regression,
}
"""Objectives by name, open to users: f(**options) -> `Objective`."""


def objective(
    name: str = "classification",
    *,
    loss: OfLabels | None = None,
    metric: OfLabels | None = None,
    distillation: OfLabels | None = None,
    confidence: Callable[[jax.Array], jax.Array] | None = None,
    **options: Any,
) -> Objective:
    """Makes the objective `name` of `OBJECTIVES` with its `options`, functions given in its place.

    `metric` is the score, named after the function. All are as of `Objective`, and are refused
    where they return anything else than one number for each example.
    """
    known = OBJECTIVES[core.check_choice("objective", name, OBJECTIVES)](**options)
    given = {"loss": loss, "metric": metric, "distillation": distillation, "confidence": confidence}
    own = {what: _checked(what, fn) for what, fn in given.items() if fn is not None}
    if metric is not None:
        named = getattr(metric, "__name__", "metric")
        own |= {"score": own["metric"], "metric": named if named.isidentifier() else "metric"}
    return known._replace(**own)


def check_objective(objective: Objective, outputs: Any, labels: Any) -> None:
    """Raises unless the objective's functions take such outputs and labels, or their shapes."""
    taken = {
        "loss": (objective.loss, labels),
        "metric": (objective.score, labels),
        "distillation": (objective.distillation, outputs),
        "confidence": (objective.confidence,),
    }
    for name, (function, *other) in taken.items():
        if function is None:
            continue
        try:
            jax.eval_shape(_checked(name, function), outputs, *other)
        except Exception as error:  # whatever a user's own function meets
            said = str(error).partition("\n")[0]
            if not said.startswith(f"{name} must"):
                shapes = ", ".join(str(x.shape) for x in (outputs, *other))
                got = f"got {type(error).__name__}: {said}"
                said = f"{name} must be a function of arrays of shapes {shapes}, {got}"
            raise ValueError(said) from error


def example_loss(
    objective: Objective, outputs: jax.Array, batch: Batch, alpha: float = 0.0
) -> jax.Array:
    """(1 - alpha) loss + alpha distillation, (B,): by batch['label'] and batch['teacher'].

    Of pixels that do not count the teacher teaches nothing.
    """
    loss = objective.loss(outputs, batch["label"])
    if not alpha:
        return loss
    if "teacher" not in batch:
        raise ValueError(f"batch must hold 'teacher' outputs for alpha {alpha}, got {[*batch]}")
    teacher, counted = batch["teacher"], counting(batch["label"])
    if counted is not None and outputs.shape[:-1] == counted.shape:
        outputs = jnp.where(counted[..., None], outputs, teacher.astype(outputs.dtype))
    return (1 - alpha) * loss + alpha * objective.distillation(outputs, teacher)


def loss_of(forward: Forward, objective: Objective, alpha: float = 0.0) -> LossFn:
    """Makes the loss function of a step: by the labels, and by a teacher where `alpha` > 0.

    forward(params, state, images, key) -> (outputs (B, …), new_state) is in training mode. With
    `alpha` above 0 the batch needs 'teacher' outputs, which `make_step(…, teacher=…)` provides.

    Returns:
      loss_fn(params, state, batch, key) -> (loss, (new_state, {objective.metric})), means weighted
      by batch['weight'] (B,), if there is one. `forward` then sees the examples that count in place
      of those of weight 0; where none counts, both are 0.
    """
    core.check_fraction("alpha", alpha)

    def loss_fn(
        params: Any, state: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        weight = batch.get("weight")
        entries = {name: batch[name] for name in ("image", "label", "teacher") if name in batch}
        images = core.filled(entries.pop("image"), weight)
        outputs, new_state = forward(params, state, images, key)
        # Selected away before any loss: the gradient of what is not finite would be NaN.
        outputs = core.selected(outputs, weight)
        entries = {name: core.selected(leaf, weight) for name, leaf in entries.items()}
        loss = example_loss(objective, outputs, entries, alpha)
        score = objective.score(outputs, entries["label"])
        metrics = {objective.metric: core.weighted_mean(score, weight)}
        return core.weighted_mean(loss, weight), (new_state, metrics)

    return loss_fn


def _checked(name: str, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function`, refused where it returns anything else than (B,) numbers."""
    if not callable(function):
        raise ValueError(f"{name} must be a function of a batch, got {function!r}")

    @functools.wraps(function, updated=())
    def checked(outputs: jax.Array, *other: jax.Array) -> jax.Array:
        values = function(outputs, *other)
        numbers = hasattr(values, "dtype") and not jnp.issubdtype(values.dtype, jnp.complexfloating)
        if not numbers or values.shape != (len(outputs),):
            got = f"shape {values.shape}" if numbers else repr(values)
            raise ValueError(
                f"{name} must return a number for each of {len(outputs)} examples, "
                f"shape ({len(outputs)},), got {got}"
            )
        return values

    return checked
