"""A small run on so many devices, in a process of its own, which may be one of several.

`run` starts it; what it made is its last line.
"""

import concurrent.futures
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile

import jax

if __name__ == "__main__":
    what, workdir, devices, *others = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_disable_most_optimizations", True)
    cache = pathlib.Path(tempfile.gettempdir()) / "hybrid_jax_test_cache"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    if others:
        jax.distributed.initialize(others[0], *map(int, others[1:]))

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from hybrid_jax import data, recipes, training
from hybrid_jax.recipes import pipeline, prune, train
from hybrid_jax.recipes.config import expert_specs
from tests.recipes import strangers


class Net(nn.Module):
    """BatchNorm, whose statistics are to be those of the whole batch, and dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
        x = nn.relu(nn.Conv(6, (3, 3), (2, 2))(x)).mean((1, 2))
        return nn.Dense(10)(nn.Dropout(0.1, deterministic=not train)(x))


def tiny(effort):
    """20 steps of each stage."""
    config = recipes.default_config()
    config.effort = effort
    for stage in ("parent", "experts", "gate", "joint"):
        config[stage].update(steps=20, batch_size=16)
    config.experts.update(count=2, sparsity=0.25, method="map")
    config.gate.features = (4,)
    config.controls.update(same_bytes=False, same_bops=False)
    config.evaluation.update(batch_size=32, latency_calls=2)
    # The gradient of a range jumps where a value rounds to its other side, which the last bit of a
    # sum decides.
    config.experts.update(weight_learning="fixed", activation_learning="fixed")
    return config


def digits():
    """160 images and their labels."""
    return tuple(part[:160] for part in strangers.digits())


def task(workdir):
    """A task of a trained network, and the settings of its run."""
    net, settings = Net(), recipes.read(tiny("mixture"))
    given = net, net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    splits, effort = data.take(digits()), recipes.EFFORTS["mixture"]
    return pipeline.prepare(given, splits, settings, workdir, effort).task, settings


def cut(task, settings):
    """Two networks of one shape, cut by two criteria."""
    return prune.prune(task, task.parent, expert_specs(settings), jax.random.key(0))


def stages(task, settings, plain=False):
    """The leaves of networks after a plain stage, and after one of a stack quantized at sites."""
    dense = train.parent(task, task.parent, settings.parent)
    if plain:
        return [dense.cut.variables]
    weights = np.random.default_rng(0).uniform(size=(2, 160)).astype(np.float32)
    made = train.compress(
        task, task.parent, cut(task, settings), "experts", settings.experts, 0.5, weights=weights
    )
    return [dense.cut.variables, *(model.params for model in made)]


def main(what, workdir):
    """Trains the plain stage, or both, or does a whole run of an effort."""
    if what in ("plain", "stages"):
        made, told = stages(*task(workdir), plain=what == "plain"), {}
    else:
        result = recipes.compress(Net(), digits(), workdir=workdir, config=tiny(what))
        made = [model.params for model in result.state.experts]
        told = {row.name: row.accuracy for row in result.results.rows}
    leaves = [np.ravel(leaf).tolist() for leaf in jax.tree.leaves(made)]
    return {"rows": told, "leaves": leaves}


def stopping(fit):
    """`fit`, which in the last process gets a SIGTERM in the midst of the second stage."""

    def stopped(step, state, batches, **options):
        def own(first):
            for i, batch in enumerate(batches(first), first):
                if (options["name"], i) == ("experts", 7) and jax.process_index():
                    signal.raise_signal(signal.SIGTERM)
                yield batch

        return fit(step, state, own, **options)

    return stopped


def together(arguments, processes, **environment):
    """So many processes of Python when they have ended, of arguments(address, number)."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    root = str(pathlib.Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, **environment}

    def one(number):
        command = [sys.executable, *arguments(address, number)]
        return subprocess.run(command, capture_output=True, env=environment, timeout=900, text=True)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(one, range(processes)))


def ended(what, workdir, devices, processes=1, **environment):
    """So many processes, each of so many devices, when they have ended."""

    def arguments(address, number):
        others = [address, str(processes), str(number)] if processes > 1 else []
        return [__file__, what, str(workdir), str(devices), *others]

    return together(arguments, processes, **environment)


def run(*arguments):
    """What each of them made; arguments as of `ended`."""
    found = ended(*arguments)
    for own in found:
        assert own.returncode == 0, own.stderr[-3000:]
    return [json.loads(own.stdout.splitlines()[-1]) for own in found]


if __name__ == "__main__":
    if "STOPPED" in os.environ:
        training.fit = stopping(training.fit)
    print(json.dumps(main(what, workdir)))
