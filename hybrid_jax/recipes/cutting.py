"""What phase 1 removes from the parent: channels for good, and weights by masks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_jax import core, pruning, training
from hybrid_jax.recipes.config import ExpertSpec
from hybrid_jax.recipes.job import Job, Network

Kernels = Mapping[str, core.Kernel]


class Own(NamedTuple):
    """What is an expert's own of a stack that is wider.

    Attributes:
      predict: (its variables, images (B, H, W, C)) -> logits (B, N), in floats.
      graph: Its sites.
      kept: Indices of the stack's parameters that are its own.
    """

    predict: Callable[[Any, jax.Array], jax.Array]
    graph: core.Graph
    kept: dict[str, tuple[np.ndarray, ...]]


class Cut(NamedTuple):
    """A network with channels physically removed, as wide as the widest of its stack.

    Attributes:
      certificate: How far the expert at its own widths is from the masked parent, and the costs
        before and after.
      own: What of it is the expert's own; None for all.
    """

    network: Network
    variables: Any
    certificate: core.Certificate
    own: Own | None


def cut_all(
    job: Job, dense: Network, variables: Any, specs: Sequence[ExpertSpec], key: jax.Array
) -> list[Cut]:
    """Physically removes the channels that are least important by the criterion of each spec."""
    graph = core.trace(dense.predict, variables, job.images)
    probe = job.normalize(job.splits.validation.images[:4])
    widest = min(spec.sparsity for spec in specs)
    alike = all(spec.sparsity == widest for spec in specs)

    def cut(spec, scores):
        def shrink(sparsity):
            keep = pruning.keep_channels(scores, sparsity, multiple=spec.multiple)
            masks = core.expand(keep, graph.groups, variables)
            return core.shrink(dense.predict, variables, masks, probe)

        predict, small, certificate = shrink(widest)
        network = Network(predict, core.narrow(dense.train, variables, certificate.kept))
        if alike:
            return Cut(network, small, certificate, None)
        narrower = certificate if spec.sparsity == widest else shrink(spec.sparsity)[2]
        # The same scores keep ever fewer channels: the own ones are among the stack's.
        kept = {
            path: tuple(map(np.searchsorted, certificate.kept[path], indices))
            for path, indices in narrower.kept.items()
        }
        own = core.narrow(predict, small, kept)
        sites = core.trace(own, core.slice_tree(small, kept), job.images)
        return Cut(network, small, narrower, Own(own, sites, kept))

    keys = [jax.random.fold_in(key, i) for i in range(len(specs))]
    scores = channel_scores(job, dense, variables, graph, specs, keys)
    return list(map(cut, specs, scores))


def channel_scores(
    job: Job, dense: Network, variables: Any, graph: core.Graph, specs: Any, keys: Any
) -> list[dict[str, jax.Array]]:
    """Returns the importance of the parent's coupled channels for each spec, by one program."""

    @jax.jit
    def score(variables, keys):
        scores = []
        for spec, key in zip(specs, keys, strict=True):
            known = given(job, dense, variables, graph, key)
            own = pruning.group_scores(pruning.CRITERIA[spec.criterion](known), graph.groups)
            if spec.jitter:
                for i, name in enumerate(sorted(own)):
                    noise = jax.random.normal(jax.random.fold_in(key, i), own[name].shape)
                    own[name] = own[name] * jnp.exp(spec.jitter * noise)
            scores.append(own)
        return scores

    return score(variables, keys)


def given(job: Job, dense: Network, variables: Any, graph: core.Graph, key: jax.Array, count=256):
    """Returns what a criterion by name works the scores of the parent's weights out from."""
    train = job.splits.train

    def loss(variables, images, labels):
        return training.cross_entropy(dense.predict(variables, images), labels)

    return pruning.Given(
        graph.kernels,
        variables,
        lambda variables, images, labels: dense.predict(variables, images),
        loss,
        [(job.normalize(train.images[:count]), jnp.asarray(train.labels[:count]))],
        key,
    )


def weight_masks(kernels: Kernels, params: Any, spec: ExpertSpec) -> Any:
    """Returns which weights of a cut network are kept: bool like `params`, or `MaskedNode`."""
    if not spec.weight_sparsity:
        return jax.tree.map(lambda _: optax.MaskedNode(), params)
    return pruning.masks(pruning.magnitude(kernels, params), spec.weight_sparsity)


def stack_masks(made: Cut, kernels: Kernels, spec: ExpertSpec) -> Any:
    """Returns `weight_masks` of an expert's own channels, with all others of the stack masked."""
    params = {"params": made.variables["params"]}
    if made.own is None:
        return weight_masks(kernels, params, spec)["params"]
    kept = made.own.kept
    own = core.flatten_paths(
        weight_masks(made.own.graph.kernels, core.slice_tree(params, kept), spec)
    )

    def widen(path, leaf):
        mask = np.zeros(leaf.shape, bool)
        inside = True if core.is_masked_node(own[path]) else own[path]
        mask[np.ix_(*kept[path])] = inside
        return jnp.asarray(mask)

    return core.map_with_path(widen, params)["params"]
