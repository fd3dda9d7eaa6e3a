"""What every family is built of."""

from collections.abc import Callable

import flax.linen as nn
import jax


def conv(
    features: int, size: int, stride: int = 1, groups: int = 1, name: str | None = None
) -> nn.Conv:
    """Convolution without bias, padded by size // 2: stride 1 keeps H and W where size is odd."""
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=size // 2,
        feature_group_count=groups,
        use_bias=False,
        kernel_init=nn.initializers.he_normal(),
        name=name,
    )


def norm(train: bool) -> nn.BatchNorm:
    """BatchNorm: batch statistics in training, running ones (momentum 0.9) otherwise."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name="norm")


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, then an activation.

    Attributes:
      features: Output channels O.
      size: Kernel height and width.
      stride: Along H and W.
      groups: Feature groups; C for a depthwise convolution.
      activation: Applied last; None applies none.
    """

    features: int
    size: int = 3
    stride: int = 1
    groups: int = 1
    activation: Callable[[jax.Array], jax.Array] | None = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (B, H, W, C) to (B, H / stride, W / stride, O)."""
        x = conv(self.features, self.size, self.stride, self.groups, name="conv")(x)
        x = norm(train)(x)
        return x if self.activation is None else self.activation(x)
