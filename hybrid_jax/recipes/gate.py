"""Phase 2: a gate over the quantized experts, then the gate and the experts together.

Both minimize the loss expected of the expert that is chosen, see `experts.expected_loss`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_jax import core, experts, models, pruning, quantization, training
from hybrid_jax.recipes.cut import Cut, Model, with_functions
from hybrid_jax.recipes.optimizer import optimizer
from hybrid_jax.recipes.task import Task
from hybrid_jax.recipes.taught import UNTAUGHT
from hybrid_jax.recipes.train import CALIBRATION_BATCHES, held


def source(task: Task, count: int, settings: Any) -> models.Network:
    """Returns the gate over `count` experts, in floats, with the weights that it starts from."""
    module = experts.GATES[settings.network](count, settings.features, settings.size)
    images = jnp.zeros(task.image.shape, task.image.dtype)
    return models.Network(module.apply, None, jax.jit(module.init)(task.init_key("gate"), images))


def untrained(task: Task, count: int, settings: Any) -> Cut:
    """Returns the gate over `count` experts in the bits that it is to have."""
    network = source(task, count, settings)
    cut = Cut(network, task.images, network.params, origin="gate")
    return cut.with_bits(settings.bits, settings.bits, settings.bits)


def calibrated(task: Task, cut: Cut, settings: Any, facts: Any = None) -> Model:
    """Returns a gate as it is deployed."""
    sample = [(images,) for images in task.sample(settings.batch_size, CALIBRATION_BATCHES)]
    ranges = core.gathered(quantization.calibrate_edges(cut.plan, sample))
    weights, ranges = jax.tree.map(jnp.asarray, (dict(cut.plan.program.params), ranges))
    return with_functions([Model(cut, {}, ranges, weights, facts=facts or {})])[0]


def learn_gate(
    task: Task,
    parent: Model,
    made: Sequence[Model],
    settings: Any,
    alpha: float,
    method: str = "auto",
    weights: np.ndarray | None = None,
) -> Model:
    """Trains a gate over the experts as they are, then quantizes it.

    Where experts have clusters of the data, the gate learns these as well: an expert's own loss
    tells it from the others by little, and by much noise.

    `weights` (E, n) are those of each training image for each expert, where they tell who is to
    take it, as those of clusters do; `alpha` is the teacher's share of an expert's loss.
    """
    cut = untrained(task, len(made), settings)
    fit = functools.partial(_fit_gate, task, parent, made, settings, alpha, method, weights)
    params, facts = fit("gate", cut.source.predict, cut.variables)
    return calibrated(task, cut.with_variables(params), settings, facts)


def refit(task, parent, made, gate: Model, settings, alpha, method="auto", weights=None) -> Model:
    """Trains a gate once more, as it is deployed, over experts that have changed since.

    Arguments are as of `learn_gate`.
    """
    params, facts = _fit_gate(
        task, parent, made, settings, alpha, method, weights, "refit", gate.fn, gate.params
    )
    return gate.trained(params)._replace(facts=facts)


def _fit_gate(task, parent, made, settings, alpha, method, weights, name, gate_fn, params):
    """A gate's parameters, trained, and the fingerprint of the experts that they are fitted to."""
    own = [model.params for model in made]
    loss_fn = _loss(
        task,
        made,
        gate_fn,
        settings,
        alpha,
        method,
        lambda params, state: (state["experts"], params),
    )
    if weights is not None:
        loss_fn = _supervised(loss_fn, gate_fn, settings.supervision)
    tx = optimizer(settings.learning_rate, 0.0, settings.steps)
    state = task.start(name, params, {"experts": own}, tx)
    taught = task.taught(parent) if alpha else UNTAUGHT
    step = training.make_step(loss_fn, task.augmented, taught.teach, choices=task.choices)
    state = task.fit(
        name,
        step,
        state,
        settings.steps,
        settings.batch_size,
        weights,
        taught,
        record_every=task.epoch(settings.batch_size),
    )
    # Those of the state: a gate from a checkpoint is fitted to the experts that it saw.
    return state.params, {"fitted_to": experts.fingerprint(state.state["experts"])}


def check_fitted(made: Sequence[Model], gate: Model) -> None:
    """Raises ValueError unless the gate was fitted to these experts."""
    experts.check_fitted(gate.facts["fitted_to"], [model.params for model in made])


def fine_tune(
    task: Task,
    parent: Model,
    made: Sequence[Model],
    gate: Model,
    settings: Any,
    alpha: float,
    gate_settings: Any,
    method: str = "auto",
) -> tuple[list[Model], Model]:
    """Trains the gate and the experts together, as they are deployed."""
    check_fitted(made, gate)
    params = {"experts": [model.params for model in made], "gate": gate.params}
    masks = {
        "experts": list(map(held, made)),
        "gate": jax.tree.map(lambda _: optax.MaskedNode(), gate.params),
    }
    tx = pruning.hold_masks(optimizer(settings.learning_rate, 0.0, settings.steps), masks)
    loss_fn = _loss(
        task,
        made,
        gate.fn,
        gate_settings,
        alpha,
        method,
        lambda params, state: (params["experts"], params["gate"]),
    )
    taught = task.taught(parent) if alpha else UNTAUGHT
    step = training.make_step(loss_fn, task.augmented, taught.teach, choices=task.choices)
    state = task.fit(
        "joint",
        step,
        task.start("joint", params, {}, tx),
        settings.steps,
        settings.batch_size,
        taught=taught,
        record_every=task.epoch(settings.batch_size),
    )
    new = state.params["experts"]
    facts = {"fitted_to": experts.fingerprint(new)}
    made = [model.trained(own) for model, own in zip(made, new, strict=True)]
    return made, gate.trained(state.params["gate"])._replace(facts=facts)


def _loss(task, made, gate_fn, settings, alpha, method, take):
    """Loss expected of the mixture's choice; `take(params, state)` -> (experts', gate's)."""
    fns = [model.fn for model in made]
    routing = experts.ROUTINGS[settings.routing](settings.k, settings.noise)
    moe = experts.mixture(fns, gate_fn, routing, method, task.choices)

    def loss_fn(params, state, batch, key):
        own, gate_params = take(params, state)
        outputs, aux = moe(own, gate_params, batch["image"], key)
        each = functools.partial(training.example_loss, task.objective, batch=batch, alpha=alpha)
        losses = jax.vmap(each)(aux.expert_logits)
        loss = experts.expected_loss(aux.weights, losses)
        metrics = {
            task.objective.metric: core.weighted_mean(
                task.objective.score(outputs, batch["label"])
            ),
            "entropy": experts.usage_entropy(experts.usage(aux.weights)),
        }
        return loss + settings.balance * experts.importance(aux.weights), (state, metrics)

    return loss_fn


def _supervised(loss_fn, gate_fn, factor):
    """Adds the cross-entropy of the gate to the expert that weighs the image most."""

    def supervised(params, state, batch, key):
        loss, aux = loss_fn(params, state, batch, key)
        gate_logits = gate_fn(params, batch["image"])
        own = jnp.argmax(batch["weight"], 0)  # (E, B) -> (B,)
        return loss + factor * training.cross_entropy(gate_logits, own).mean(), aux

    return supervised
