"""The whole method on one page: each effort is the list of its stages, in the order they run."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import safetensors.numpy

from hybrid_jax import core, training
from hybrid_jax.recipes import (
    cascade,
    collapse,
    controls,
    demands,
    diversity,
    gate,
    ptq,
    train,
    within,
)
from hybrid_jax.recipes.config import diversity_sources, expert_specs, single_spec
from hybrid_jax.recipes.state import Stage, State
from hybrid_jax.recipes.task import Task

Effort = Callable[[Task, Any], list[Stage]]
"""effort(task, config) -> stages; raises ValueError where one of them could not be done."""


def post_training(task: Task, config: Any) -> list[Stage]:
    """Quantizes the network without training: minutes."""
    c = config.ptq
    within.planned(task, config)

    def bits(state: State) -> State:
        return state._replace(experts=(within.quantized(task, state.parent, config),))

    def to_expert(change: Callable) -> Callable[[State], State]:
        return lambda state: state._replace(experts=(change(state.experts[0]),))

    stages = [Stage("bits", bits)]
    if c.reestimate_batchnorm:
        demands.batchnorm(task)

        def reestimate(state: State) -> State:
            return state._replace(parent=ptq.reestimate_batchnorm(task, state.parent, c.images))

        stages.insert(0, Stage("batchnorm", reestimate))
    if c.equalize:
        stages.append(Stage("equalize", to_expert(ptq.equalize)))

    def rounded(model):
        floats = ptq.calibrate(task, model, c.images, c.calibration)
        found = ptq.round_kernels(task, floats, c.images, c.rounding)
        return ptq.correct_biases(task, floats, found, c.images) if c.correct_biases else found

    return [*dense(task, config), *stages, Stage("round", to_expert(rounded))]


def finetune(task: Task, config: Any) -> list[Stage]:
    """Prunes the network, quantizes it and trains it by distillation: one compressed network."""
    c = config
    demands.training(task, "finetune")
    demands.criteria(task, [single_spec(c)])
    demands.zeros(task, single_spec(c))
    within.planned(task, c, [single_spec(c)])

    def cut(state: State) -> State:
        made = within.pruned(task, state.parent, c, [single_spec(c)])
        return state._replace(experts=tuple(made))

    def trained(state: State) -> State:
        alpha = c.distillation.alpha
        made = train.compress(task, state.parent, state.experts, "experts", c.experts, alpha)
        return state._replace(experts=tuple(made))

    return [*dense(task, c), Stage("prune", cut), Stage("train", trained, c.experts.steps)]


def mixture(task: Task, config: Any) -> list[Stage]:
    """Prunes and quantizes several networks, and learns which of them answers for an image."""
    c, alpha, method = config, config.distillation.alpha, config.experts.method
    sources = diversity_sources(c)
    owned = {"cluster", "classes"} & set(sources) and not task.members
    specs = expert_specs(c)
    most = within.limits(task.parent, c)
    demands.training(task, "mixture")
    demands.mixture(task, c)
    if task.members:
        within.check_members(task, c)
    else:
        demands.criteria(task, specs)
        demands.zeros(task, specs[0])
        within.planned(task, c, specs)

    def weights(state: State) -> Any:
        return diversity.image_weights(
            task, state.parent, sources, c.experts.count, c.experts.others_weight
        )

    def cut(state: State) -> State:
        made = within.pruned(task, state.parent, c, specs)
        return state._replace(experts=tuple(made))

    def trained(state: State) -> State:
        made = train.compress(
            task, state.parent, state.experts, "experts", c.experts, alpha, weights=weights(state)
        )
        return state._replace(experts=tuple(made), before=tuple(made))

    def taken(state: State) -> State:
        return state._replace(experts=task.members)

    def thresholds(state: State) -> State:
        return cascade.decided(task, state, c.mixture.shares, most)

    def learn(state: State) -> State:
        own = weights(state) if owned else None
        made = gate.learn_gate(task, state.parent, state.experts, c.gate, alpha, method, own)
        return state._replace(gate=made)

    def joint(state: State) -> State:
        if not state.gate:
            return state
        made, own = gate.fine_tune(
            task, state.parent, state.experts, state.gate, c.joint, alpha, c.gate, method
        )
        return state._replace(experts=tuple(made), gate=own)

    def refit(state: State) -> State:
        if not state.gate:
            return state
        own = gate.refit(task, state.parent, state.experts, state.gate, c.gate, alpha, method)
        return state._replace(gate=own)

    def single(state: State) -> State:
        return state._replace(singles=controls.singles(task, state, c))

    def collapsed(state: State) -> State:
        if not state.gate:
            return state
        made = collapse.collapse(task, state.experts, state.gate, c.collapse, method)
        return state._replace(singles={**state.singles, "collapsed mixture": made})

    own = [Stage("prune", cut), Stage("experts", trained, c.experts.steps * len(specs))]
    stages = [*dense(task, c), *([Stage("members", taken)] if task.members else own)]
    if c.mixture.kind != "cascade":
        stages.append(Stage("gate", learn, c.gate.steps))
    if c.mixture.kind != "gate":
        stages.append(Stage("thresholds", thresholds))
    if c.mixture.kind != "cascade":
        stages += [Stage("joint", joint, c.joint.steps * len(specs))] if c.joint.steps else []
        stages += [Stage("refit", refit, c.gate.steps)] if c.joint.refit else []
    if c.controls.same_bytes or c.controls.same_bops:
        stages.append(Stage("controls", single, 2 * (c.experts.steps + c.joint.steps)))
    if c.collapse.steps and c.mixture.kind != "cascade":
        stages.append(Stage("collapse", collapsed, c.collapse.steps))
    return stages


def dense(task: Task, config: Any) -> list[Stage]:
    """The stages that make the parent: none where it is given."""

    def parent(state: State) -> State:
        smooth = config.parent.label_smoothing
        own = (
            dataclasses.replace(task, objective=smoothed(task.objective, smooth))
            if smooth
            else task
        )
        made = train.parent(own, state.parent, config.parent)
        weights = core.flatten_paths(jax.device_get(made.cut.variables))
        path = task.workdir / "parent.safetensors"  # for another run's model.weights
        core.write_atomically({path: safetensors.numpy.save(weights)})
        return state._replace(parent=made)

    if task.given:
        return []
    if not config.parent.steps:
        raise ValueError("config.parent.steps must be above 0 for a network without weights, got 0")
    demands.training(task, config.effort)
    if config.parent.label_smoothing and not demands.is_cross_entropy(task):
        raise ValueError(
            "config.parent.label_smoothing must be 0 where the loss is no cross-entropy of "
            f"classes, got {config.parent.label_smoothing}"
        )
    return [Stage("parent", parent, config.parent.steps)]


def smoothed(objective: training.Objective, smoothing: float) -> training.Objective:
    """Returns the objective with labels that are spread over all classes by `smoothing`."""
    return objective._replace(loss=functools.partial(training.cross_entropy, smoothing=smoothing))


EFFORTS: dict[str, Effort] = {"ptq": post_training, "finetune": finetune, "mixture": mixture}
