"""What stages need of a network, its images and the configuration: asked before any is begun."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend

from hybrid_jax import core, data, models
from hybrid_jax.recipes import cascade
from hybrid_jax.recipes.config import flatten, is_read
from hybrid_jax.recipes.prune import channel_scores, weight_masks
from hybrid_jax.recipes.task import Task
from hybrid_jax.training import cross_entropy


def outputs(made: Any, splits: data.Splits) -> None:
    """Raises ValueError unless a network's outputs, by their shapes, are one array for all classes.

    `made` is what it makes of a batch, as `jax.eval_shape` has it.
    """
    if not isinstance(made, jax.ShapeDtypeStruct):
        shapes = ", ".join(str(leaf.shape) for leaf in jax.tree.leaves(made))
        raise ValueError(
            f"network must return one array, got {type(made).__name__} of shapes {shapes}"
        )
    if splits.num_classes and made.shape[-1] < splits.num_classes:
        raise ValueError(
            f"network must have an output for each of {splits.num_classes} classes, "
            f"got {made.shape[-1]}"
        )


def alike(task: Task, outputs: jax.ShapeDtypeStruct) -> None:
    """Raises ValueError unless teacher and members answer as the network does."""
    others = {} if task.teacher is None else {"teacher": task.teacher}
    others |= {f"members[{i}]": model.cut.network for i, model in enumerate(task.members)}
    few = jax.ShapeDtypeStruct((2, *task.image.shape[1:]), task.image.dtype)
    for name, network in others.items():
        try:
            shape = jax.eval_shape(network.predict, network.params, few).shape
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} must take the images of the run: {error}") from error
        if shape != outputs.shape:
            raise ValueError(
                f"{name} must have outputs of the network's shape {outputs.shape}, got {shape}"
            )


def platforms(config: Any) -> None:
    """Raises ValueError where a StableHLO file could not be run here, and so not be verified."""
    here, asked = jax.export.default_export_platform(), config.deploy.platforms
    if "stablehlo" in config.deploy.targets and here not in asked:
        raise ValueError(
            f"config.deploy.platforms must hold {here!r}, on which files are verified here, "
            f"got {asked}"
        )


def devices(count: int) -> list[jax.Device]:
    """Returns the devices that a run has: so many, 0 being all; one where JAX was told which.

    Raises:
      ValueError: If there are fewer.
    """
    told = jax.config.jax_default_device
    there = [told] if isinstance(told, jax.Device) else jax.devices(told)
    if count > len(there):
        raise ValueError(f"config.devices must be at most the {len(there)} there are, got {count}")
    if count and jax.process_count() > 1:
        raise ValueError(f"config.devices must be 0, all, for several processes, got {count}")
    return there[: count or None]


def divided(task: Task, config: Any) -> None:
    """Raises ValueError unless all of several processes have a part of every batch."""
    if jax.process_count() > 1:
        for line in undivided(task, config):
            raise ValueError(line)


def undivided(task: Task, config: Any) -> list[str]:
    """Returns what is to be said of each batch that does not divide among all devices."""
    found, count = [], max(len(task.devices), 1)
    for key, asked in flatten(config).items():
        section, _, name = key.partition(".")
        if name != "batch_size" or not is_read(config.effort, section):
            continue
        size = min(asked, len(task.splits.train.images)) if section != "evaluation" else asked
        if getattr(getattr(config, section), "steps", 1) and size % count:
            used = math.gcd(size, count)
            found.append(
                f"config.{key} must be a multiple of the {count} devices for all of them to work, "
                f"got batches of {size}, which {used} share"
            )
    return found


def training(task: Task, effort: str) -> None:
    """Raises ValueError unless the network can be trained, on labels that the user gave."""
    models.trainable(task.network, f"effort {effort!r}")
    _logits(task)
    if not task.labelled:
        raise ValueError(
            f"images must have labels for effort {effort!r}, got none; 'ptq' needs none"
        )


def is_cross_entropy(task: Task) -> bool:
    """Returns whether the loss is the library's own of classes."""
    return getattr(task.objective.loss, "func", None) is cross_entropy


def _logits(task: Task) -> None:
    """Raises ValueError where cross-entropy would take the softmax of probabilities."""
    if not is_cross_entropy(task):
        return
    traced = core.inline(
        jax.make_jaxpr(task.network.predict)(task.network.params, task.image)
    ).jaxpr
    made_by = {out: eqn for eqn in traced.eqns for out in eqn.outvars}

    def kind(var):
        known = isinstance(var, jax.extend.core.Var) and var in made_by
        return made_by[var].primitive.name if known else ""

    (out,) = traced.outvars
    softmax = kind(out) == "div" and kind(made_by[out].invars[0]) == "exp"
    if softmax or kind(out) == "logistic":
        raise ValueError(
            "network must return logits to learn by cross-entropy, got probabilities: leave its "
            f"last {'softmax' if softmax else 'sigmoid'} out, or give a loss of your own"
        )


def criteria(task: Task, specs: Sequence[Any]) -> None:
    """Raises ValueError unless channels can be removed, by each of these criteria."""
    parent, key = task.parent, task.key("criteria")
    if not parent.cut.graph.groups:
        raise ValueError(
            "network must have channels that can be removed, got none: --dry_run of effort 'ptq' "
            "says why"
        )
    for spec in {spec.criterion: spec for spec in specs}.values():
        try:
            jax.eval_shape(functools.partial(channel_scores, task, parent, [spec]), [key])
        except ValueError as error:
            raise ValueError(
                f"config.experts.criteria must be of what the network has, got {spec.criterion!r}: "
                f"{error}"
            ) from error


def zeros(task: Task, spec: Any) -> None:
    """Raises ValueError unless weights can become zero as config.experts says."""
    if not spec.weight_sparsity:
        return
    own = {"sparsity": spec.weight_sparsity, "spec": spec}
    try:
        masks = functools.partial(weight_masks, task.parent.cut.graph, **own)
        jax.eval_shape(masks, task.parent.cut.variables)
    except ValueError as error:
        raise ValueError(
            "config.experts.weight_granularity must be one that the network has, with its "
            f"weight_allocation and weight_sparsity, got {spec.weight_granularity!r}: {error}"
        ) from error


def batchnorm(task: Task) -> None:
    """Raises ValueError unless the network has running statistics that training moves."""
    models.trainable(task.network, "ptq.reestimate_batchnorm")
    if not task.parent.cut.statistics:
        raise ValueError(
            "config.ptq.reestimate_batchnorm must be false for a network without running "
            "statistics, got true"
        )


def mixture(task: Task, config: Any) -> None:
    """Raises ValueError unless the configuration of a mixture is of what there is."""
    if config.budget.latency:
        raise ValueError(
            "budget.latency must not be given for effort 'mixture', of which images take different "
            f"times, got {config.budget.latency}; 'finetune' keeps it"
        )
    kind = task.splits.label_kind
    sources = config.experts.diversity.split("+")
    count, images = config.experts.count, len(task.splits.train.images)
    if "cluster" in sources and count > images:
        raise ValueError(
            f"config.experts.count must be at most the {images} training images with diversity "
            f"'cluster', got {count}"
        )
    if "classes" in sources and kind != "classes":
        raise ValueError(
            "config.experts.diversity must be without 'classes' where labels of images are no "
            f"classes, got {config.experts.diversity!r} and labels of {kind}"
        )
    if len(task.members) == 1:
        raise ValueError("mixture.members must be two runs or more, got one")
    if config.mixture.kind == "gate":
        return
    cascade.confidence(task)
    if config.mixture.kind == "auto":
        return
    for name, given in (
        ("collapse.steps", config.collapse.steps),
        ("joint.refit", config.joint.refit),
    ):
        if given:
            raise ValueError(
                f"config.{name} must not be given for a cascade, which has no gate, got {given}"
            )
