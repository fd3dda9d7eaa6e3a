"""The mixture distilled into one static network, for devices that cannot branch."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from hybrid_jax import core, experts, pruning, training
from hybrid_jax.recipes import deployed, programs
from hybrid_jax.recipes.deployed import Experts
from hybrid_jax.recipes.job import Job, optimizer
from hybrid_jax.recipes.phase2 import Gate
from hybrid_jax.training.losses import Forward


def collapse(
    moe: Callable[..., tuple[jax.Array, experts.Aux]],
    stack: Any,
    gate_params: Any,
    forward: Forward,
    student: training.TrainState,
    batches: Callable[[int], Iterator[dict]],
    *,
    steps: int,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    temperature: float = 4.0,
    alpha: float = 1.0,
    choices: core.Choices | None = None,
    **options: Any,
) -> training.TrainState:
    """Trains one network towards the logits of a whole mixture.

    Source: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network,
    arXiv 1503.02531.

    `moe` is of `experts.mixture`, whose routing decides whether the teacher is soft or top-1;
    `stack` and `gate_params` are its experts and its gate. The student is
    forward(params, state, images (B, H, W, C), key) -> (logits (B, N), state), any function of a
    compressed network, quantized or not; `student` is where it starts, and what holds its masks
    belongs in its optimizer. `alpha`, above 0, is the share of the mixture in the loss; the rest is
    the labels'. `augment` and `choices` are for `training.make_step`, `temperature` for
    `training.distillation_loss`, `batches`, `steps` and `options` for `training.fit`.

    Example:
      >>> import itertools, optax, jax.numpy as jnp
      >>> linear = lambda params, x: x @ params
      >>> moe = experts.mixture(linear, linear, experts.soft(), 'unroll')
      >>> stack, gate = jnp.stack([jnp.eye(2), -jnp.eye(2)]), jnp.array([[9.0, 0.0], [9.0, 0.0]])
      >>> start = training.create_state(jnp.zeros((2, 2)), {}, optax.sgd(1.0), jax.random.key(0))
      >>> batch = {'image': jnp.eye(2), 'label': jnp.array([0, 1])}
      >>> forward = lambda params, state, x, key: (linear(params, x), state)
      >>> fit = lambda first: itertools.repeat(batch)
      >>> student = collapse(moe, stack, gate, forward, start, fit, steps=20)
      >>> student.params.argmax(0).tolist()  # the gate takes the first expert, the identity
      [0, 1]
    """
    if not alpha:
        raise ValueError(f"alpha must be above 0, got {alpha}")
    step = training.make_step(
        training.classification(forward, temperature=temperature, alpha=alpha),
        augment,
        lambda images: moe(stack, gate_params, images)[0],
        choices=choices,
    )
    return training.fit(step, student, batches, steps=steps, name="collapse", **options)


def collapsed_mixture(job: Job, made: Experts, gate: Gate) -> Experts:
    """Returns the expert that is best on validation, trained on towards the whole mixture."""
    experts.check_fitted(gate.fitted_to, made.params)
    settings = job.config.collapse
    start = deployed.select(made, int(programs.validation_accuracies(job, made).argmax()))
    (expert,), (fn,), (params,) = start.each, start.fns, start.params
    tx = optimizer(settings.learning_rate, 0.0, settings.steps)
    tx = pruning.hold_masks(tx, deployed.held(expert, params))
    routing = experts.soft() if settings.routing == "soft" else experts.top_k(1)
    student = collapse(
        experts.mixture(made.fns, gate.predict, routing, made.method, job.choices),
        made.params,
        gate.params,
        lambda params, state, images, key: (fn(params, images), state),
        job.start("collapse", params, {}, tx),
        job.batches("collapse", settings.batch_size),
        steps=settings.steps,
        augment=job.augment,
        temperature=job.config.distillation.temperature,
        choices=job.choices,
        **job.bookkeeping("collapse"),
    )
    return start._replace(params=[student.params])
