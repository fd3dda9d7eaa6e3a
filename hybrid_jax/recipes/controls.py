"""The controls that take training: single networks of the mixture's bytes and of its BOPs."""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from hybrid_jax import core, cost, experts, pruning, quantization
from hybrid_jax.recipes import train
from hybrid_jax.recipes.config import ExpertSpec, single_spec
from hybrid_jax.recipes.cut import Cut, Model
from hybrid_jax.recipes.prune import prune
from hybrid_jax.recipes.state import State
from hybrid_jax.recipes.task import Task

EQUAL = {"equal bytes": "bytes", "equal BOPs": "bops"}  # what a control equals the mixture in
RESOLUTION = 64  # widths tried are those of sparsities i / 64
CLOSE = 0.97  # a target is met at this part of it


def singles(task: Task, state: State, config: Any) -> dict[str, Model]:
    """Returns {name: one compressed network} as dear as the mixture, trained as long as an expert.

    "Equal bytes" matches all experts and the gate; "equal BOPs" what runs on average for a
    validation image. Their steps are those of an expert: the ones of phase 1 and of joint training.
    """
    prices = [cost_of(model) for model in state.experts]
    own = [cost_of(state.gate)] if state.gate else []
    targets = {}
    if config.controls.same_bytes:
        targets["equal bytes"] = ("bytes", sum(price.bytes for price in (*prices, *own)))
    if config.controls.same_bops:
        share = runs(task, state, task.splits.validation)
        bops = np.dot(share, [price.bops for price in prices]) + sum(p.bops for p in own)
        targets["equal BOPs"] = ("bops", bops)
    settings = config.experts
    steps = settings.steps + (config.joint.steps if state.gate else 0)
    first = dataclasses.replace(
        single_spec(config),
        sparsity=settings.sparsity,
        weight_bits=settings.weight_bits,
        activation_bits=settings.activation_bits,
    )
    small = functools.cache(functools.partial(planned_graph, state.parent.cut))
    trained = {}
    for name, (field, target) in targets.items():

        def price(spec, field=field):
            return getattr(planned_cost(small(spec.sparsity, spec.multiple), spec), field)

        stage = name.replace(" ", "_")
        made = prune(task, state.parent, [within(first, price, target)], task.key(stage))
        alpha = config.distillation.alpha
        (trained[name],) = train.compress(task, state.parent, made, stage, settings, alpha, steps)
    return trained


def runs(task: Task, state: State, arrays: Any) -> np.ndarray:
    """Returns how often each expert (E,) runs for one of these images."""
    if state.gate:
        logits = task.outputs(state.gate.fn, state.gate.params, arrays)
        return np.asarray(experts.usage(experts.top_k(1)(logits).weights))
    outputs = np.stack([task.outputs(model.fn, model.params, arrays) for model in state.experts])
    stage = np.asarray(
        experts.cascade(jnp.asarray(outputs), state.thresholds, share=state.share).stage
    )
    return np.array([(stage >= e).mean() for e in range(len(state.experts))])


def cost_of(model: Model) -> cost.Cost:
    """Returns what a model costs."""
    masks = core.map_with_path(
        lambda path, w: model.masks.get(path, np.ones(w.shape, bool)), model.cut.variables
    )
    spec = model.cut.spec if model.cut.bits else None
    return cost.count(
        model.cut.graph, masks, *((spec and (spec.weight_bits, spec.activation_bits)) or ())
    )


def within(first: ExpertSpec, price: Callable[[ExpertSpec], float], target: float) -> ExpertSpec:
    """Returns `first` with the sparsity of the widest network whose price is at most `target`.

    Where the parent's whole width does not use the target up, weight bits are added, up to 8.

    `price` falls with sparsity and rises with bits.

    Example:
      >>> from hybrid_jax.recipes import default_config, expert_specs
      >>> first = expert_specs(default_config())[0]
      >>> spec = within(first, lambda spec: (1 - spec.sparsity) * spec.weight_bits, 3.0)
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


def planned_graph(dense: Cut, sparsity: float, multiple: int) -> core.Graph:
    """Returns the parent's graph with channels removed; from shapes alone, nothing is run."""
    alike = {group.name: np.zeros(group.size, np.float32) for group in dense.graph.groups}
    return core.narrow_graph(dense.graph, pruning.keep_channels(alike, sparsity, multiple=multiple))


def planned_cost(graph: core.Graph, spec: ExpertSpec) -> cost.Cost:
    """Returns what an expert of `spec` will cost; the graph is of `planned_graph`."""
    masks = {
        path: _planned_mask(leaf, graph.kernels.get(path), spec)
        for path, leaf in graph.parameters.items()
    }
    own = quantization.spec(
        graph,
        weight_bits=spec.weight_bits,
        activation_bits=spec.activation_bits,
        first_last_bits=spec.first_last_bits,
    )
    return cost.count(graph, masks, own.weight_bits, own.activation_bits)


def _planned_mask(leaf, kernel, spec):
    """A mask of the count that `weight_masks` will have: costs depend on counts alone."""
    sparsity = 0.0 if kernel is None else spec.weight_sparsity
    removed = math.floor(sparsity * leaf.size + 0.5)
    return (np.arange(leaf.size) >= removed).reshape(leaf.shape)
