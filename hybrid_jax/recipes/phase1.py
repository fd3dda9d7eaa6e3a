"""Phase 1: experts cut from the parent, quantized, and trained together as one stack."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_jax import core, experts, pruning, quantization, training
from hybrid_jax.recipes import cutting
from hybrid_jax.recipes.config import ExpertSpec
from hybrid_jax.recipes.job import Job, Network, optimizer

CALIBRATION_BATCHES = 8
BATCHNORM_BATCHES = 20


class Experts(NamedTuple):
    """E experts in one stack, of equal shape or narrower ones with masked channels.

    Attributes:
      network: Any of them, in floats, as wide as the stack.
      predict: (expert, images (B, H, W, C)) -> logits (B, N), quantized.
      stack: {'params', 'batch_stats', 'ranges', 'bits'} with a leading axis E on every leaf; an
        expert is one slice of it.
      masks: For each expert which weights are kept: bool pytree like its 'params'.
      graph: The sites of any of them, as wide as the stack.
      method: How the experts are mapped, see `experts.map_experts`.
    """

    network: Network
    predict: Callable[[Any, jax.Array], jax.Array]
    stack: Any
    masks: list[Any]
    specs: tuple[ExpertSpec, ...]
    quantizers: list[quantization.Spec]
    cuts: list[cutting.Cut]
    graph: core.Graph
    method: str


class Alone(NamedTuple):
    """One expert out of its stack, at its own widths.

    Attributes:
      predict: (variables, images (B, H, W, C)) -> logits (B, N), in floats.
      variables: {'params', 'batch_stats'}.
      masks: Which weights are kept, like 'params'.
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

    `weights` (E, n) are those of each training image for each expert; None weighs all alike.
    """
    settings, key = job.config.experts, job.key(name)
    cuts = cutting.cut_all(job, dense, variables, specs, key)
    small = cuts[0].network
    stack = experts.stack([c.variables for c in cuts])
    graph = core.trace(small.predict, cuts[0].variables, job.images)
    method = _method(job, small.predict, stack)
    masks = [
        cutting.stack_masks(c, graph.kernels, spec) for c, spec in zip(cuts, specs, strict=True)
    ]
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

    inner = optimizer(settings.learning_rate, settings.weight_decay, steps)

    @jax.jit
    def start(stack):
        states = []
        for i, (expert, mask) in enumerate(zip(experts.unstack(stack), masks, strict=True)):
            params = {name: expert[name] for name in ("params", "ranges")}
            free = jax.tree.map(lambda _: optax.MaskedNode(), expert["ranges"])
            tx = pruning.hold_masks(inner, {"params": mask, "ranges": free})
            fixed = {name: expert[name] for name in ("batch_stats", "bits")}
            states.append(training.create_state(params, fixed, tx, jax.random.fold_in(key, i)))
        return training.stack_states(states)

    soft = job.config.distillation
    step = training.make_stacked_step(
        training.classification(forward, temperature=soft.temperature, alpha=soft.alpha),
        job.augment,
        lambda images: dense.predict(variables, images),
        per_expert=() if weights is None else ("weight",),
        method=method,
        choices=job.choices,
    )
    trained = job.fit(
        name,
        step,
        start(stack | {"ranges": ranges, "bits": bits}),
        steps,
        settings.batch_size,
        weights,
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


def trained(stack: Any) -> Any:
    """Returns what was trained of a stack, by which a gate knows the experts that it was fitted to.

    BatchNorm's statistics are taken anew when a run goes on; on another number of cores their last
    bits differ, and the experts are the same.
    """
    return {name: leaf for name, leaf in stack.items() if name != "batch_stats"}


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

    return ranges | {
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
        deployable=True,
    )


def _method(job, predict, stack):
    """How the experts are mapped; what was measured once holds for the whole run."""
    settings = job.config.experts
    if experts.count(stack) > 1 and settings.method != "auto":
        return settings.method
    batch = jax.ShapeDtypeStruct((settings.batch_size, *job.images.shape[1:]), jnp.float32)
    return experts.fastest(predict, stack, batch, in_axes=(0, None), choices=job.choices)


def _batchnorm(job, forward, params, state, method):
    """Running statistics of the stack, anew: {'batch_stats', and what else `state` holds}."""
    mapped = experts.map_experts(forward, method, (0, 0, None, None), job.choices)
    images = job.sample(job.config.experts.batch_size, BATCHNORM_BATCHES)
    state = {name: leaf for name, leaf in state.items() if name in ("batch_stats", "bits")}
    return training.reestimate_batchnorm(mapped, params, state, images)
