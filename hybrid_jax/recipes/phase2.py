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
from hybrid_jax.recipes import phase1
from hybrid_jax.recipes.job import Job, Network, optimizer
from hybrid_jax.recipes.phase1 import CALIBRATION_BATCHES, Experts


class Gate(NamedTuple):
    """A quantized gate.

    Attributes:
      float_predict: (variables, images (B, H, W, C)) -> gate logits (B, E), in floats.
      predict: (params, images) -> gate logits, quantized.
      params: {'variables', 'ranges'}.
      fitted_to: `experts.fingerprint` of what was trained of the experts that it chooses from.
    """

    float_predict: Callable[[Any, jax.Array], jax.Array]
    predict: Callable[[Any, jax.Array], jax.Array]
    params: Any
    graph: core.Graph
    quantizer: quantization.Spec
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
    start: Any = None,
) -> Gate:
    """Trains a gate over the experts as they are, then quantizes it.

    Where experts have clusters of the data, the gate learns these as well: an expert's own loss
    tells it from the others by little, and by much noise.

    `weights` (E, n) are those of each training image for each expert, where they tell who is to
    take it, as those of clusters do. `start` are variables to start from, as of a gate over experts
    that have changed since.
    """
    settings = job.config.gate
    module = experts.gate_cnn(len(made.specs), settings.features, settings.size)
    start = job.init(module, "gate") if start is None else start
    loss_fn = _loss(
        job, made, module.apply, lambda params, state: (state["experts"], {"params": params})
    )
    if weights is not None:
        loss_fn = _supervised(loss_fn, module.apply, settings.supervision)
    tx = optimizer(settings.learning_rate, 0.0, settings.steps)
    state = job.start(name, start["params"], {"experts": made.stack}, tx)
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
    trained = {"params": state.params}
    graph = core.trace(module.apply, trained, job.images)
    quantizer = quantization.spec(
        graph,
        weight_bits=settings.bits,
        activation_bits=settings.bits,
        first_last_bits=settings.bits,
        deployable=True,
    )
    sample = [(images,) for images in job.sample(settings.batch_size, CALIBRATION_BATCHES)]
    ranges = quantization.calibrate(module.apply, trained, sample, quantizer)
    quantized = quantization.fake_quantized(module.apply, quantizer)
    return Gate(
        module.apply,
        lambda params, x: quantized(params["variables"], params["ranges"], x),
        {"variables": trained, "ranges": ranges},
        graph,
        quantizer,
        # Those of the state: a gate from a checkpoint is fitted to the experts that it saw.
        experts.fingerprint(phase1.trained(state.state["experts"])),
    )


def fine_tune(
    job: Job, dense: Network, variables: Any, made: Experts, gate: Gate
) -> tuple[Experts, Gate]:
    """Trains the gate and the experts together, with running statistics held.

    Returns both as they came where `config.joint.steps` is 0.
    """
    settings = job.config.joint
    experts.check_fitted(gate.fitted_to, phase1.trained(made.stack))
    if not settings.steps:
        return made, gate
    fixed = {name: made.stack[name] for name in ("batch_stats", "bits")}
    params = {
        "experts": {name: made.stack[name] for name in ("params", "ranges")},
        "gate": gate.params,
    }
    held = jax.tree.map(lambda _: optax.MaskedNode(), params)
    held["experts"]["params"] = experts.stack(made.masks)
    tx = pruning.hold_masks(optimizer(settings.learning_rate, 0.0, settings.steps), held)
    loss_fn = _loss(
        job, made, gate.predict, lambda params, state: (params["experts"] | state, params["gate"])
    )
    teacher = functools.partial(dense.predict, variables)
    step = training.make_step(loss_fn, job.augment, teacher, choices=job.choices)
    state = job.start("joint", params, fixed, tx)
    state = job.fit(
        "joint",
        step,
        state,
        settings.steps,
        settings.batch_size,
        record_every=epoch_steps(job, "joint"),
    )
    stack = state.params["experts"] | state.state
    fitted_to = experts.fingerprint(phase1.trained(stack))
    return (
        made._replace(stack=stack),
        gate._replace(params=state.params["gate"], fitted_to=fitted_to),
    )


def epoch_steps(job: Job, stage: str) -> int:
    """Returns how many steps of a stage are one pass over the training images."""
    return max(1, len(job.splits.train.labels) // job.config[stage].batch_size)


def _loss(job, made, gate_fn, take):
    """Loss expected of the mixture's choice; `take(params, state)` -> (stack, gate parameters)."""
    moe = experts.mixture(made.predict, gate_fn, routing(job), made.method, job.choices)
    soft, balance = job.config.distillation, job.config.gate.balance

    def loss_fn(params, state, batch, key):
        stack, gate_params = take(params, state)
        logits, aux = moe(stack, gate_params, batch["image"], key)
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
        gate_logits = gate_fn({"params": params}, batch["image"])
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
