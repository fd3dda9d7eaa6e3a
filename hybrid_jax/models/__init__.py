"""Convolutional networks as plain Flax Linen modules that know nothing of compression."""

from hybrid_jax.models.densenet import DenseNet as DenseNet
from hybrid_jax.models.efficientnet import EfficientNetLite as EfficientNetLite
from hybrid_jax.models.mobilenet import MobileNetV2 as MobileNetV2
from hybrid_jax.models.registry import create as create
from hybrid_jax.models.registry import names as names
from hybrid_jax.models.resnet import ResNet as ResNet
from hybrid_jax.models.vgg import VGG as VGG
from hybrid_jax.models.weights import load as load
