r"""Your network and your images, quantized without training; keys are given on the command line.

    python -m launch.compress --config=own --workdir=run --config.model.make=my_model.py:make \
        --config.data.name=folder --config.data.dir=photos --config.deploy.targets=onnx,tflite,c

`make` returns (module, variables), an NNX module, a Keras model, or (predict, train, params). With
`--config.effort=finetune` the network is pruned and trained as well, and with `--config.budget.…`
both keep within what you say. `python -m launch.compress --help` lists the keys.
"""

from ml_collections import ConfigDict

from hybrid_jax import recipes


def get_config() -> ConfigDict:
    """Returns the configuration: the defaults, with the effort that takes minutes."""
    config = recipes.default_config()
    config.effort = "ptq"
    return config
