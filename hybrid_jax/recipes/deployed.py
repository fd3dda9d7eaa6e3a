"""Experts as they are deployed: their inference graphs, trained on as a device computes them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from hybrid_jax import core, experts, pruning, quantization, training
from hybrid_jax.recipes.config import ExpertSpec
from hybrid_jax.recipes.job import Job, optimizer

CALIBRATION_IMAGES = 512


class Expert(NamedTuple):
    """What one expert is, but for what is trained of it.

    Attributes:
      spec: What it is made by.
      certificate: How far it is, cut, from the masked parent.
      graph: Its sites, at its own widths.
      masks: Which weights are kept: bool like the parameters of the network that it was cut to.
      planned: Its inference graph, and how its sites are quantized and the graph is stored.
    """

    spec: ExpertSpec
    certificate: core.Certificate
    graph: core.Graph
    masks: Any
    planned: quantization.Plan


class Experts(NamedTuple):
    """E experts as they are deployed.

    Attributes:
      fns: (params, images (B, H, W, C)) -> logits (B, N) of each, fake-quantized; experts of one
        program have one function.
      params: {'params', 'ranges'} of each, those of its plan.
      method: How experts of one function are mapped, see `experts.map_each`.
    """

    each: tuple[Expert, ...]
    fns: tuple[Callable[[Any, jax.Array], jax.Array], ...]
    params: list[Any]
    method: str

    @property
    def specs(self) -> tuple[ExpertSpec, ...]:
        """What each is made by."""
        return tuple(own.spec for own in self.each)


def as_deployed(planned: quantization.Plan) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns the function of a plan: ({'params', 'ranges'}, images (B, H, W, C)) -> outputs."""
    fn = quantization.as_deployed(planned)
    return lambda own, images: fn(own["params"], own["ranges"], images)


def train(
    job: Job,
    made: Experts,
    name: str,
    steps: tuple[int, int],
    weights: np.ndarray | None,
    make_step: Callable[..., Callable],
) -> Experts:
    """Returns the experts after their last steps, as deployed; `steps` are (all, these).

    `make_step(forward, method)` is that of a stack, as `training.make_stacked_step` returns it;
    experts of one program are one.
    """
    settings, key = job.config.experts, job.key(f"{name}_deployed")
    inner = optimizer(settings.learning_rate, settings.weight_decay, steps[0], steps[0] - steps[1])
    params = list(made.params)
    for g, fn in enumerate(dict.fromkeys(made.fns)):
        members = [e for e, own in enumerate(made.fns) if own is fn]

        def forward(params, state, images, key, fn=fn):
            return fn(params, images), state

        @jax.jit
        def start(params, members=members):
            states = []
            for e, own in zip(members, params, strict=True):
                tx = pruning.hold_masks(inner, held(made.each[e], own))
                states.append(training.create_state(own, {}, tx, jax.random.fold_in(key, e)))
            return training.stack_states(states)

        trained = job.fit(
            f"{name}_deployed{g or ''}",
            make_step(forward, made.method if len(members) > 1 else "unroll"),
            start([params[e] for e in members]),
            steps[1],
            settings.batch_size,
            None if weights is None else weights[members],
        )
        for e, own in zip(members, experts.unstack(trained.params), strict=True):
            params[e] = own
    return made._replace(params=params)


def held(expert: Expert, params: Any) -> Any:
    """Returns the masks of what is trained of an expert, as `pruning.hold_masks` takes them."""
    masks = jax.tree.map(lambda _: optax.MaskedNode(), params)
    if expert.spec.weight_sparsity:
        for name, own in params["params"].items():
            if "kernel" in own:
                masks["params"][name]["kernel"] = own["kernel"] != 0
    return masks


def select(made: Experts, index: int) -> Experts:
    """Returns the one expert `index`."""
    return made._replace(
        each=(made.each[index],), fns=(made.fns[index],), params=[made.params[index]]
    )


def calibration_images(job: Job) -> jax.Array:
    """Returns training images (B, H, W, C) as a network takes them, always the same."""
    return job.normalize(job.splits.train.images[:CALIBRATION_IMAGES])
