"""Networks: those that are given, by whom and however written, and those that are shipped.

    network = models.take(models.make('my_model.py:make'), x)   # predict, train, params
    network = network._replace(params=models.restore(network, 'weights.safetensors'))

The shipped are plain Flax Linen modules that know nothing of compression.
"""

from hybrid_jax.models.densenet import DenseNet as DenseNet
from hybrid_jax.models.efficientnet import EfficientNetLite as EfficientNetLite
from hybrid_jax.models.given import take as take
from hybrid_jax.models.mobilenet import MobileNetV2 as MobileNetV2
from hybrid_jax.models.network import Network as Network
from hybrid_jax.models.network import statistics as statistics
from hybrid_jax.models.network import trainable as trainable
from hybrid_jax.models.reference import make as make
from hybrid_jax.models.registry import create as create
from hybrid_jax.models.registry import names as names
from hybrid_jax.models.resnet import ResNet as ResNet
from hybrid_jax.models.vgg import VGG as VGG
from hybrid_jax.models.weights import load as load
from hybrid_jax.models.weights import restore as restore
