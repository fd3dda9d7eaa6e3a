"""A network within a budget: what may be chosen is measured and chosen, and the file measured."""

import math
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from hybrid_jax import core, deploy, pruning, quantization
from hybrid_jax.recipes import budget, choices, ptq
from hybrid_jax.recipes.config import single_spec
from hybrid_jax.recipes.cut import Model
from hybrid_jax.recipes.prune import cut, given
from hybrid_jax.recipes.task import Task

IMAGES = 128
"""Training images on which the damage of bits and widths is measured."""
PAIRS = 20


def asked(config: Any) -> budget.Budget | None:
    """Returns the budget of a configuration; None if it asks nothing."""
    values = {name: getattr(config.budget, name) or None for name in (*budget.NAMES, "latency")}
    if not any(values.values()):
        return None
    return budget.Budget(**values, runtime=config.budget.runtime if values["latency"] else None)


def check(task: Task, config: Any, widths: bool = False) -> None:
    """Raises CannotBeMet where no bits, nor widths where these are chosen, keep the budget."""
    parent, most, targets = task.parent.cut, limits(task.parent, config), config.deploy.targets
    if not most:
        return
    spec = parent.with_bits(8, 8, 8).spec
    offered = choices.offer(parent.program, spec, budget.what_pays(most, targets))
    if widths:
        alike = {
            group.name: dict.fromkeys(choices.kept_of(group.size), 0.0)
            for group in parent.graph.groups
        }
        offered = choices.with_widths(offered, parent.graph, alike)
    choices.choose(offered, _counted(most), targets)


def above(parent: Model, config: Any, files: Mapping[str, Any]) -> list[str]:
    """Returns what is to be said of each of {target: `report.File`} that is above the budget."""
    most = limits(parent, config).get("bytes", math.inf)
    return [
        f"{target}: {size} bytes, above the budget of {most}: the run was made for other targets"
        for target, file in files.items()
        if not file.error and (size := file.flash or file.bytes) > most
    ]


def quantized(task: Task, parent: Model, config: Any) -> Model:
    """Returns the network in the bits that keep the budget at the least damage, untrained."""
    c, most, targets = config.ptq, limits(parent, config), config.deploy.targets
    dense = parent.cut.with_bits(
        c.weight_bits, c.activation_bits, c.first_last_bits, c.depthwise_bits
    )
    if not most:
        return ptq.quantized(parent, dense.bits)
    offered = choices.offer(dense.program, dense.spec, budget.what_pays(most, targets))
    damage = damage_of(task, config)
    measured = choices.measure_bits(offered, ptq.batches(task, IMAGES), c.calibration, damage)

    def make(limits):
        found = choices.choose(measured, _counted(limits), targets)
        facts = {"predicted": found.costs}
        return ptq.quantized(parent, {**dense.bits, **found.bits}, facts), found.costs

    made, costs = budget.meet(most, make, _measure(task, parent, config))
    return made._replace(facts={**made.facts, "measured": costs})


def pruned(task: Task, parent: Model, config: Any) -> Model:
    """Returns the network with the widths and bits that keep the budget at the least damage."""
    spec, most, targets = single_spec(config), limits(parent, config), config.deploy.targets
    dense = parent.cut.with_bits(spec.weight_bits, spec.activation_bits, spec.first_last_bits)
    sample = ptq.batches(task, IMAGES)
    offered = choices.offer(dense.program, dense.spec, budget.what_pays(most, targets))
    damage = damage_of(task, config)
    measured = choices.measure_bits(offered, sample, config.experts.calibration, damage)
    known = given(task, dense, dense.variables, task.key("experts"))
    scores = pruning.CRITERIA[spec.criterion](known)
    (images,) = sample[0]
    widths = choices.measure_widths(
        dense.network.predict, dense.variables, dense.graph, scores, images, damage=damage
    )
    measured = choices.with_widths(measured, dense.graph, widths)
    each = pruning.group_scores(scores, dense.graph.groups)
    whole = {name: jnp.ones(len(own), bool) for name, own in each.items()}

    def make(limits):
        found = choices.choose(measured, _counted(limits), targets)
        widths = {name: (n,) for name, n in found.widths.items()}
        keep = pruning.to_widths(whole, each, widths)
        made = cut(task, parent, spec, keep, {**dense.bits, **found.bits})
        return made._replace(facts={**made.facts, "predicted": found.costs}), found.costs

    made, costs = budget.meet(most, make, _measure(task, parent, config))
    return made._replace(facts={**made.facts, "measured": costs})


def damage_of(task: Task, config: Any) -> Callable[[Any, Any], Any]:
    """Returns by what the bits and widths to choose from are compared."""
    usual = "kl" if task.splits.num_classes else "squared_difference"
    return quantization.DAMAGES[config.budget.damage or usual]


def limits(parent: Model, config: Any) -> dict[str, float]:
    """Returns {cost: the most it may be}, in absolute numbers; latency as a fraction."""
    own = asked(config)
    if own is None:
        return {}
    most = own.limits(budget.parent_costs(parent.cut.program, config.deploy.targets))
    return most | ({"latency": own.latency} if own.latency else {})


def _counted(limits: Mapping[str, float]) -> dict[str, int]:
    return {name: int(most) for name, most in limits.items() if name in budget.NAMES}


def _measure(task: Task, parent: Model, config: Any) -> Callable[[Model], dict[str, float]]:
    """measure(model) -> what its files take, and its time as a fraction of the parent's."""

    def measure(model):
        plain = ptq.quantized(model, model.cut.bits)
        program = ptq.calibrate(task, plain, ptq.BATCH, "minmax").encoded()
        with tempfile.TemporaryDirectory() as folder:
            manifests = {
                target: deploy.export_to(target, pathlib.Path(folder, target), program)
                for target in config.deploy.targets
            }
            found = dict(budget.measured(manifests))
            if config.budget.latency:
                runtime = config.budget.runtime
                session = deploy.TARGETS[runtime].session
                files = [pathlib.Path(folder, name) for name in ("small", "dense")]
                for file, each in zip(files, (program, parent.cut.program), strict=True):
                    deploy.export_to(runtime, file, each)
                small, dense = (session(file, 1, 1) for file in files)
                image = np.asarray(model.cut.images[:1])
                found["latency"] = deploy.latency(small, dense, image, pairs=PAIRS).ratio
        return found

    return lambda model: core.of_first(lambda: measure(model))
