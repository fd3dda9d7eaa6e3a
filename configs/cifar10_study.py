r"""The promise on CIFAR-10: trained public networks, compressed, beside what they were.

Weights, data and licences as `configs/cifar10_budget.py` takes them: ResNets of
akamaster/pytorch_resnet_cifar10, adapted to JPEG copies of the images. The parents have seen all
training images, so validation images are 1,000 of the test images; the other 4,000 are read once.

    python -m launch.study --config=cifar10_study --workdir=/tmp/study \
        --config.data.dir=~/tensorflow_datasets --only="ResNet-20 W4A8"

in a directory that has the weights in weights/.

Sized for two cores: 6 to 12 epochs where papers take hundreds. The records say what was reached.
"""

from ml_collections import ConfigDict

from hybrid_jax import recipes

SEEDS = (0, 1, 2)
EPOCH = 50_000 // 128

RESNET20 = {
    "model.name": "resnet20",
    "model.weights": "weights/resnet20_cifar10_jpeg.safetensors",
}
RESNET56 = {
    "model.name": "resnet56",
    "model.weights": "weights/resnet56_cifar10_jpeg.safetensors",
}

STUDY = {
    "ResNet-20 W4A8 without training": {**RESNET20, "effort": "ptq", "ptq.weight_bits": 4},
    "ResNet-56 W4A8 without training": {**RESNET56, "effort": "ptq", "ptq.weight_bits": 4},
    "ResNet-20 W4A8": {**RESNET20, "experts.sparsity": 0.0, "experts.steps": 4 * EPOCH},
    "ResNet-20 W4A4": {
        **RESNET20,
        "experts.sparsity": 0.0,
        "experts.activation_bits": 4,
        "experts.steps": 6 * EPOCH,
    },
    "ResNet-20 W4A8 at half the MACs": {
        **RESNET20,
        "budget.macs": 0.5,
        "experts.steps": 12 * EPOCH,
    },
    "ResNet-56 W4A8 at half the MACs": {
        **RESNET56,
        "budget.macs": 0.5,
        "experts.steps": 12 * EPOCH,
    },
}


def get_config() -> ConfigDict:
    """Returns what all runs share."""
    config = recipes.default_config()
    config.effort = "finetune"
    config.data.name = "cifar10"
    config.data.dir = "~/tensorflow_datasets"
    config.data.validation = "test:1000"
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.data.padding = 4
    config.data.flip = True
    config.experts.batch_size = 128
    config.experts.learning_rate = 0.002
    config.distillation.alpha = 0.9
    return config
