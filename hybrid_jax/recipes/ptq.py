"""Quantization of a trained network without training."""

from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax import core, quantization, training
from hybrid_jax.recipes.cut import Model, with_functions
from hybrid_jax.recipes.task import Task
from hybrid_jax.recipes.train import in_training

BATCH = 64
EQUALIZED = 16
"""Images on which every pair of layers is tried."""
CORRECTED = 2**22
"""Pixels of the images that biases are corrected on, all edges of which are in memory at once."""


def batches(task: Task, images: int) -> list[tuple[jax.Array]]:
    """Returns batches of `images` training images, or of as many as there are, always the same."""
    count = min(images, len(task.splits.train.images))
    size = min(BATCH, count)
    return [(batch,) for batch in task.sample(size, count // size)]


def reestimate_batchnorm(task: Task, dense: Model, images: int) -> Model:
    """Returns the network with running statistics of the images at hand."""
    cut = dense.cut
    params, rest = cut.split(cut.variables)
    state = training.reestimate_batchnorm(
        in_training(cut, cut.network.train),
        {"params": params},
        {"rest": rest},
        [batch for (batch,) in batches(task, images)],
        task.key("batchnorm"),
    )
    rest = core.gathered(state["rest"])
    return dense._replace(cut=cut.with_variables(cut.merge(params, rest)))


def quantized(dense: Model, bits: Any, facts: Any = None) -> Model:
    """Returns the network with the bits of each site, and the weights of its inference graph."""
    cut = dense.cut.in_bits(bits)
    weights = jax.tree.map(jnp.asarray, dict(cut.program.params))
    return Model(cut, weights=weights, facts=facts or {})


def equalize(model: Model) -> Model:
    """Returns the network with channels scaled between layers, see `quantization.equalize`."""
    program, left_out = quantization.equalize(model.cut.program, model.cut.images[:EQUALIZED])
    weights = jax.tree.map(jnp.asarray, dict(program.params))
    return model._replace(weights=weights, facts={**model.facts, "not equalized": left_out})


def calibrate(task: Task, model: Model, images: int, method: str) -> Model:
    """Returns the network with the ranges of its kernels and edges."""
    planned = model.cut.plan.replace(model.weights)
    ranges = core.gathered(quantization.calibrate_edges(planned, batches(task, images), method))
    return with_functions([model._replace(ranges=jax.tree.map(jnp.asarray, ranges))])[0]


def round_kernels(task: Task, model: Model, images: int, method: str) -> Model:
    """Returns the network with its kernels on their grids, by one of `quantization.ROUNDINGS`."""
    planned = model.cut.plan.replace(model.weights)
    sample = core.gathered(batches(task, images))  # what follows is of single layers, on the host
    rounded = quantization.ROUNDINGS[method](planned, model.ranges, sample, task.key(method))
    return model._replace(weights=dict(rounded))


def correct_biases(task: Task, dense: Model, model: Model, images: int) -> Model:
    """Returns the network with biases that make mean outputs those of the network in floats."""
    planned = model.cut.plan.replace(dense.weights)
    height, width, _ = task.splits.image_shape
    sample = core.gathered(batches(task, min(images, max(CORRECTED // (height * width), 16))))
    new = quantization.correct_biases(planned, model.ranges, sample, model.weights)
    return model._replace(weights=new)
