"""Residual networks: He, Zhang, Ren, Sun, Deep Residual Learning (arXiv 1512.03385)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_jax import core
from hybrid_jax.models.layers import ConvNorm


class ResNet(nn.Module):
    """ResNet of basic or, with `bottleneck`, of 1×1, 3×3, 1×1 blocks, the stride on the 3×3.

    `blocks` and `widths` are the blocks and channels of each stage; a bottleneck block puts out
    four times as many. The stem is 'cifar' (3×3) or 'imagenet' (7×7 and a 3×3 max-pool, both of
    stride 2). Where shapes change the shortcut 'pad' subsamples and pads channels with zeros
    (option A of the paper, no parameters), 'project' is a 1×1 convolution (option B).
    """

    num_classes: int
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    bottleneck: bool = False
    stem: str = "cifar"
    shortcut: str = "pad"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (B, H, W, C) to logits (B, N)."""
        core.check_choice("stem", self.stem, ("cifar", "imagenet"))
        if len(self.blocks) != len(self.widths):
            raise ValueError(f"widths must be {len(self.blocks)} long as blocks, got {self.widths}")
        if self.stem == "cifar":
            x = ConvNorm(self.widths[0], name="stem")(x, train)
        else:
            x = ConvNorm(self.widths[0], size=7, stride=2, name="stem")(x, train)
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        block = Bottleneck if self.bottleneck else Basic
        for stage, (count, width) in enumerate(zip(self.blocks, self.widths, strict=True)):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                x = block(width, stride, self.shortcut, name=f"stage{stage}_block{i}")(x, train)
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


class Basic(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    width: int
    stride: int
    shortcut: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (B, H, W, C) to (B, H / stride, W / stride, width)."""
        y = ConvNorm(self.width, stride=self.stride, name="conv0")(x, train)
        y = ConvNorm(self.width, activation=None, name="conv1")(y, train)
        return nn.relu(y + shortcut(x, self.width, self.stride, self.shortcut, train))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside a shortcut; four times as many channels come out."""

    width: int
    stride: int
    shortcut: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (B, H, W, C) to (B, H / stride, W / stride, 4 · width)."""
        y = ConvNorm(self.width, size=1, name="conv0")(x, train)
        y = ConvNorm(self.width, stride=self.stride, name="conv1")(y, train)
        y = ConvNorm(4 * self.width, size=1, activation=None, name="conv2")(y, train)
        return nn.relu(y + shortcut(x, 4 * self.width, self.stride, self.shortcut, train))


def shortcut(x: jax.Array, width: int, stride: int, kind: str, train: bool) -> jax.Array:
    """Brings a block's input to its output's shape: as it is where that fits, else by `kind`."""
    core.check_choice("shortcut", kind, ("pad", "project"))
    extra = width - x.shape[-1]
    if stride == 1 and extra == 0:
        return x
    if kind == "project":
        return ConvNorm(width, 1, stride, activation=None, name="shortcut")(x, train)
    if extra < 0:
        raise ValueError(
            f"widths must not decrease where shortcut is 'pad', got {width} after {x.shape[-1]}"
        )
    pad = (extra // 2, extra - extra // 2)
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), pad))
