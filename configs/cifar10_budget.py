r"""64 kB of flash and 32 kB of memory for a trained ResNet-20 on CIFAR-10, as C.

    python -m launch.compress --config=cifar10_budget --workdir=/tmp/budget \
        --config.data.dir=~/tensorflow_datasets --config.model.weights=resnet20_cifar10.safetensors

Widths and bits are found together; then the network is trained by distillation.
"""

from ml_collections import ConfigDict

from hybrid_jax import recipes


def get_config() -> ConfigDict:
    """Returns the configuration; the parent has not seen the validation images."""
    config = recipes.default_config()
    config.effort = "finetune"
    config.model.name = "resnet20"
    config.data.name = "cifar10"
    config.data.dir = "~/tensorflow_datasets"
    config.data.validation = "test:1000"
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.data.padding = 4
    config.data.flip = True
    config.budget.bytes = 64_000
    config.budget.memory = 32_000
    config.experts.steps = 1600
    config.experts.batch_size = 128
    config.experts.learning_rate = 0.002
    config.deploy.targets = ("c", "onnx")
    return config
