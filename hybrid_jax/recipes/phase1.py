"""Phase 1: experts cut from the parent, quantized, and trained up to what is deployed."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_jax import core, experts, pruning, quantization, training
from hybrid_jax import program as p
from hybrid_jax.recipes import cutting, deployed
from hybrid_jax.recipes.config import ExpertSpec
from hybrid_jax.recipes.job import Job, Network, optimizer

CALIBRATION_BATCHES = 8
BATCHNORM_BATCHES = 20


class Alone(NamedTuple):
    """One expert out of the stack that it was trained in, at its own widths.

    Attributes:
      predict: (variables, images (B, H, W, C)) -> logits (B, N), in floats.
      variables: {'params', 'batch_stats'}.
      ranges: Of its sites.
      masks: Which weights are kept, like 'params'.
    """

    predict: Callable[[Any, jax.Array], jax.Array]
    variables: Any
    ranges: Any
    masks: Any
    graph: core.Graph


def compress(
    job: Job,
    dense: Network,
    variables: Any,
    specs: Sequence[ExpertSpec],
    name: str,
    steps: int,
    weights: np.ndarray | None = None,
) -> deployed.Experts:
    """Makes one expert per spec: cut, quantized and trained by distillation.

    They are trained as one stack under one `jit`, quantized at their sites with BatchNorm alive.
    Specs of different sparsity share a stack of the widest one's shape, in which the channels of
    the others are masked. For the last part of the steps, `config.experts.deployed`, each is at its
    own widths what a device computes, with BatchNorm folded.

    `weights` (E, n) are those of each training image for each expert; None weighs all alike.
    """
    last = round(job.config.experts.deployed * steps)
    cuts = cutting.cut_all(job, dense, variables, specs, job.key(name))
    method = _method(job, cuts[0].network.predict, experts.stack([c.variables for c in cuts]))
    soft = job.config.distillation

    def make_step(forward, method):
        return training.make_stacked_step(
            training.classification(forward, temperature=soft.temperature, alpha=soft.alpha),
            job.augment,
            lambda images: dense.predict(variables, images),
            per_expert=() if weights is None else ("weight",),
            method=method,
            choices=job.choices,
        )

    alone = at_sites(job, cuts, specs, name, (steps, steps - last), weights, method, make_step)
    images = deployed.calibration_images(job)
    each, fns, params = [], [], []
    for spec, made, own in zip(specs, cuts, alone, strict=True):
        program = p.lower(own.predict, own.variables, images)
        planned = quantization.plan(program, quantizer(own.graph, spec))
        ranges = quantization.edge_ranges(planned, own.ranges, images)
        each.append(deployed.Expert(spec, made.certificate, own.graph, own.masks, planned))
        fns.append(deployed.as_deployed(planned))
        params.append(jax.tree.map(jnp.asarray, {"params": dict(program.params), "ranges": ranges}))
    made = deployed.Experts(
        tuple(each), tuple(experts.alike(fns, params, job.images)), params, method
    )
    return deployed.train(job, made, name, (steps, last), weights, make_step) if last else made


def at_sites(job, cuts, specs, name, steps, weights, method, make_step) -> list[Alone]:
    """Returns the experts after their first steps, quantized at sites; `steps` are (all, these)."""
    settings, key = job.config.experts, job.key(name)
    small = cuts[0].network
    stack = experts.stack([c.variables for c in cuts])
    graph = core.trace(small.predict, cuts[0].variables, job.images)
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

    inner = optimizer(settings.learning_rate, settings.weight_decay, steps[0])

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

    trained = job.fit(
        name,
        make_step(forward, method),
        start(stack | {"ranges": ranges, "bits": bits}),
        steps[1],
        settings.batch_size,
        weights,
    )
    stack = trained.params | _batchnorm(job, forward, trained.params, trained.state, method)
    return [
        _alone(*part, graph, small.predict)
        for part in zip(experts.unstack(stack), masks, cuts, strict=True)
    ]


def _alone(expert, masks, cut, graph, predict) -> Alone:
    """An expert of a stack at its own widths: its masked channels are physically removed."""
    variables = {name: expert[name] for name in ("params", "batch_stats")}
    if cut.own is None:
        return Alone(predict, variables, expert["ranges"], masks, graph)
    predict, graph, kept = cut.own
    return Alone(
        predict,
        core.slice_tree(variables, kept),
        own_ranges(expert["ranges"], graph, kept),
        core.slice_tree({"params": masks}, kept)["params"],
        graph,
    )


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
