r"""The whole method on BloodMNIST: microscope images of blood cells, 28×28×3, 8 classes.

Source: J. Yang et al., MedMNIST v2, arXiv 2110.14795; images of A. Acevedo et al., Data in Brief
2020. The file is `bloodmnist.npz` as MedMNIST distributes it, with its own 11,959 train, 1,712
validation and 3,421 test images.

    python -m launch.compress --config=configs/bloodmnist.py --workdir=/tmp/bloodmnist \
        --config.data.dir=bloodmnist.npz
"""

from ml_collections import ConfigDict

from hybrid_jax import recipes


def get_config() -> ConfigDict:
    """Returns the configuration; `data.dir` is the user's to give."""
    config = recipes.default_config()
    config.model.shortcut = "project"
    config.data.name = "medmnist"
    config.data.dir = "bloodmnist.npz"
    config.data.validation = 0.0
    config.data.image_shape = (28, 28, 3)
    config.data.class_names = (
        "basophil",
        "eosinophil",
        "erythroblast",
        "immature granulocyte",
        "lymphocyte",
        "monocyte",
        "neutrophil",
        "platelet",
    )
    config.data.padding = 3
    config.data.flip = True
    config.parent.steps = 1200
    config.parent.batch_size = 128
    config.experts.steps = 800
    config.experts.batch_size = 128
    config.gate.steps = 300
    config.joint.steps = 200
    return config
