"""Phase 2: a gate over the quantized experts, then the gate and the experts together.

Both minimize the loss expected of the expert that is chosen, see `experts.expected_loss`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_jax import core, experts, pruning, quantization, training
from hybrid_jax import program as p
from hybrid_jax.recipes import deployed
from hybrid_jax.recipes.deployed import Experts
from hybrid_jax.recipes.job import Job, Network, optimizer
from hybrid_jax.recipes.phase1 import CALIBRATION_BATCHES


class Gate(NamedTuple):
    """A gate as it is deployed.

    Attributes:
      predict: (params, images (B, H, W, C)) -> gate logits (B, E), fake-quantized.
      params: {'params', 'ranges'}, those of its plan.
      planned: Its inference graph, and how that is stored.
      fitted_to: `experts.fingerprint` of the experts that it chooses from.
    """

    predict: Callable[[Any, jax.Array], jax.Array]
    params: Any
    planned: quantization.Plan
    graph: core.Graph
    fitted_to: str


def routing(job: Job) -> Callable[..., experts.Routed]:
    """Returns the routing that `config.gate` trains with.

    A discrete choice has the gradient of the full softmax, so that the gate learns from experts
    that it did not choose.
    """
    settings = job.config.gate
    if settings.routing == "soft":
        return experts.soft()
    k = 1 if settings.routing.endswith("1") else settings.k
    if settings.routing.startswith("noisy"):
        return experts.straight_through(experts.noisy_top_k(k, settings.noise))
    return experts.straight_through(experts.top_k(k))


def learn_gate(
    job: Job,
    dense: Network,
    variables: Any,
    made: Experts,
    weights: np.ndarray | None = None,
    name: str = "gate",
    start: Gate | None = None,
) -> Gate:
    """Trains a gate over the experts as they are, then quantizes it.

    Where experts have clusters of the data, the gate learns these as well: an expert's own loss
    tells it from the others by little, and by much noise.

    `weights` (E, n) are those of each training image for each expert, where they tell who is to
    take it, as those of clusters do. `start` is a gate to go on from, as it is deployed, such as
    that of experts that have changed since.
    """
    settings = job.config.gate
    module = experts.gate_cnn(len(made.each), settings.features, settings.size)
    fit = functools.partial(_fit_gate, job, dense, variables, made, weights, name)
    if start is not None:
        trained, fitted_to = fit(start.predict, start.params)
        return start._replace(params=trained, fitted_to=fitted_to)
    trained, fitted_to = fit(module.apply, job.init(module, "gate"))
    graph = core.trace(module.apply, trained, job.images)
    quantizer = quantization.spec(
        graph,
        weight_bits=settings.bits,
        activation_bits=settings.bits,
        first_last_bits=settings.bits,
    )
    program = p.lower(module.apply, trained, deployed.calibration_images(job))
    planned = quantization.plan(program, quantizer)
    sample = [(images,) for images in job.sample(settings.batch_size, CALIBRATION_BATCHES)]
    ranges = quantization.calibrate_edges(planned, sample)
    params = jax.tree.map(jnp.asarray, {"params": dict(program.params), "ranges": ranges})
    return Gate(deployed.as_deployed(planned), params, planned, graph, fitted_to)


def _fit_gate(job, dense, variables, made, weights, name, gate_fn, params):
    """A gate's parameters, trained, and the fingerprint of the experts that they are fitted to."""
    settings = job.config.gate
    loss_fn = _loss(job, made, gate_fn, lambda params, state: (state["experts"], params))
    if weights is not None:
        loss_fn = _supervised(loss_fn, gate_fn, settings.supervision)
    tx = optimizer(settings.learning_rate, 0.0, settings.steps)
    state = job.start(name, params, {"experts": made.params}, tx)
    teacher = functools.partial(dense.predict, variables)
    step = training.make_step(loss_fn, job.augment, teacher, choices=job.choices)
    state = job.fit(
        name,
        step,
        state,
        settings.steps,
        settings.batch_size,
        weights,
        record_every=epoch_steps(job, "gate"),
    )
    # Those of the state: a gate from a checkpoint is fitted to the experts that it saw.
    return state.params, experts.fingerprint(state.state["experts"])


def fine_tune(
    job: Job, dense: Network, variables: Any, made: Experts, gate: Gate
) -> tuple[Experts, Gate]:
    """Trains the gate and the experts together, as they are deployed.

    Returns both as they came where `config.joint.steps` is 0.
    """
    settings = job.config.joint
    experts.check_fitted(gate.fitted_to, made.params)
    if not settings.steps:
        return made, gate
    params = {"experts": made.params, "gate": gate.params}
    held = {
        "experts": list(map(deployed.held, made.each, made.params)),
        "gate": jax.tree.map(lambda _: optax.MaskedNode(), gate.params),
    }
    tx = pruning.hold_masks(optimizer(settings.learning_rate, 0.0, settings.steps), held)
    loss_fn = _loss(
        job, made, gate.predict, lambda params, state: (params["experts"], params["gate"])
    )
    teacher = functools.partial(dense.predict, variables)
    step = training.make_step(loss_fn, job.augment, teacher, choices=job.choices)
    state = job.start("joint", params, {}, tx)
    state = job.fit(
        "joint",
        step,
        state,
        settings.steps,
        settings.batch_size,
        record_every=epoch_steps(job, "joint"),
    )
    fitted_to = experts.fingerprint(state.params["experts"])
    return (
        made._replace(params=state.params["experts"]),
        gate._replace(params=state.params["gate"], fitted_to=fitted_to),
    )


def epoch_steps(job: Job, stage: str) -> int:
    """Returns how many steps of a stage are one pass over the training images."""
    return max(1, len(job.splits.train.labels) // job.config[stage].batch_size)


def _loss(job, made, gate_fn, take):
    """Loss expected of the mixture's choice; `take(params, state)` -> (experts', gate's)."""
    moe = experts.mixture(made.fns, gate_fn, routing(job), made.method, job.choices)
    soft, balance = job.config.distillation, job.config.gate.balance

    def loss_fn(params, state, batch, key):
        own, gate_params = take(params, state)
        logits, aux = moe(own, gate_params, batch["image"], key)
        losses = _each_loss(aux.expert_logits, batch, soft.temperature, soft.alpha)
        loss = experts.expected_loss(aux.weights, losses)
        right = core.top_class(logits) == batch["label"]
        metrics = {
            "accuracy": core.weighted_mean(right),
            "entropy": experts.usage_entropy(experts.usage(aux.weights)),
        }
        return loss + balance * experts.importance(aux.weights), (state, metrics)

    return loss_fn


def _supervised(loss_fn, gate_fn, factor):
    """Adds the cross-entropy of the gate to the expert that weighs the image most."""

    def supervised(params, state, batch, key):
        loss, aux = loss_fn(params, state, batch, key)
        gate_logits = gate_fn(params, batch["image"])
        own = jnp.argmax(batch["weight"], 0)  # (E, B) -> (B,)
        return loss + factor * training.cross_entropy(gate_logits, own), aux

    return supervised


def _each_loss(expert_logits, batch, temperature, alpha):
    """Loss (E, B) of each expert (E, B, N) on each image."""

    def loss(logits, teacher, label):
        return training.distillation_loss(
            logits[None], teacher[None], label[None], temperature, alpha
        )

    of_batch = jax.vmap(loss)
    return jax.vmap(of_batch, (0, None, None))(expert_logits, batch["teacher"], batch["label"])
