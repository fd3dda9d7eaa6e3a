"""Convolutional networks as plain Flax Linen modules that know nothing of compression."""

from hybrid_jax.models.densenet import DenseNet
from hybrid_jax.models.mobilenet import MobileNetV2
from hybrid_jax.models.registry import create, names
from hybrid_jax.models.resnet import ResNet
from hybrid_jax.models.vgg import VGG

__all__ = ["VGG", "DenseNet", "MobileNetV2", "ResNet", "create", "names"]
