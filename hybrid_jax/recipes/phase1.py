"""Phase 1: experts cut from the parent, quantized, and trained together as one stack."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_jax import core, experts, pruning, quantization, training
from hybrid_jax.recipes import config as configuration
from hybrid_jax.recipes import workdir
from hybrid_jax.recipes.config import ExpertSpec
from hybrid_jax.recipes.job import Job, Network, optimizer

CALIBRATION_BATCHES = 8
BATCHNORM_BATCHES = 20


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


class Experts(NamedTuple):
    """E experts in one stack, of equal shape or narrower ones with masked channels.

    Attributes:
      network: Any of them, in floats, as wide as the stack.
      predict: (expert, images (B, H, W, C)) -> logits (B, N), quantized.
      stack: {'params', 'batch_stats', 'ranges', 'bits'} with a leading axis E on every leaf; an
        expert is one slice of it.
      masks: For each expert which weights are kept: bool pytree like its 'params'.
      specs: What each was made by.
      quantizers: How the sites of each are quantized.
      cuts: How the channels of each were removed.
      graph: The sites of any of them, as wide as the stack.
      method: How the experts are mapped, see `experts.map_experts`.
    """

    network: Network
    predict: Callable[[Any, jax.Array], jax.Array]
    stack: Any
    masks: list[Any]
    specs: tuple[ExpertSpec, ...]
    quantizers: list[quantization.Spec]
    cuts: list[Cut]
    graph: core.Graph
    method: str


class Alone(NamedTuple):
    """One expert out of its stack, at its own widths.

    Attributes:
      predict: (variables, images (B, H, W, C)) -> logits (B, N), in floats.
      variables: {'params', 'batch_stats'}.
      ranges: Of its sites.
      masks: Which weights are kept, like 'params'.
      graph: Its sites.
      quantizer: How these are quantized.
    """

    predict: Callable[[Any, jax.Array], jax.Array]
    variables: Any
    ranges: Any
    masks: Any
    graph: core.Graph
    quantizer: quantization.Spec


def compress(
    job: Job,
    dense: Network,
    variables: Any,
    specs: Sequence[ExpertSpec],
    name: str,
    steps: int,
    weights: np.ndarray | None = None,
) -> Experts:
    """Makes one expert per spec: cut, quantized, trained by distillation, all under one `jit`.

    Specs of different sparsity share a stack of the widest one's shape, in which the channels of
    the others are masked; `alone` removes them, and gives the expert as it is deployed.

    Args:
      job: The run.
      dense: The parent.
      variables: The parent's variables.
      specs: One per expert.
      name: Of the stage.
      steps: Of training.
      weights: (E, n) weight of each training image for each expert; None weighs all alike.

    Raises:
      FloatingPointError: If a loss is not finite.
    """
    settings, key = job.config.experts, job.key(name)
    cuts = cut_all(job, dense, variables, specs, key)
    small = cuts[0].network
    stack = experts.stack([c.variables for c in cuts])
    graph = core.trace(small.predict, cuts[0].variables, job.images)
    method = _method(job, name, small.predict, stack)
    masks = [stack_masks(c, spec) for c, spec in zip(cuts, specs, strict=True)]
    params = pruning.apply_masks(stack["params"], experts.stack(masks))
    stack = stack | {"params": params}

    def float_forward(params, state, images, key):
        return small.train({"params": params, **state}, images)

    stack = stack | _batchnorm(job, float_forward, stack["params"], stack, method)
    quantizers = [quantizer(graph, spec) for spec in specs]
    bits = experts.stack([q.bits() for q in quantizers])
    ranges = quantization.calibrate(
        small.predict,
        stack,
        [(images,) for images in job.sample(settings.batch_size, CALIBRATION_BATCHES)],
        quantizers[0],
        settings.calibration,
        bits=bits,
        stacked=True,
    )
    train = quantization.fake_quantized(small.train, quantizers[0])

    def forward(params, state, images, key):
        own = {"params": params["params"], "batch_stats": state["batch_stats"]}
        logits, updates = train(own, params["ranges"], images, bits=state["bits"])
        return logits, state | updates

    states = []
    for i, mask in enumerate(masks):
        params, ranges_i, stats, bits_i = jax.tree.map(
            lambda leaf, i=i: leaf[i], (stack["params"], ranges, stack["batch_stats"], bits)
        )
        held = {"params": mask, "ranges": jax.tree.map(lambda _: optax.MaskedNode(), ranges_i)}
        tx = optimizer(
            settings.learning_rate, settings.weight_decay, steps, pruning.hold_masks(held)
        )
        states.append(
            training.create_state(
                {"params": params, "ranges": ranges_i},
                {"batch_stats": stats, "bits": bits_i},
                tx,
                jax.random.fold_in(key, i),
            )
        )
    soft = job.config.distillation
    step = training.make_stacked_step(
        training.classification(forward, temperature=soft.temperature, alpha=soft.alpha),
        job.augment,
        lambda images: dense.predict(variables, images),
        per_expert=() if weights is None else ("weight",),
        method=method,
    )
    trained = job.fit(
        name, step, training.stack_states(states), steps, settings.batch_size, weights
    )
    state = _batchnorm(job, forward, trained.params, trained.state, method)
    predict = quantization.fake_quantized(small.predict, quantizers[0])

    def expert_predict(expert, images):
        own = {"params": expert["params"], "batch_stats": expert["batch_stats"]}
        return predict(own, expert["ranges"], images, bits=expert["bits"])

    return Experts(
        small,
        expert_predict,
        trained.params | state,
        masks,
        tuple(specs),
        quantizers,
        cuts,
        graph,
        method,
    )


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

    def cut(spec, key):
        scores = channel_scores(job, dense, variables, graph, spec, key)

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
    spec: ExpertSpec,
    key: jax.Array,
) -> dict[str, jax.Array]:
    """Returns the importance of the parent's coupled channels, jittered as `spec` says."""

    @jax.jit
    def score(variables):
        scores = criterion(job, dense, variables, spec.criterion)
        return pruning.group_scores(scores, graph.groups)

    scores = score(variables)
    if spec.jitter:
        for i, name in enumerate(scores):
            noise = jax.random.normal(jax.random.fold_in(key, i), scores[name].shape)
            scores[name] = scores[name] * jnp.exp(spec.jitter * noise)
    return scores


keep_channels = jax.jit(pruning.keep_channels, static_argnames="multiple")


def criterion(job: Job, dense: Network, variables: Any, name: str) -> Any:
    """Returns the scores of the parent's weights by one of `config.CRITERIA`."""
    if name == "taylor":
        images, labels = _first_images(job)

        def loss(variables):
            return training.cross_entropy(dense.predict(variables, images), labels)

        return pruning.taylor(variables, jax.grad(loss)(variables))
    return {
        "magnitude_l1": lambda: pruning.magnitude(variables, p=1),
        "magnitude_l2": lambda: pruning.magnitude(variables, p=2),
        "batchnorm_scale": lambda: pruning.batchnorm_scale(variables),
        "geometric_median": lambda: pruning.geometric_median(variables),
    }[name]()


def kernel_sparsity(shape: tuple[int, ...], spec: ExpertSpec) -> float:
    """Returns the fraction of a parameter's weights that `spec` sets to zero.

    Vectors have none, nor has a kernel whose input channels are no multiple of the M of N:M.
    """
    n_m = configuration.parse_granularity(spec.granularity)
    if len(shape) < 2:
        return 0.0
    if n_m is None:
        return spec.weight_sparsity
    return 0.0 if shape[-2] % n_m[1] else 1 - n_m[0] / n_m[1]


def weight_masks(params: Any, spec: ExpertSpec) -> Any:
    """Returns which weights of a cut network are kept: bool like `params`, or `MaskedNode`."""
    n_m = configuration.parse_granularity(spec.granularity)
    granularity = pruning.n_m(*n_m) if n_m else pruning.unstructured()
    sparsities = {kernel_sparsity(leaf.shape, spec) for leaf in jax.tree.leaves(params)} - {0.0}
    if not sparsities:
        return jax.tree.map(lambda _: optax.MaskedNode(), params)
    scores = jax.tree.map(
        lambda leaf, score: score if kernel_sparsity(leaf.shape, spec) else optax.MaskedNode(),
        params,
        pruning.magnitude(params),
    )
    return pruning.masks(scores, max(sparsities), granularity)


def stack_masks(made: Cut, spec: ExpertSpec) -> Any:
    """Returns `weight_masks` of an expert's own channels, with all others of the stack masked."""
    params = made.variables["params"]
    if made.own is None:
        return weight_masks(params, spec)
    kept = made.own.kept
    own = core.flatten_paths(
        weight_masks(core.slice_tree({"params": params}, kept)["params"], spec)
    )

    def widen(path, leaf):
        mask = np.zeros(leaf.shape, bool)
        inside = True if core.is_masked_node(own[path]) else own[path]
        mask[np.ix_(*kept[f"params/{path}"])] = inside
        return jnp.asarray(mask)

    return core.map_with_path(widen, params)


def select(made: Experts, index: int) -> Experts:
    """Returns the stack of the one expert `index`."""
    return made._replace(
        stack=jax.tree.map(lambda leaf: leaf[index : index + 1], made.stack),
        masks=[made.masks[index]],
        specs=(made.specs[index],),
        quantizers=[made.quantizers[index]],
        cuts=[made.cuts[index]],
        method="unroll",
    )


def alone(made: Experts) -> list[Alone]:
    """Returns each expert at its own widths: its masked channels are physically removed."""

    def take(expert, masks, cut, quantizer):
        variables = {name: expert[name] for name in ("params", "batch_stats")}
        if cut.own is None:
            ranges, predict = expert["ranges"], made.network.predict
            return Alone(predict, variables, ranges, masks, made.graph, quantizer)
        predict, graph, kept = cut.own
        return Alone(
            predict,
            core.slice_tree(variables, kept),
            own_ranges(expert["ranges"], graph, kept),
            core.slice_tree({"params": masks}, kept)["params"],
            graph,
            quantizer,
        )

    parts = zip(experts.unstack(made.stack), made.masks, made.cuts, made.quantizers, strict=True)
    return [take(*part) for part in parts]


def own_ranges(ranges: Any, graph: core.Graph, kept: dict[str, tuple[np.ndarray, ...]]) -> Any:
    """Returns the ranges of the channels that are kept; those of a tensor are of all of them."""

    def take(leaf, indices):
        if not leaf.ndim:
            return leaf
        axes = zip(indices, leaf.shape, strict=True)
        return leaf[np.ix_(*([0] if size == 1 else own for own, size in axes))]

    return {
        site.name: jax.tree.map(lambda leaf, i=kept[site.path]: take(leaf, i), ranges[site.name])
        for site in graph.sites
    }


def quantizer(graph: core.Graph, spec: ExpertSpec) -> quantization.Spec:
    """Returns how the sites of a cut network are quantized."""
    return quantization.spec(
        graph,
        weight_bits=spec.weight_bits,
        activation_bits=spec.activation_bits,
        first_last_bits=spec.first_last_bits,
    )


def _first_images(job, count=256):
    train = job.splits.train
    return job.normalize(train.images[:count]), jnp.asarray(train.labels[:count])


def _method(job, name, predict, stack):
    """How the experts are mapped; what was measured once holds for the whole run."""
    settings = job.config.experts
    if experts.count(stack) == 1:
        return "unroll"
    if settings.method != "auto":
        return settings.method
    batch = jax.ShapeDtypeStruct((settings.batch_size, *job.images.shape[1:]), jnp.float32)
    return workdir.remember(
        job.workdir, name, lambda: experts.fastest(predict, stack, batch, in_axes=(0, None))
    )


def _batchnorm(job, forward, params, state, method):
    """Running statistics of the stack, anew: {'batch_stats', and what else `state` holds}."""
    mapped = experts.map_experts(forward, method, in_axes=(0, 0, None, None))
    images = job.sample(job.config.experts.batch_size, BATCHNORM_BATCHES)
    state = {name: leaf for name, leaf in state.items() if name in ("batch_stats", "bits")}
    return training.reestimate_batchnorm(mapped, params, state, images)
