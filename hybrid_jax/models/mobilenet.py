"""MobileNetV2: Sandler et al., Inverted Residuals and Linear Bottlenecks (arXiv 1801.04381)."""

from collections.abc import Callable

import flax.linen as nn
import jax

from hybrid_jax import core
from hybrid_jax.models.layers import ConvNorm


class MobileNetV2(nn.Module):
    """MobileNetV2 of any width multiplier, by which all channels go, rounded to multiples of 8.

    `stages` are (expansion, channels, number of blocks, stride of the first). With the stem
    'cifar', instead of 'imagenet', stem and first strided stage keep stride 1: a 32×32 image ends
    as 4×4.
    """

    num_classes: int
    stages: tuple[tuple[int, int, int, int], ...]
    width: float = 1.0
    stem: str = "imagenet"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (B, H, W, C) to logits (B, N)."""
        core.check_choice("stem", self.stem, ("cifar", "imagenet"))
        core.check_positive("width", self.width)
        keep_size = self.stem == "cifar"
        features = round_to_8(32 * self.width)
        x = ConvNorm(features, 3, 1 if keep_size else 2, activation=nn.relu6, name="stem")(x, train)
        for stage, (expansion, features, count, stride) in enumerate(self.stages):
            if keep_size and stride > 1:
                stride, keep_size = 1, False
            for i in range(count):
                x = InvertedResidual(
                    round_to_8(features * self.width),
                    expansion,
                    stride if i == 0 else 1,
                    name=f"stage{stage}_block{i}",
                )(x, train)
        features = round_to_8(1280 * max(1.0, self.width))
        x = ConvNorm(features, 1, activation=nn.relu6, name="last")(x, train)
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise and linear 1×1 projection, with a shortcut where shapes fit."""

    features: int
    expansion: int
    stride: int
    size: int = 3
    layer: Callable[..., nn.Module] = ConvNorm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (B, H, W, C) to (B, H / stride, W / stride, features)."""
        wide = self.expansion * x.shape[-1]
        y = x
        if self.expansion != 1:
            y = self.layer(wide, 1, activation=nn.relu6, name="expand")(y, train)
        y = self.layer(wide, self.size, self.stride, wide, nn.relu6, name="depthwise")(y, train)
        y = self.layer(self.features, 1, activation=None, name="project")(y, train)
        return x + y if x.shape == y.shape else y


def round_to_8(features: float) -> int:
    """Rounds to a multiple of 8, at least 8 and not below 90 % of `features`."""
    rounded = max(8, int(features + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * features else rounded + 8
