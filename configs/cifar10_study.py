r"""The promise on CIFAR-10: trained public networks, compressed, beside what they were.

Weights, data and licences as `configs/cifar10_budget.py` takes them: ResNets of
akamaster/pytorch_resnet_cifar10, adapted to JPEG copies of the images. The parents have seen all
training images, so validation images are 1,000 of the test images; the other 4,000 are read once.

    python -m launch.study --config=cifar10_study --workdir=/tmp/study \
        --config.data.dir=~/tfds --only="half ResNet-56,half ResNet-20,cascade at a quarter"

in a directory that has the weights in weights/.

Sized for two cores: 4 to 12 epochs where papers take hundreds, and four views of each image, to
which the teacher answers once for all runs where `--config.teacher.answers` names a directory. The
records say what was reached.
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

HALF = {"budget.macs": 0.5}
W8 = {"experts.weight_bits": 8}
TAUGHT = {"teacher.name": "resnet56", "teacher.weights": RESNET56["model.weights"]}
LONG = 5 * EPOCH
ALONE = {"controls.same_bytes": False, "controls.same_bops": False}
CASCADE = {
    **RESNET56,
    **ALONE,
    "effort": "mixture",
    "mixture.kind": "cascade",
    "mixture.members": ("half ResNet-56", "half ResNet-20"),
}
SMALL = {
    **TAUGHT,
    "budget.macs": 0.5,
    "experts.recovery": "obs",
    "experts.floats": 0.6,
    "experts.deployed": 0.1,
}
BOTH_SMALL = {"mixture.members": ("small ResNet-20", "small ResNet-56")}
UNTRAINED = {"mixture.members": ("ResNet-20 W4A8 PTQ", "ResNet-56 W4A8 PTQ")}
W4_PARTLY = {"mixture.members": ("half ResNet-20 W4A8", "ResNet-56 W4A8 PTQ")}
PARTLY = {"mixture.members": ("half ResNet-20", "ResNet-56 W4A8 PTQ")}

STUDY = {
    "ResNet-20 W4A8 PTQ": {**RESNET20, "effort": "ptq", "ptq.weight_bits": 4},
    "ResNet-56 W4A8 PTQ": {**RESNET56, "effort": "ptq", "ptq.weight_bits": 4},
    "cascade of PTQ at 0.5": {**CASCADE, **UNTRAINED, "budget.macs": 0.5},
    "cascade of PTQ at 0.4": {**CASCADE, **UNTRAINED, "budget.macs": 0.4},
    "cascade of half and whole at a third": {**CASCADE, **PARTLY, "budget.macs": 1 / 3},
    "cascade of half and whole at a quarter": {**CASCADE, **PARTLY, "budget.macs": 0.25},
    # Goal A: what a cascade is made of, the cascade at three budgets, and what it has to beat.
    # A budget of bytes has widths and bits chosen together: 4 nearly everywhere. A mean
    # cost over 1,000 images has a standard error of 2 %, so that 0.245 is asked for a quarter.
    "small ResNet-20": {**RESNET20, **SMALL, "budget.bytes": 0.07, "experts.steps": 10 * EPOCH},
    "small ResNet-56": {**RESNET56, **SMALL, "budget.bytes": 0.06, "experts.steps": 1800},
    "small cascade at a third": {**CASCADE, **BOTH_SMALL, "budget.macs": 1 / 3},
    "small cascade at a quarter": {**CASCADE, **BOTH_SMALL, "budget.macs": 0.245},
    "small cascade at a fifth": {**CASCADE, **BOTH_SMALL, "budget.macs": 0.2},
    "half ResNet-20 W4A8": {**RESNET20, **HALF, **TAUGHT, "experts.steps": 12 * EPOCH},
    "W4A8 cascade of half and whole at a third": {**CASCADE, **W4_PARTLY, "budget.macs": 1 / 3},
    "W4A8 cascade of half and whole at a quarter": {**CASCADE, **W4_PARTLY, "budget.macs": 0.25},
    # The same of experts in 8 bits.
    "half ResNet-56": {**RESNET56, **HALF, **W8, "experts.steps": LONG},
    "half ResNet-20": {**RESNET20, **HALF, **W8, **TAUGHT, "experts.steps": 8 * EPOCH},
    "cascade at a third": {**CASCADE, "budget.macs": 1 / 3},
    "cascade at a quarter": {**CASCADE, "budget.macs": 0.25},
    "cascade at a fifth": {**CASCADE, "budget.macs": 0.2},
    "one of equal MACs": {**RESNET56, "budget.macs": 0.25, "experts.steps": LONG},
    "one of equal bytes": {**RESNET56, "budget.bytes": 1 / 12, "experts.steps": LONG},
    # Goal B: one network.
    "ResNet-20 W4A8": {**RESNET20, "experts.sparsity": 0.0, "experts.steps": 4 * EPOCH},
    "ResNet-20 W4A4": {
        **RESNET20,
        "experts.sparsity": 0.0,
        "experts.activation_bits": 4,
        "experts.steps": 6 * EPOCH,
    },
    "ResNet-56 W4A8": {**RESNET56, "experts.sparsity": 0.0, "experts.steps": 4 * EPOCH},
    "ResNet-56 at 0.4": {**RESNET56, "budget.macs": 0.4, "experts.steps": LONG},
}


def get_config() -> ConfigDict:
    """Returns what all runs share: weights in 4 bits where no budget of bytes chooses them."""
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
    config.teacher.views = 4
    config.checkpoint_every = 200
    return config
