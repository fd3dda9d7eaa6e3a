"""The controls that take training: single networks of the mixture's bytes and of its BOPs."""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from hybrid_jax import core, cost, experts, pruning
from hybrid_jax.recipes import deployed, phase1, phase2
from hybrid_jax.recipes.config import ExpertSpec, expert_specs
from hybrid_jax.recipes.job import Job, Network

RESOLUTION = 64  # widths tried are those of sparsities i / 64
CLOSE = 0.97  # a target is met at this part of it


def singles(
    job: Job, dense: Network, variables: Any, made: deployed.Experts, gate: phase2.Gate
) -> dict[str, deployed.Experts]:
    """Returns {name: one compressed network} as dear as the mixture, trained as long as an expert.

    "Equal bytes" matches all experts and the gate; "equal BOPs" the gate and, as often as it takes
    each of them for a validation image, the experts. Their steps are those of an expert: the ones
    of phase 1 and of joint fine-tuning.
    """
    prices, own = costs(made), gate_cost(gate)
    targets = {}
    if job.config.controls.same_bytes:
        targets["equal bytes"] = ("bytes", sum(price.bytes for price in prices) + own.bytes)
    if job.config.controls.same_bops:
        targets["equal BOPs"] = ("bops", _expected_bops(job, gate, prices) + own.bops)
    settings = job.config.experts
    steps = settings.steps + job.config.joint.steps
    first = dataclasses.replace(
        expert_specs(job.config)[0],
        images=None,
        jitter=0.0,
        sparsity=settings.sparsity,
        weight_bits=settings.weight_bits,
        activation_bits=settings.activation_bits,
    )
    small = functools.cache(functools.partial(planned_graph, job, dense, variables))
    trained = {}
    for name, (field, target) in targets.items():

        def price(spec, field=field):
            return getattr(planned_cost(small(spec.sparsity, spec.multiple), spec), field)

        spec = single_spec(first, price, target)
        stage = name.replace(" ", "_")
        trained[name] = phase1.compress(job, dense, variables, [spec], stage, steps)
    return trained


def _expected_bops(job, gate, prices):
    """BOPs of the expert that the gate takes, on average over the validation images."""
    bops = np.array([price.bops for price in prices])
    if np.ptp(bops) == 0:
        return bops[0]
    gate_logits = job.logits(gate.predict, gate.params, job.splits.validation)
    weights = experts.top_k(1)(jnp.asarray(gate_logits)).weights
    return np.dot(experts.usage(weights), bops)


def gate_cost(gate: phase2.Gate) -> cost.Cost:
    """Returns what the gate costs."""
    return cost.count(gate.graph, None, *_bits(gate.planned.spec))


def costs(made: deployed.Experts) -> list[cost.Cost]:
    """Returns what each expert costs."""
    return [cost.count(e.graph, {"params": e.masks}, *_bits(e.planned.spec)) for e in made.each]


def single_spec(
    first: ExpertSpec, price: Callable[[ExpertSpec], float], target: float
) -> ExpertSpec:
    """Returns `first` with the sparsity of the widest network whose price is at most `target`.

    Where the parent's whole width does not use the target up, weight bits are added, up to 8.

    `price` falls with sparsity and rises with bits.

    Example:
      >>> from hybrid_jax.recipes import default_config, expert_specs
      >>> first = expert_specs(default_config())[0]
      >>> spec = single_spec(first, lambda spec: (1 - spec.sparsity) * spec.weight_bits, 3.0)
      >>> spec.sparsity, spec.weight_bits  # (1 - 0.25) * 4
      (0.25, 4)
    """
    for bits in range(first.weight_bits, 9):
        specs = [
            dataclasses.replace(first, weight_bits=bits, sparsity=i / RESOLUTION)
            for i in range(RESOLUTION)
        ]
        # The first that fits, of ever smaller ones.
        index = bisect.bisect_left(specs[:-1], -target, key=lambda spec: -price(spec))
        if index > 0 or price(specs[0]) >= CLOSE * target:
            break
    return specs[index]


def planned_graph(
    job: Job, dense: Network, variables: Any, sparsity: float, multiple: int
) -> core.Graph:
    """Returns the parent's graph with channels removed; from shapes alone, nothing is run."""
    graph = core.trace(dense.predict, variables, job.images)
    alike = {group.name: np.zeros(group.size, np.float32) for group in graph.groups}
    keep = pruning.keep_channels(alike, sparsity, multiple=multiple)
    masks = core.expand(keep, graph.groups, variables)
    predict, small, _ = core.shrink(dense.predict, variables, masks, job.images)
    return core.trace(predict, small, job.images)


def planned_cost(graph: core.Graph, spec: ExpertSpec) -> cost.Cost:
    """Returns what an expert of `spec` will cost; the graph is of `planned_graph`."""
    masks = {
        path: _planned_mask(leaf, graph.kernels.get(path), spec)
        for path, leaf in graph.parameters.items()
    }
    return cost.count(graph, masks, *_bits(phase1.quantizer(graph, spec)))


def _bits(spec):
    return spec.weight_bits, spec.activation_bits


def _planned_mask(leaf, kernel, spec):
    """A mask of the count that `cutting.weight_masks` will have: costs depend on counts alone."""
    sparsity = 0.0 if kernel is None else spec.weight_sparsity
    removed = math.floor(sparsity * leaf.size + 0.5)
    return (np.arange(leaf.size) >= removed).reshape(leaf.shape)
