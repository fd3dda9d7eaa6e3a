"""Phase 1: experts cut from the parent, quantized, and trained together as one stack."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.cluster import KMeans

from hybrid_jax import core, experts, pruning, quantization, training
from hybrid_jax.recipes import config as configuration
from hybrid_jax.recipes import workdir
from hybrid_jax.recipes.config import ExpertSpec
from hybrid_jax.recipes.job import Job, Network, optimizer

CALIBRATION_BATCHES = 8
BATCHNORM_BATCHES = 20


class Cut(NamedTuple):
    """A network with channels physically removed.

    Attributes:
      network: The small network.
      variables: Its variables.
      certificate: How far it is from the masked parent, and the costs before and after.
    """

    network: Network
    variables: Any
    certificate: Any


class Experts(NamedTuple):
    """E experts of equal shape.

    Attributes:
      network: Any of them, in floats.
      predict: (expert, images (B, H, W, C)) -> logits (B, N), quantized.
      stack: {'params', 'batch_stats', 'ranges', 'bits'} with a leading axis E on every leaf; an
        expert is one slice of it.
      masks: For each expert which weights are kept: bool pytree like its 'params'.
      specs: What each was made by.
      quantizers: How the sites of each are quantized.
      certificates: Of the removal of each one's channels.
      graph: The sites of any of them.
      method: How the experts are mapped, see `experts.map_experts`.
    """

    network: Network
    predict: Callable[[Any, jax.Array], jax.Array]
    stack: Any
    masks: list[Any]
    specs: tuple[ExpertSpec, ...]
    quantizers: list[quantization.Spec]
    certificates: list[Any]
    graph: core.Graph
    method: str


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

    Args:
      job: The run.
      dense: The parent.
      variables: The parent's variables.
      specs: One per expert; they remove equally many channels.
      name: Of the stage.
      steps: Of training.
      weights: (E, n) weight of each training image for each expert; None weighs all alike.

    Raises:
      FloatingPointError: If a loss is not finite.
    """
    settings, key = job.config.experts, job.key(name)
    cuts = [
        cut(job, dense, variables, spec, jax.random.fold_in(key, i)) for i, spec in enumerate(specs)
    ]
    small = cuts[0].network
    stack = experts.stack([c.variables for c in cuts])
    graph = core.trace(small.predict, cuts[0].variables, job.images)
    method = _method(job, name, small.predict, stack)
    masks = [weight_masks(c.variables["params"], spec) for c, spec in zip(cuts, specs, strict=True)]
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
        [c.certificate for c in cuts],
        graph,
        method,
    )


def cut(job: Job, dense: Network, variables: Any, spec: ExpertSpec, key: jax.Array) -> Cut:
    """Physically removes the channels that are least important by the criterion of `spec`.

    Args:
      job: The run.
      dense: The parent.
      variables: The parent's variables.
      spec: By which criterion, and how many.
      key: Random key of the jitter.
    """
    graph = core.trace(dense.predict, variables, job.images)

    @jax.jit
    def score(variables):
        scores = criterion(job, dense, variables, spec.criterion)
        return pruning.group_scores(scores, graph.groups)

    scores = score(variables)
    if spec.jitter:
        for i, name in enumerate(scores):
            noise = jax.random.normal(jax.random.fold_in(key, i), scores[name].shape)
            scores[name] = scores[name] * jnp.exp(spec.jitter * noise)
    keep = keep_channels(scores, spec.sparsity, multiple=spec.multiple)
    masks = core.expand(keep, graph.groups, variables)
    probe = job.normalize(job.splits.validation.images[:4])
    predict, small, certificate = core.shrink(dense.predict, variables, masks, probe)
    train = core.narrow(dense.train, variables, certificate.kept)
    return Cut(Network(predict, train), small, certificate)


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


def quantizer(graph: core.Graph, spec: ExpertSpec) -> quantization.Spec:
    """Returns how the sites of a cut network are quantized."""
    return quantization.spec(
        graph,
        weight_bits=spec.weight_bits,
        activation_bits=spec.activation_bits,
        first_last_bits=spec.first_last_bits,
    )


def cluster_weights(job: Job, dense: Network, variables: Any) -> np.ndarray | None:
    """Returns (E, n) weights of the training images: expert e prefers cluster e of the data.

    The clusters are those of k-means on the parent's logits. None where the configuration does not
    name this source of diversity.
    """
    settings = job.config.experts
    if "cluster" not in configuration.diversity_sources(job.config):
        return None
    logits = job.logits(dense.predict, variables, job.splits.train)
    means = KMeans(settings.count, n_init=4, random_state=job.config.seed)
    own = means.fit_predict(logits)[None] == np.arange(settings.count)[:, None]
    return np.where(own, 1.0, settings.others_weight).astype(np.float32)


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
