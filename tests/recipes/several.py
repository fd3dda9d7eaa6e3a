"""A small run in a process of its own, of so many devices, which may be one of several."""

import json
import sys

import jax

if __name__ == "__main__":
    workdir, effort, devices, *others = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    if others:
        jax.distributed.initialize(others[0], *map(int, others[1:]))

import numpy as np
from flax import linen as nn

from hybrid_jax import core, recipes
from tests.recipes import strangers


class Net(nn.Module):
    """BatchNorm, whose statistics are to be those of the whole batch, and dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
        x = nn.relu(nn.Conv(6, (3, 3), (2, 2))(x)).mean((1, 2))
        return nn.Dense(10)(nn.Dropout(0.1, deterministic=not train)(x))


def tiny():
    """20 steps of each stage."""
    config = recipes.default_config()
    for stage in ("parent", "experts", "gate", "joint"):
        config[stage].update(steps=20, batch_size=16)
    config.experts.update(count=2, sparsity=0.25)
    config.gate.features = (4,)
    config.controls.update(same_bytes=False, same_bops=False)
    config.evaluation.update(batch_size=32, latency_calls=2)
    return config


def digits():
    """160 images and their labels."""
    return tuple(part[:160] for part in strangers.digits())


def main(workdir, effort):
    """Says what was made as a line of JSON."""
    made = recipes.compress(Net(), digits(), workdir=workdir, config=tiny(), effort=effort)
    params = [model.params for model in made.state.experts]
    sums = [float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(core.whole(params))]
    rows = {row.name: row.accuracy for row in made.results.rows}
    print(json.dumps({"accuracy": made.accuracy, "rows": rows, "sums": sums}))


if __name__ == "__main__":
    main(workdir, effort)
