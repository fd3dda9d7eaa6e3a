"""EfficientNet-Lite: Tan, Le, EfficientNet: Rethinking Model Scaling ... (arXiv 1905.11946).

The Lite form is that of TensorFlow's authors for integers: no squeeze-and-excite, ReLU6.
"""

import functools

import flax.linen as nn
import jax

from hybrid_jax.models.layers import ConvNorm
from hybrid_jax.models.mobilenet import InvertedResidual

_layer = functools.partial(ConvNorm, padding="SAME", epsilon=1e-3)


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite, padded as TensorFlow pads.

    `stages` are (expansion, channels, number of blocks, stride of the first, kernel size), `widths`
    the channels of the stem and of the last convolution, the same in all of the family.
    """

    num_classes: int
    stages: tuple[tuple[int, int, int, int, int], ...]
    widths: tuple[int, int] = (32, 1280)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (B, H, W, C) to logits (B, N)."""
        x = _layer(self.widths[0], 3, 2, activation=nn.relu6, name="stem")(x, train)
        for stage, (expansion, features, count, stride, size) in enumerate(self.stages):
            for i in range(count):
                x = InvertedResidual(
                    features,
                    expansion,
                    stride if i == 0 else 1,
                    size,
                    _layer,
                    name=f"stage{stage}_block{i}",
                )(x, train)
        x = _layer(self.widths[1], 1, activation=nn.relu6, name="last")(x, train)
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))
