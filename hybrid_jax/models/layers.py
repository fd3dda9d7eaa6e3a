"""What every family is built of."""

from collections.abc import Callable

import flax.linen as nn
import jax


def conv(
    features: int,
    size: int,
    stride: int = 1,
    groups: int = 1,
    padding: str | None = None,
    name: str | None = None,
) -> nn.Conv:
    """Convolution without bias, padded by size // 2 or as `padding` says.

    Both keep H and W where stride is 1 and size odd. With stride 2 'SAME', as TensorFlow has it,
    pads an even side by one less before than behind.
    """
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=size // 2 if padding is None else padding,
        feature_group_count=groups,
        use_bias=False,
        kernel_init=nn.initializers.he_normal(),
        name=name,
    )


def norm(train: bool, epsilon: float = 1e-5) -> nn.BatchNorm:
    """BatchNorm: batch statistics in training, running ones (momentum 0.9) otherwise."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=epsilon, name="norm")


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, then an activation; `groups` is C for a depthwise convolution."""

    features: int
    size: int = 3
    stride: int = 1
    groups: int = 1
    activation: Callable[[jax.Array], jax.Array] | None = nn.relu
    padding: str | None = None
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (B, H, W, C) to (B, H / stride, W / stride, O)."""
        x = conv(self.features, self.size, self.stride, self.groups, self.padding, name="conv")(x)
        x = norm(train, self.epsilon)(x)
        return x if self.activation is None else self.activation(x)
