"""VGG with BatchNorm: Simonyan, Zisserman, Very Deep Convolutional Networks (arXiv 1409.1556)."""

import flax.linen as nn
import jax

from hybrid_jax.models.layers import ConvNorm, norm


class VGG(nn.Module):
    """VGG in its CIFAR form: stages of 3×3 convolutions, a max-pool after each, two dense layers.

    `widths` are the channels of each stage's convolutions; images must be at least 2^stages pixels
    high and wide. `hidden` are the features of the dense layer before the last; 0 leaves it out.
    """

    num_classes: int
    widths: tuple[tuple[int, ...], ...]
    hidden: int = 512

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (B, H, W, C) to logits (B, N)."""
        least = 2 ** len(self.widths)
        if min(x.shape[1:3]) < least:
            raise ValueError(
                f"images must be at least {least}×{least} for {len(self.widths)} stages, "
                f"got {x.shape[1]}×{x.shape[2]}"
            )
        for stage, widths in enumerate(self.widths):
            for i, width in enumerate(widths):
                x = ConvNorm(width, name=f"stage{stage}_conv{i}")(x, train)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        if self.hidden:
            x = nn.Dense(self.hidden, use_bias=False, name="hidden")(x)
            x = nn.relu(norm(train)(x))
        return nn.Dense(self.num_classes, name="head")(x)
