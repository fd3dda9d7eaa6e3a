"""Networks: those that are given, by whom and however written, and those that are shipped.

    network = models.take(models.make('my_model.py:make'), x)   # predict, train, params
    network = network._replace(params=models.restore(network, 'weights.safetensors'))

The shipped are plain Flax Linen modules that know nothing of compression.
"""

from hybrid_jax.models.densenet import DenseNet
from hybrid_jax.models.efficientnet import EfficientNetLite
from hybrid_jax.models.given import take
from hybrid_jax.models.mobilenet import MobileNetV2
from hybrid_jax.models.network import Network, statistics, trainable
from hybrid_jax.models.reference import make
from hybrid_jax.models.registry import create, names
from hybrid_jax.models.resnet import ResNet
from hybrid_jax.models.vgg import VGG
from hybrid_jax.models.weights import load, restore
