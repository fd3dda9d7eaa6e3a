"""The controls that take training: single networks of the mixture's bytes and of its BOPs."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_jax import core, cost
from hybrid_jax.recipes import phase1, phase2
from hybrid_jax.recipes.config import ExpertSpec, expert_specs
from hybrid_jax.recipes.job import Job, Network

RESOLUTION = 64  # widths tried are those of sparsities i / 64
CLOSE = 0.97  # a target is met at this part of it


def singles(
    job: Job, dense: Network, variables: Any, made: phase1.Experts, gate: phase2.Gate
) -> dict[str, phase1.Experts]:
    """Returns {name: one compressed network} as dear as the mixture, trained as long as an expert.

    "Equal bytes" matches all experts and the gate, "equal BOPs" the gate and the dearest expert.
    Their steps are those of an expert: the ones of phase 1 and of joint fine-tuning.

    Args:
      job: The run.
      dense: The parent.
      variables: The parent's variables.
      made: The experts of the mixture.
      gate: Its gate.

    Raises:
      FloatingPointError: If a loss is not finite.
    """
    prices, own = costs(made), gate_cost(gate)
    targets = {}
    if job.config.controls.same_bytes:
        total = sum(price.bytes for price in prices) + own.bytes
        targets["equal bytes"] = (lambda price: price.bytes, total)
    if job.config.controls.same_bops:
        active = max(price.bops for price in prices) + own.bops
        targets["equal BOPs"] = (lambda price: price.bops, active)
    steps = job.config.experts.steps + job.config.joint.steps
    trained = {}
    for name, (measure, target) in targets.items():
        spec = single_spec(job, dense, variables, measure, target)
        stage = name.replace(" ", "_")
        trained[name] = phase1.compress(job, dense, variables, [spec], stage, steps)
    return trained


def gate_cost(gate: phase2.Gate) -> cost.Cost:
    """Returns what the gate costs."""
    return cost.count(gate.graph, None, gate.quantizer.weight_bits, gate.quantizer.activation_bits)


def costs(made: phase1.Experts) -> list[cost.Cost]:
    """Returns what each expert costs."""
    return [
        cost.count(made.graph, {"params": mask}, q.weight_bits, q.activation_bits)
        for mask, q in zip(made.masks, made.quantizers, strict=True)
    ]


def single_spec(
    job: Job,
    dense: Network,
    variables: Any,
    measure: Callable[[cost.Cost], int],
    target: int,
) -> ExpertSpec:
    """Returns the spec of the widest single network whose cost is at most `target`.

    It is cut, thinned and quantized like an expert, without a source of diversity. Where the
    parent's whole width at the expert's bits does not use the target up, bits are added up to 8.

    Args:
      job: The run.
      dense: The parent.
      variables: The parent's variables.
      measure: Which cost counts.
      target: The cost to match.
    """
    first = expert_specs(job.config)[0]
    first = dataclasses.replace(
        first,
        cluster=None,
        jitter=0.0,
        weight_bits=job.config.experts.weight_bits,
        activation_bits=job.config.experts.activation_bits,
    )
    for bits in range(first.weight_bits, 9):
        low, high = 0, RESOLUTION - 1  # the widest that fits is in between
        while low < high:
            middle = (low + high) // 2
            spec = dataclasses.replace(first, weight_bits=bits, sparsity=middle / RESOLUTION)
            if measure(planned_cost(job, dense, variables, spec)) <= target:
                high = middle
            else:
                low = middle + 1
        spec = dataclasses.replace(first, weight_bits=bits, sparsity=low / RESOLUTION)
        if low > 0 or measure(planned_cost(job, dense, variables, spec)) >= CLOSE * target:
            break
    return spec


def planned_cost(job: Job, dense: Network, variables: Any, spec: ExpertSpec) -> cost.Cost:
    """Returns what an expert of `spec` will cost; computed from shapes alone, nothing is run."""
    graph = core.trace(dense.predict, variables, job.images)
    alike = {group.name: jnp.zeros(group.size) for group in graph.groups}
    keep = phase1.keep_channels(alike, spec.sparsity, multiple=spec.multiple)
    masks = core.expand(keep, graph.groups, variables)
    predict, small, _ = core.shrink(dense.predict, variables, masks, job.images)
    graph = core.trace(predict, small, job.images)
    quantizer = phase1.quantizer(graph, spec)
    return cost.count(
        graph,
        {"params": _planned_masks(small["params"], spec)},
        quantizer.weight_bits,
        quantizer.activation_bits,
    )


def _planned_masks(params, spec):
    """Masks of the counts that `phase1.weight_masks` will have: costs depend on counts alone."""

    def mask(leaf):
        sparsity = phase1.kernel_sparsity(leaf.shape, spec)
        if not sparsity:
            return optax.MaskedNode()
        removed = math.floor(sparsity * leaf.size + 0.5)
        return (np.arange(leaf.size) >= removed).reshape(leaf.shape)

    return jax.tree.map(mask, params)
