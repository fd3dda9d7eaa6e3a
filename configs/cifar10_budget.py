r"""64 kB of flash and 32 kB of memory for a trained ResNet-20 on CIFAR-10, as C.

    python -m launch.compress --config=cifar10_budget --workdir=/tmp/budget \
        --config.data.dir=~/tensorflow_datasets --config.model.weights=resnet20_cifar10.safetensors

Widths and bits are found together; then the network is trained by distillation.
"""

from ml_collections import ConfigDict

from configs import cifar10_study


def get_config() -> ConfigDict:
    """Returns the configuration: data and training of the study's runs, within a budget."""
    config = cifar10_study.get_config()
    config.model.name = "resnet20"
    config.budget.bytes = 64_000
    config.budget.memory = 32_000
    config.distillation.alpha = 0.5
    config.experts.steps = 1600
    config.deploy.targets = ("c", "onnx")
    return config
