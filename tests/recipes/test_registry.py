"""Every network of the registry goes through the main job, whatever its shortcuts and widths."""

import jax
import numpy as np
import pytest
from conftest import SIZES

from hybrid_jax import models, recipes

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", models.names())
def test_every_network_passes(name, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 32, 32, 3), np.uint8)
    model = models.create(name, 4, **SIZES[name])
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    config = recipes.default_config()
    config.effort = "mixture"
    config.experts.count = 2
    config.experts.diversity = "criterion"
    config.experts.criteria = ("magnitude", "random")
    config.experts.multiple = 4
    for stage in ("experts", "gate", "joint"):
        config[stage].steps = 2
        config[stage].batch_size = 8
    config.controls.same_bytes = config.controls.same_bops = False
    config.evaluation.latency_calls = 1
    config.gate.size = 8
    result = recipes.compress(
        (model, variables), (images, np.arange(64) % 4), workdir=tmp_path, config=config
    )
    mixture = next(row for row in result.results.rows if row.role == "mixture")
    # Its experts keep different channels: their programs may differ.
    assert not mixture.files["onnx"].error
    assert mixture.files["onnx"].agreement == 1.0
    assert mixture.macs < result.results.rows[0].macs
