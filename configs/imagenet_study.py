r"""EfficientNet-Lite0 on ImageNet without training: int8, four bits, and a budget of bytes.

A folder of validation images, each named after the number of its class as in 388_panda.jpg: a
seed takes 400 to judge, one for validation, and the others calibrate. The weights are those of
TensorFlow's EfficientNet-Lite (Apache-2.0).

    python -m launch.study --config=imagenet_study --workdir=/tmp/imagenet \
        --config.data.dir=imagenet1k --test

in a directory that has the weights in weights/.
"""

from ml_collections import ConfigDict

from hybrid_jax import recipes

SEEDS = (0, 1, 2)
SEEDED = ("seed", "data.seed")

STUDY = {
    "int8": {},
    "W4A8 with depthwise in 8": {"ptq.weight_bits": 4, "ptq.depthwise_bits": 8},
    "W4A8": {"ptq.weight_bits": 4},
    "3 MB": {"budget.bytes": 3_000_000},
}


def get_config() -> ConfigDict:
    """Returns what all runs share."""
    config = recipes.default_config()
    config.effort = "ptq"
    config.model.name = "efficientnet_lite0"
    config.model.weights = "weights/efficientnet_lite0_imagenet.safetensors"
    config.data.name = "folder"
    config.data.dir = "imagenet1k"
    config.data.pattern = r"^(\d+)_"
    config.data.class_names = tuple(f"{i:03}" for i in range(1000))
    config.data.test = 400
    config.data.validation = 1
    config.data.mean = (127 / 255,) * 3
    config.data.std = (128 / 255,) * 3
    config.ptq.images = 96
    config.deploy.targets = ("onnx", "packed")
    config.evaluation.latency_calls = 10
    return config
