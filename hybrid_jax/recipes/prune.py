"""What is removed from the parent: channels for good, and weights by masks."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_jax import core, pruning
from hybrid_jax.recipes.config import ExpertSpec
from hybrid_jax.recipes.cut import Cut, Model
from hybrid_jax.recipes.task import Task

SCORED_IMAGES = 256


def prune(task: Task, parent: Model, specs: Sequence[ExpertSpec], key: jax.Array) -> list[Model]:
    """Returns one network for each spec: without the channels that are least by its criterion.

    Their facts are {'spec', 'removed': part of the channels, 'difference' between the masked parent
    and the small network, 'macs' and 'parameters' (before, after)}.
    """
    keys = [jax.random.fold_in(key, i) for i in range(len(specs))]
    scores = channel_scores(task, parent, specs, keys)
    return [
        cut(task, parent, spec, kept_channels(parent.cut.graph, spec, own))
        for spec, own in zip(specs, scores, strict=True)
    ]


def kept_channels(
    graph: core.Graph, spec: ExpertSpec, scores: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Returns which channels of the parent stay, {group: bool (n,)}, by their scores."""
    allocation = pruning.ALLOCATIONS[spec.allocation](graph)
    return pruning.keep_channels(scores, spec.sparsity, allocation, spec.multiple)


def cut(
    task: Task,
    parent: Model,
    spec: ExpertSpec,
    keep: Mapping[str, Any],
    bits: Mapping[str, Mapping[str, int]] | None = None,
) -> Model:
    """Returns the parent with the channels of `keep`, {group: bool (n,)}, and masks on its weights.

    The small network is compared with the masked parent on validation images. `bits` of its sites
    take the place of those of the spec.
    """
    dense = parent.cut
    masks = core.expand(keep, dense.graph.groups, dense.variables)
    probe = task.normalize(task.splits.validation.images[:4])
    whole = recovered(task, dense, dense.variables, masks, spec.recovery)
    _, small, certificate = core.shrink(dense.network.predict, whole, masks, probe)
    learning = {name: getattr(spec, name) for name in ("weight_learning", "activation_learning")}
    own = Cut(
        dense.source, task.images, small, certificate.kept, origin=dense.origin, learning=learning
    )
    if bits is None:
        own = own.with_bits(spec.weight_bits, spec.activation_bits, spec.first_last_bits)
    else:
        own = dataclasses.replace(own, bits=bits)
    held = {}
    if spec.weight_sparsity:
        at_start = 0.0 if spec.schedule else spec.weight_sparsity
        held = weight_masks(own.graph, small, at_start, spec)
        if not spec.schedule:
            tree = core.map_with_path(lambda path, _: held.get(path, optax.MaskedNode()), small)
            small = recovered(task, own, small, tree, spec.recovery)
    stay = np.concatenate([np.asarray(own) for own in keep.values()])
    facts = {
        "spec": dataclasses.asdict(spec),
        "removed": float(1 - stay.mean()),
        "difference": certificate.difference,
        "macs": certificate.macs,
        "parameters": certificate.parameters,
    }
    masked = core.map_with_path(
        lambda path, w: jnp.where(held[path], w, 0) if path in held else w, small
    )
    return Model(own.with_variables(masked), held, facts=facts)


def recovered(task: Task, cut: Cut, variables: Any, masks: Any, name: str) -> Any:
    """Returns the variables after what `pruning.RECOVERIES` has by this name, if there is one."""
    if not name:
        return variables
    return pruning.RECOVERIES[name](given(task, cut, variables, task.key(name)), masks)


def weight_masks(
    graph: core.Graph, variables: Any, sparsity: float, spec: Any
) -> dict[str, jax.Array]:
    """Returns which weights of each kernel are kept, {path: bool}, one unit of each at least.

    `spec` says the granularity and the allocation, as config.experts or one expert's.
    """
    spread = pruning.ALLOCATIONS[spec.weight_allocation](graph)
    scores = pruning.magnitude(graph.kernels, variables)
    masks = pruning.masks(scores, sparsity, of_kernels(graph, spec.weight_granularity), spread)
    masks = core.flatten_paths(masks)
    return {path: mask for path, mask in masks.items() if not core.is_masked_node(mask)}


def of_kernels(graph: core.Graph, name: str, inside: str = "") -> pruning.Granularity:
    """Returns one of `pruning.GRANULARITIES` of kernels alone, each row of which keeps a unit.

    `inside` is what comes before the paths of the graph in those of the scores.
    """
    own = pruning.GRANULARITIES[name](graph)

    def bare(leaves):
        return {path.removeprefix(inside): leaf for path, leaf in leaves.items()}

    def merge(kept, leaves):
        masks, scores = own.merge(kept, bare(leaves)), bare(leaves)
        return {inside + p: m for p, m in masks.items() if not core.is_masked_node(scores[p])}

    return dataclasses.replace(
        own,
        paths=lambda leaves: own.paths(bare(leaves)),
        split=lambda leaves, names: own.split(bare(leaves), names),
        merge=merge,
        at_least=max(own.at_least, 1),
    )


def channel_scores(
    task: Task, parent: Model, specs: Sequence[ExpertSpec], keys: Sequence[jax.Array]
) -> list[dict[str, jax.Array]]:
    """Returns the importance of the parent's coupled channels for each spec, by one program."""
    graph = parent.cut.graph

    @jax.jit
    def score(variables, keys):
        scores = []
        for spec, key in zip(specs, keys, strict=True):
            known = given(task, parent.cut, variables, key)
            own = pruning.group_scores(pruning.CRITERIA[spec.criterion](known), graph.groups)
            if spec.jitter:
                for i, name in enumerate(sorted(own)):
                    noise = jax.random.normal(jax.random.fold_in(key, i), own[name].shape)
                    own[name] = own[name] * jnp.exp(spec.jitter * noise)
            scores.append(own)
        return scores

    return score(parent.cut.variables, keys)


def given(task: Task, dense: Cut, variables: Any, key: jax.Array) -> pruning.Given:
    """Returns what a criterion by name works the scores of the parent's weights out from."""
    train, predict = task.splits.train, dense.network.predict

    def loss(variables, images, labels):
        return task.objective.loss(predict(variables, images), labels).mean()

    return pruning.Given(
        dense.graph.kernels,
        variables,
        lambda variables, images, labels: predict(variables, images),
        loss,
        [
            (
                task.normalize(train.images[:SCORED_IMAGES]),
                jnp.asarray(train.labels[:SCORED_IMAGES]),
            )
        ],
        key,
    )
