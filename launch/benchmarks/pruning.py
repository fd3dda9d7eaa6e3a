"""A training step that prunes against one that does not, and what there is to work out before."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hybrid_jax import core, pruning
from launch.benchmarks import measure
from launch.benchmarks.core import trace_and_group
from launch.benchmarks.measure import Row, Size

SPARSITY = 0.8
EVERY = 10
SPARSITIES = (0.2, 0.5, 0.8, 0.9)


def hold_masks(size: Size) -> Iterator[Row]:
    """A step on fixed masks."""
    params = measure.variables(size.small, size.small_image)["params"]
    score = _magnitude(size.small, size.small_image)
    masks = jax.jit(lambda params: pruning.masks(score(params), SPARSITY))(params)
    name = "training step with hold_masks / plain"
    sparse = functools.partial(pruning.hold_masks, masks=masks)
    yield _against_plain(name, size, sparse, target=1.05)


def schedule_at_rest(size: Size) -> Iterator[Row]:
    """A step of a schedule, between two updates of the masks."""
    # The first step prunes to the initial sparsity, no later one again.
    sparse = _by_schedule(size, every=10**6)
    name = "training step with prune_by_schedule, no mask update / plain"
    yield _against_plain(name, size, sparse, target=1.05)


def schedule_with_updates(size: Size) -> Iterator[Row]:
    """The mean of ten steps of a schedule, one of which updates the masks."""
    sparse = _by_schedule(size, every=EVERY)
    name = f"{EVERY} training steps with prune_by_schedule, 1 mask update / plain"
    yield _against_plain(name, size, sparse, target=1.15, steps=EVERY)


def mask_computation(size: Size) -> Iterator[Row]:
    """Seconds from the parameters of the large model to their masks, compiled."""
    params = measure.variables(size.large, size.large_image)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    score = _magnitude(size.large, size.large_image)
    for allocation in (pruning.uniform, pruning.global_):
        masks = jax.jit(
            lambda params, a=allocation: pruning.masks(score(params), SPARSITY, allocation=a())
        )
        name = f"masks of {count / 1e6:.3g} M parameters, {allocation.__name__.strip('_')}"
        yield measure.seconds(name, lambda masks=masks: masks(params), calls=size.calls)


def target_search(size: Size) -> Iterator[Row]:
    """Seconds from scores of channels to those that leave half of the large model's MACs."""
    params = measure.variables(size.large, size.large_image)
    image = jax.ShapeDtypeStruct((1, *size.large_image), jnp.float32)
    graph = core.trace(measure.predict(size.large), params, image)
    scores = pruning.group_scores(pruning.magnitude(graph.kernels, params), graph.groups)

    def run():
        return pruning.to_target(
            lambda sparsity: pruning.keep_channels(scores, sparsity, pruning.global_()),
            lambda keep: core.narrow_graph(graph, keep).macs,
            graph.macs / 2,
        ).choice

    yield measure.seconds("channels to half of the MACs", run, calls=size.calls)


def sensitivity_sweep(size: Size) -> Iterator[Row]:
    """Seconds for the loss of the small model with each kernel pruned alone, on one batch."""
    params, predict = measure.variables(size.small, size.small_image), measure.predict(size.small)
    batch = measure.training_batch(size)
    kernels = core.trace(predict, params, batch["image"]).kernels
    scores = pruning.magnitude(kernels, params)

    def loss(params, images, labels):
        logits = predict(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def run():
        return pruning.sensitivity(loss, params, scores, SPARSITIES, batch["image"], batch["label"])

    layers = len(jax.tree.leaves(scores))
    name = f"sensitivity of {layers} kernels at {len(SPARSITIES)} sparsities"
    yield measure.seconds(name, run, calls=size.calls)


BENCHMARKS = (
    hold_masks,
    schedule_at_rest,
    schedule_with_updates,
    mask_computation,
    trace_and_group,
    target_search,
    sensitivity_sweep,
)


def _magnitude(module, shape):
    """`magnitude` of the model's params, without its statistics."""
    variables, image = (
        measure.variables(module, shape),
        jax.ShapeDtypeStruct((1, *shape), "float32"),
    )
    predict = measure.predict(module)
    kernels = core.trace(
        lambda params, x: predict({**variables, "params": params}, x), variables["params"], image
    ).kernels
    return functools.partial(pruning.magnitude, kernels)


def _by_schedule(size, every):
    schedule = pruning.cubic(SPARSITY, begin=0, end=10**5, initial=SPARSITY / 2)
    score = _magnitude(size.small, size.small_image)
    return lambda inner: pruning.prune_by_schedule(inner, score, schedule, every=every)


def _against_plain(
    name: str, size: Size, sparse: measure.Sparse, target: float, steps: int = 1
) -> Row:
    pruned = measure.plain_stepping(size, sparse, steps=steps)
    plain = measure.plain_stepping(size, steps=steps)
    pairs = size.step_pairs if steps == 1 else max(size.step_pairs // 3, 1)
    row = measure.ratio(name, pruned, plain, pairs=pairs, target=target)
    removed = _removed(pruned()[0].opt_state)
    return row._replace(note=f"{row.note}; {removed:.1%} removed at the end")


def _removed(opt_state: Any) -> float:
    masks = [m for m in jax.tree.leaves(opt_state) if m.dtype == bool]
    return 1 - sum(int(m.sum()) for m in masks) / sum(m.size for m in masks)
