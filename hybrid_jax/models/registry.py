"""Models by the names that papers and configs use."""

import dataclasses
from typing import Any

import flax.linen as nn

from hybrid_jax import core
from hybrid_jax.models.densenet import DenseNet
from hybrid_jax.models.efficientnet import EfficientNetLite
from hybrid_jax.models.mobilenet import MobileNetV2
from hybrid_jax.models.resnet import ResNet
from hybrid_jax.models.vgg import VGG

_CIFAR_WIDTHS = (16, 32, 64)
# Expansion, channels, blocks, stride of the first and, where it is not 3, kernel size.
_EXPANSION = (1, 6, 6, 6, 6, 6, 6)
_MOBILENET = tuple(
    zip(_EXPANSION, (16, 24, 32, 64, 96, 160, 320), (1, 2, 3, 4, 3, 3, 1), (1, 2, 2, 2, 1, 2, 1))
)
_EFFICIENTNET = tuple(
    zip(
        _EXPANSION,
        (16, 24, 40, 80, 112, 192, 320),
        (1, 2, 2, 3, 3, 4, 1),
        (1, 2, 2, 2, 1, 2, 1),
        (3, 3, 5, 3, 5, 5, 3),
    )
)
_IMAGENET_RESNET = {"widths": (64, 128, 256, 512), "stem": "imagenet", "shortcut": "project"}

_MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "resnet8": (ResNet, {"blocks": (1, 1, 1), "widths": _CIFAR_WIDTHS}),
    "resnet20": (ResNet, {"blocks": (3, 3, 3), "widths": _CIFAR_WIDTHS}),
    "resnet32": (ResNet, {"blocks": (5, 5, 5), "widths": _CIFAR_WIDTHS}),
    "resnet56": (ResNet, {"blocks": (9, 9, 9), "widths": _CIFAR_WIDTHS}),
    "resnet18": (ResNet, {"blocks": (2, 2, 2, 2), **_IMAGENET_RESNET}),
    "resnet50": (ResNet, {"blocks": (3, 4, 6, 3), "bottleneck": True, **_IMAGENET_RESNET}),
    "vgg16_bn": (
        VGG,
        {"widths": ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))},
    ),
    "mobilenet_v2": (MobileNetV2, {"stages": _MOBILENET}),
    "efficientnet_lite0": (EfficientNetLite, {"stages": _EFFICIENTNET}),
    "densenet": (DenseNet, {"blocks": (16, 16, 16)}),
    "densenet40": (DenseNet, {"blocks": (12, 12, 12), "bottleneck": False, "reduction": 1.0}),
}


def names() -> tuple[str, ...]:
    """The names that `create` knows."""
    return tuple(_MODELS)


def create(name: str, num_classes: int, **overrides: Any) -> nn.Module:
    """Makes a model by name: a Linen module, called as `model.apply(variables, images, train)`.

    For 32×32 images: 'resnet8', 'resnet20', 'resnet32', 'resnet56', 'vgg16_bn', 'densenet'
    (DenseNet-BC of 100 layers, growth 12), 'densenet40' (not BC, with the stem of 24 channels that
    pruning papers give it). For 224×224 images: 'resnet18', 'resnet50', 'mobilenet_v2', which with
    stem='cifar' take 32×32 images too, and 'efficientnet_lite0'. Images are (B, H, W, C) float32 of
    any C, logits (B, N) float32. `overrides` are attributes of the class that differ from the
    published.
    """
    cls, published = _MODELS[core.check_choice("name", name, _MODELS)]
    core.check_integer("num_classes", num_classes, 1)
    fields = [f.name for f in dataclasses.fields(cls) if f.name not in ("parent", "name")]
    for override in overrides:
        core.check_choice(f"override of {name}", override, fields[1:])
    overrides = {key: _as_tuple(value) for key, value in overrides.items()}
    return cls(num_classes=num_classes, **{**published, **overrides})


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value
