"""A network within a budget: what may be chosen is measured and chosen, and the file measured."""

import functools
import math
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core, deploy, pruning, quantization
from hybrid_jax import program as p
from hybrid_jax.program import memory
from hybrid_jax.quantization import CannotBeMet
from hybrid_jax.recipes import budget, cascade, choices, gate, ptq, schema
from hybrid_jax.recipes.config import ExpertSpec
from hybrid_jax.recipes.controls import cost_of
from hybrid_jax.recipes.cut import Model
from hybrid_jax.recipes.prune import channel_scores, cut, given, prune
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


def planned(task: Task, config: Any, specs: Sequence[ExpertSpec] = ()) -> dict[str, int]:
    """Returns what is within the budget by count, before any damage is known; {} without one.

    Of bits alone, or where `specs` are given of their networks' widths and bits.

    Raises:
      CannotBeMet: Where nothing keeps the budget.
    """
    parent, most = task.parent.cut, _of_networks(task.parent, config)
    if not most:
        return {}
    spec, targets = parent.with_bits(8, 8, 8).spec, config.deploy.targets
    least = {} if specs else parent.least_bits(config.ptq.depthwise_bits)
    offered = choices.offer(parent.program, spec, budget.what_pays(most, targets), least)
    if not specs:
        return choices.choose(offered, _counted(most), targets).costs
    alike = {
        group.name: dict.fromkeys(choices.kept_of(group.size), 0.0) for group in parent.graph.groups
    }
    offered = choices.with_widths(offered, parent.graph, alike)
    beside, made = _beside(task, config, len(specs)), {}
    each = [tuple(_counted(own).items()) for own in _of_each(most, specs, beside)]
    try:
        for own in sorted(set(each)):  # the smallest first
            made[own] = choices.choose(offered, dict(own), targets).costs
    except CannotBeMet as error:
        if len(specs) == 1:
            raise
        raise CannotBeMet(
            f"each of {len(specs)} experts must keep its part: {error}, and so could fewer experts "
            "or effort 'finetune', which makes one network"
        ) from None
    return _total([made[own] for own in each], beside)


def check_members(task: Task, config: Any) -> None:
    """Raises CannotBeMet where the members, which are as they are, do not keep the budget."""
    most = _of_networks(task.parent, config)
    if not most:
        return
    beside = _beside(task, config, len(task.members))
    together = _together(task, config, [model.encoded() for model in task.members])
    parts = [part for made in together for part in made.parts]
    found = {"memory": max(memory.plan(part).size for part in parts)}
    for name in schema.MEANS:
        dearest = max(getattr(cost_of(model), name) for model in task.members)
        found[name] = dearest + beside.get(name, 0)
    found |= _written(together, config)
    for name, limit in most.items():
        if found[name] > limit:
            raise CannotBeMet(
                f"budget.{name} must be at least {found[name]}, which config.mixture.members take, "
                f"got {limit}"
            )


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
    least = dense.least_bits(c.depthwise_bits)
    offered = choices.offer(dense.program, dense.spec, budget.what_pays(most, targets), least)
    damage = damage_of(task, config)
    measured = choices.measure_bits(offered, ptq.batches(task, IMAGES), c.calibration, damage)

    def make(limits):
        found = choices.choose(measured, _counted(limits), targets)
        facts = {"predicted": found.costs}
        return [ptq.quantized(parent, {**dense.bits, **found.bits}, facts)], found.costs

    (made,), costs = budget.meet(most, make, _measure(task, parent, config))
    return made._replace(facts={**made.facts, "measured": costs})


def pruned(task: Task, parent: Model, config: Any, specs: Sequence[ExpertSpec]) -> list[Model]:
    """Returns a network for each spec, with the widths and bits that keep the budget.

    They are those of the least damage; without a budget those of the specs. Of several networks
    the file of all keeps it: each has its part of the bytes, in the ratio of the squares of what
    the specs keep of channels, all of the memory, and all MACs and BOPs that a gate leaves.
    """
    most, targets, key = _of_networks(parent, config), config.deploy.targets, task.key("experts")
    if not most:
        return prune(task, parent, specs, key)
    first, graph = specs[0], parent.cut.graph
    dense = parent.cut.with_bits(first.weight_bits, first.activation_bits, first.first_last_bits)
    sample = ptq.batches(task, IMAGES)
    offered = choices.offer(dense.program, dense.spec, budget.what_pays(most, targets))
    damage = damage_of(task, config)
    measured = choices.measure_bits(offered, sample, config.experts.calibration, damage)
    scores = channel_scores(
        task, parent, specs, [jax.random.fold_in(key, i) for i in range(len(specs))]
    )
    whole = {group.name: jnp.ones(group.size, bool) for group in graph.groups}
    beside = _beside(task, config, len(specs))

    @functools.cache
    def with_widths(criterion):
        (images,) = sample[0]
        of_weights = pruning.CRITERIA[criterion](given(task, dense, dense.variables, key))
        widths = choices.measure_widths(
            dense.network.predict, dense.variables, graph, of_weights, images, damage=damage
        )
        return choices.with_widths(measured, graph, widths)

    def make(limits):
        made, costs = [], []
        for spec, own, each in zip(specs, _of_each(limits, specs, beside), scores, strict=True):
            found = choices.choose(with_widths(spec.criterion), _counted(own), targets)
            keep = pruning.to_widths(whole, each, {name: (n,) for name, n in found.widths.items()})
            model = cut(task, parent, spec, keep, {**dense.bits, **found.bits})
            made.append(model._replace(facts={**model.facts, "predicted": found.costs}))
            costs.append(found.costs)
        return made, _total(costs, beside)

    made, costs = budget.meet(most, make, _measure(task, parent, config))
    return [model._replace(facts={**model.facts, "measured": costs}) for model in made]


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


def _of_networks(parent: Model, config: Any) -> dict[str, float]:
    """Those limits that every network keeps by itself."""
    most = limits(parent, config)
    return {name: most[name] for name in schema.limited(config)}


def _of_each(
    limits: Mapping[str, float], specs: Sequence[ExpertSpec], beside: Mapping[str, int]
) -> list[dict[str, float]]:
    """The limits of each network, of which `beside` is taken already."""
    left = {name: most - beside.get(name, 0) for name, most in limits.items()}
    parts = [(1 - spec.sparsity) ** 2 for spec in specs]
    return [
        {name: most * part / sum(parts) if name == "bytes" else most for name, most in left.items()}
        for part in parts
    ]


def _total(costs: Sequence[Mapping[str, int]], beside: Mapping[str, int]) -> dict[str, int]:
    """What networks, of which one runs at a time, cost together with what is beside them."""
    most = {name: max(own[name] for own in costs) for name in costs[0]}
    most["bytes"] = sum(own["bytes"] for own in costs)
    return {name: n + beside.get(name, 0) for name, n in most.items()}


def _counted(limits: Mapping[str, float]) -> dict[str, int]:
    return {name: int(most) for name, most in limits.items() if name in budget.NAMES}


def _beside(task: Task, config: Any, count: int) -> dict[str, int]:
    """What a gate over so many takes of a budget; its memory is there before an expert's."""
    if count == 1 or config.mixture.kind == "cascade":
        return {}
    own = gate.untrained(task, count, config.gate)
    found = choices.choose(choices.offer(own.program, own.spec, {}), {}, config.deploy.targets)
    return {name: n for name, n in found.costs.items() if name != "memory"}


def _together(task: Task, config: Any, programs: Sequence[p.Program]) -> list[p.Program | p.Choice]:
    """What such networks may be written as: the one, or several behind a gate, as a cascade."""
    made, every, kind = [], tuple(programs), config.mixture.kind
    if len(every) == 1:
        return list(every)
    if kind != "cascade":
        own = gate.untrained(task, len(every), config.gate)
        made.append(p.Mixture(gate.calibrated(task, own, config.gate).encoded(), every))
    if kind != "gate":
        made.append(p.Cascade(every, 0.5, max(config.mixture.shares), cascade.confidence(task)))
    return made


def _written(made: Sequence[p.Program | p.Choice], config: Any) -> dict[str, int]:
    """What the files of all targets take, see `budget.measured`."""
    with tempfile.TemporaryDirectory() as folder:
        manifests = {
            f"{target}{i}": deploy.export_to(target, pathlib.Path(folder, target), own)
            for target in config.deploy.targets
            for i, own in enumerate(made)
        }
    return budget.measured(manifests)


def _measure(
    task: Task, parent: Model, config: Any
) -> Callable[[Sequence[Model]], dict[str, float]]:
    """measure(models) -> what their files take, and the time of one as a part of the parent's."""

    def encoded(model):
        plain = ptq.quantized(model, model.cut.bits)
        return ptq.calibrate(task, plain, ptq.BATCH, "minmax").encoded()

    def measure(made):
        together = _together(task, config, list(map(encoded, made)))
        found = dict(_written(together, config))
        if config.budget.latency:
            found["latency"] = _ratio(together[0], made[0], parent, config.budget.runtime)
        return found

    return lambda made: core.of_first(lambda: measure(made))


def _ratio(program: p.Program, model: Model, parent: Model, runtime: str) -> float:
    """The time of an image in a runtime, as a part of the parent's."""
    session = deploy.TARGETS[runtime].session
    with tempfile.TemporaryDirectory() as folder:
        files = [pathlib.Path(folder, name) for name in ("small", "dense")]
        for file, each in zip(files, (program, parent.cut.program), strict=True):
            deploy.export_to(runtime, file, each)
        small, dense = (session(file, 1, 1) for file in files)
        image = np.asarray(model.cut.images[:1])
        return deploy.latency(small, dense, image, pairs=PAIRS).ratio
