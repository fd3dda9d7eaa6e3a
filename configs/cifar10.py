r"""The whole method on CIFAR-10, sized for two CPU cores.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; as TFDS has it.
Reduced against the papers this compares with: a ResNet-8 instead of a ResNet-20 or 56, and 2 epochs
of the parent instead of hundreds. The controls train as long as an expert: experts.steps and
joint.steps, at one batch size.

    python -m launch.compress --config=configs/cifar10.py --workdir=/tmp/cifar10 \
        --config.data.dir=~/tensorflow_datasets

Result: not measured yet at these settings. Before (parent of 2,000 steps, experts of 600, joint
training of 120, the gate trained by the loss of mixed logits), seed 0, on the 5,000 JPEG test
images of a prepared copy: dense parent 73.38 %, top-1 mixture 64.88 %, best single expert 66.96 %,
one network of equal bytes 71.72 %, of equal BOPs 66.68 %.

Hardware and time: to be measured; the steps are chosen for 15 minutes on two idle x86 cores.
"""

from ml_collections import ConfigDict

from hybrid_jax import recipes


def get_config() -> ConfigDict:
    """Returns the configuration; `data.dir` is the directory that TFDS prepared the data in."""
    config = recipes.default_config()
    config.data.name = "cifar10"
    config.data.dir = "~/tensorflow_datasets"
    config.data.validation = 0.05
    config.data.image_shape = (32, 32, 3)
    config.data.padding = 4
    config.data.flip = True
    config.parent.steps = 700
    config.parent.batch_size = 128
    config.parent.learning_rate = 0.02
    config.experts.steps = 150
    config.experts.batch_size = 128
    config.gate.features = (8, 16, 32)
    config.gate.size = 16
    config.gate.steps = 100
    config.joint.steps = 150
    config.joint.batch_size = 128
    config.joint.learning_rate = 0.002
    return config
