"""The controls that take training: single networks of the mixture's bytes and of its BOPs."""

import bisect
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from hybrid_jax import core, cost, experts, quantization
from hybrid_jax.recipes import train
from hybrid_jax.recipes.config import ExpertSpec, single_spec
from hybrid_jax.recipes.cut import Cut, Model
from hybrid_jax.recipes.prune import channel_scores, cut, kept_channels, weight_masks
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
    parent, alpha, trained = state.parent, config.distillation.alpha, {}
    for name, (field, target) in targets.items():
        stage = name.replace(" ", "_")
        (scores,) = channel_scores(task, parent, [first], [task.key(stage)])

        def price(spec, field=field, scores=scores):
            keep = kept_channels(parent.cut.graph, spec, scores)
            return getattr(planned_cost(parent.cut, spec, keep), field)

        spec = within(first, price, target)
        made = [cut(task, parent, spec, kept_channels(parent.cut.graph, spec, scores))]
        (trained[name],) = train.compress(task, state.parent, made, stage, settings, alpha, steps)
    return trained


def runs(task: Task, state: State, arrays: Any) -> np.ndarray:
    """Returns how often each expert (E,) runs for one of these images."""
    if state.gate:
        logits = task.outputs(state.gate.fn, state.gate.params, arrays)
        return np.asarray(experts.usage(experts.top_k(1)(logits).weights))
    outputs = np.stack([task.outputs(model.fn, model.params, arrays) for model in state.experts])
    return runs_of(answered(task, state, outputs))


def answered(task: Task, state: State, outputs: np.ndarray) -> experts.Cascaded:
    """Returns what a cascade answers, of the outputs (E, B, …) of all its experts."""
    own = {"share": state.share, "confidence": task.objective.confidence}
    return experts.cascade(jnp.asarray(outputs), state.thresholds, **own)


def runs_of(made: experts.Cascaded) -> np.ndarray:
    """Returns how often each expert (E,) of a cascade ran."""
    return np.append(1.0, np.asarray(made.went_on) / len(made.stage))


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


def planned_cost(dense: Cut, spec: ExpertSpec, keep: Mapping[str, Any]) -> cost.Cost:
    """Returns what the parent without all channels but those of `keep` will cost; nothing is run.

    What becomes zero in training is counted as if training began with it.
    """
    graph = core.narrow_graph(dense.graph, keep)
    masks = {path: np.ones(leaf.shape, bool) for path, leaf in graph.parameters.items()}
    if spec.weight_sparsity:
        whole = core.expand(keep, dense.graph.groups, dense.variables)
        small = core.slice_tree(dense.variables, core.kept_indices(dense.graph, whole))
        masks |= weight_masks(graph, small, spec.weight_sparsity, spec)
    own = quantization.spec(
        graph,
        weight_bits=spec.weight_bits,
        activation_bits=spec.activation_bits,
        first_last_bits=spec.first_last_bits,
    )
    return cost.count(graph, masks, own.weight_bits, own.activation_bits)
