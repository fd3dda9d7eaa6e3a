"""Tiny gates: plain Linen modules from images `(B, H, W, C)` to gate logits `(B, E)`.

Any function of that kind is a gate; these two see the image averaged down to about `size` pixels a
side, so that they cost little beside an expert. `gate.apply` is the `gate_fn` of `mixture`.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax

from hybrid_jax import core


class _CNNGate(nn.Module):
    num_experts: int
    features: tuple[int, ...]
    size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _shrink(x, self.size)
        for i, features in enumerate(self.features):
            x = nn.relu(nn.Conv(features, (3, 3), strides=1 if i == 0 else 2)(x))
        return nn.Dense(self.num_experts)(x.mean((1, 2)))


class _LinearGate(nn.Module):
    num_experts: int
    size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _shrink(x, self.size)
        return nn.Dense(self.num_experts)(x.reshape(x.shape[0], -1))


def gate_cnn(num_experts: int, features: Sequence[int] = (8, 16), size: int = 8) -> nn.Module:
    """A gate of 3x3 convolutions on the down-scaled image, the first at stride 1, the others at 2.

    Args:
      num_experts: E, at least 1.
      features: Output channels of each convolution.
      size: Side in pixels that the image is averaged down to (the least above it that is a whole
        division); a smaller image is left as it is.

    Raises:
      ValueError: If one of them is not an integer of at least 1.

    Example:
      >>> gate = gate_cnn(num_experts=4)
      >>> images = jax.numpy.zeros((2, 32, 32, 3))
      >>> variables = gate.init(jax.random.key(0), images)
      >>> gate.apply(variables, images).shape
      (2, 4)
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables))  # 27*8+8 + 72*16+16 + 16*4+4
      1460
    """
    core.check_integer("num_experts", num_experts, 1)
    core.check_integer("size", size, 1)
    for channels in features:
        core.check_integer("features", channels, 1)
    return _CNNGate(num_experts, tuple(features), size)


def gate_linear(num_experts: int, size: int = 8) -> nn.Module:
    """A gate of one dense layer on the pixels of the down-scaled image.

    Args:
      num_experts: E, at least 1.
      size: As for `gate_cnn`.

    Raises:
      ValueError: If one of them is not an integer of at least 1.

    Example:
      >>> gate = gate_linear(num_experts=4)
      >>> images = jax.numpy.zeros((2, 32, 32, 3))
      >>> variables = gate.init(jax.random.key(0), images)
      >>> variables['params']['Dense_0']['kernel'].shape  # 8 * 8 * 3
      (192, 4)
    """
    core.check_integer("num_experts", num_experts, 1)
    core.check_integer("size", size, 1)
    return _LinearGate(num_experts, size)


def _shrink(x, size):
    window = tuple(max(1, side // size) for side in x.shape[1:3])
    # Not nn.avg_pool, which divides by a NumPy integer: an error under strict promotion.
    return nn.pool(x, 0.0, jax.lax.add, window, window, "VALID") / math.prod(window)
