"""What phase 1 removes from the parent: channels for good, and weights by masks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_jax import core, pruning, training
from hybrid_jax.recipes import config as configuration
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
      network: The small network.
      variables: Its variables.
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
    """Physically removes the channels that are least important by the criterion of each spec.

    Args:
      job: The run.
      dense: The parent.
      variables: The parent's variables.
      specs: By which criterion, and how many.
      key: Random key of the jitter.
    """
    graph = core.trace(dense.predict, variables, job.images)
    probe = job.normalize(job.splits.validation.images[:4])
    widest = min(spec.sparsity for spec in specs)
    alike = all(spec.sparsity == widest for spec in specs)

    criteria = tuple(dict.fromkeys(spec.criterion for spec in specs))
    scores_by = channel_scores(job, dense, variables, graph, criteria)

    def cut(spec, key):
        scores = jittered(scores_by[spec.criterion], spec.jitter, key)

        def shrink(sparsity):
            keep = keep_channels(scores, sparsity, multiple=spec.multiple)
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

    return [cut(spec, jax.random.fold_in(key, i)) for i, spec in enumerate(specs)]


def channel_scores(
    job: Job,
    dense: Network,
    variables: Any,
    graph: core.Graph,
    criteria: Sequence[str],
) -> dict[str, dict[str, jax.Array]]:
    """Returns {criterion: importance of the parent's coupled channels}, by one program."""

    @jax.jit
    def score(variables):
        each = {name: criterion(job, dense, graph.kernels, variables, name) for name in criteria}
        return {name: pruning.group_scores(own, graph.groups) for name, own in each.items()}

    return score(variables)


def jittered(scores: dict[str, jax.Array], spread: float, key: jax.Array) -> dict[str, jax.Array]:
    """Returns the scores times random log-normal factors of that spread."""
    if not spread:
        return scores
    noise = {
        name: jax.random.normal(jax.random.fold_in(key, i), scores[name].shape)
        for i, name in enumerate(scores)
    }
    return {name: own * jnp.exp(spread * noise[name]) for name, own in scores.items()}


keep_channels = jax.jit(pruning.keep_channels, static_argnames="multiple")


def criterion(job: Job, dense: Network, kernels: Kernels, variables: Any, name: str) -> Any:
    """Returns the scores of the parent's weights by one of `config.CRITERIA`."""
    if name == "taylor":
        images, labels = _first_images(job)

        def loss(variables):
            return training.cross_entropy(dense.predict(variables, images), labels)

        return pruning.taylor(kernels, variables, jax.grad(loss)(variables))
    return {
        "magnitude_l1": lambda: pruning.magnitude(kernels, variables, p=1),
        "magnitude_l2": lambda: pruning.magnitude(kernels, variables, p=2),
        "batchnorm_scale": lambda: pruning.batchnorm_scale(variables),
        "geometric_median": lambda: pruning.geometric_median(kernels, variables),
    }[name]()


def kernel_sparsity(kernel: core.Kernel | None, spec: ExpertSpec) -> float:
    """Returns the fraction of a parameter's weights that `spec` sets to zero.

    What is no kernel (None) has none, nor has one whose inputs are no multiple of the M of N:M.
    """
    n_m = configuration.parse_granularity(spec.granularity)
    if kernel is None:
        return 0.0
    if n_m is None:
        return spec.weight_sparsity
    return 0.0 if kernel.known_sizes()[2] % n_m[1] else 1 - n_m[0] / n_m[1]


def weight_masks(kernels: Kernels, params: Any, spec: ExpertSpec) -> Any:
    """Returns which weights of a cut network are kept: bool like `params`, or `MaskedNode`."""
    n_m = configuration.parse_granularity(spec.granularity)
    granularity = pruning.n_m(kernels, *n_m) if n_m else pruning.unstructured()
    thinned = {path: own for path, own in kernels.items() if kernel_sparsity(own, spec)}
    if not thinned:
        return jax.tree.map(lambda _: optax.MaskedNode(), params)
    sparsity = max(kernel_sparsity(own, spec) for own in thinned.values())
    return pruning.masks(pruning.magnitude(thinned, params), sparsity, granularity)


def stack_masks(made: Cut, kernels: Kernels, spec: ExpertSpec) -> Any:
    """Returns `weight_masks` of an expert's own channels, with all others of the stack masked.

    Args:
      made: The expert.
      kernels: Those of the stack.
      spec: Says how its weights are thinned.
    """
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


def _first_images(job, count=256):
    train = job.splits.train
    return job.normalize(train.images[:count]), jnp.asarray(train.labels[:count])
