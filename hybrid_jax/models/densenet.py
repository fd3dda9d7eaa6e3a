"""DenseNet: Huang, Liu, van der Maaten, Weinberger, Densely Connected ... (arXiv 1608.06993)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_jax.models.layers import conv, norm


class DenseNet(nn.Module):
    """DenseNet in its CIFAR form.

    `blocks` are the layers of each dense block, `growth` the channels that each adds (k in the
    paper). `bottleneck` puts a 1×1 convolution to 4·growth channels before each 3×3 (the B of BC),
    `reduction` is the fraction of channels that a transition keeps (below 1: the C of BC).
    """

    num_classes: int
    blocks: tuple[int, ...]
    growth: int = 12
    bottleneck: bool = True
    reduction: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (B, H, W, C) to logits (B, N)."""
        x = conv(2 * self.growth, 3, name="stem")(x)
        for block, count in enumerate(self.blocks):
            for i in range(count):
                y = x
                if self.bottleneck:
                    y = NormConv(4 * self.growth, 1, name=f"block{block}_layer{i}_narrow")(y, train)
                y = NormConv(self.growth, 3, name=f"block{block}_layer{i}")(y, train)
                x = jnp.concatenate([x, y], axis=-1)
            if block < len(self.blocks) - 1:
                kept = int(self.reduction * x.shape[-1])
                x = NormConv(kept, 1, name=f"transition{block}")(x, train)
                # nn.avg_pool divides by an integer array, which strict promotion refuses.
                x = nn.pool(x, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4
        x = nn.relu(norm(train)(x))
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


class NormConv(nn.Module):
    """BatchNorm, ReLU, then convolution without bias."""

    features: int
    size: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (B, H, W, C) to (B, H, W, features)."""
        return conv(self.features, self.size, name="conv")(nn.relu(norm(train)(x)))
