"""Random changes of a configuration: either it can be run, or one line names what is wrong."""

import importlib
import pathlib
import random

import pytest

import configs
from hybrid_jax import recipes
from hybrid_jax.recipes import schema

OURS = sorted(path.stem for path in pathlib.Path(configs.__file__).parent.glob("[a-z]*.py"))
STRANGE = (
    *(None, True, -1, 0, 1, 2, 3, 7, 8, 64, 2**31, 2**63, 10**30, 0.0, 1e-9, 0.25, 0.5, 1.0, 1.5),
    *(1e300, float("nan"), float("inf"), "", "x", "nowhere/x.py:f", "a+b", "\n", "é" * 300, b"x"),
    *((), (1,), (0.5, 0.5), (4, 8, 8), ("onnx",), ("c", "c"), [3], {"a": 1}, ((((1,),),),), 1j),
)


def mutated(name, seed):
    """(configuration, {key: value}) of one of ours with one to three keys changed."""
    rng = random.Random(f"{name} {seed}")
    config = importlib.import_module(f"configs.{name}").get_config()
    changes = {key: value(rng, key) for key in rng.sample(sorted(schema.KEYS), rng.randint(1, 3))}
    recipes.override(config, changes)
    return config, changes


def value(rng, key):
    """As often what is near to the default, or a name of the right registry, as what is strange."""
    known = schema.KEYS[key]
    near = [known.default]
    if isinstance(known.default, bool):
        near = [True, False]
    elif isinstance(known.default, int | float):
        near = [known.default * factor for factor in (0, 1, 2)] + [known.default + 1, 0.5, 1]
    elif hasattr(known.bound, "names"):
        near = list(known.bound.names)
    return rng.choice(near if rng.random() < 0.5 else STRANGE)


def attempt(changes, act, *arguments):
    """What `act` returns, or None where it refuses in a line that names a key that was changed."""
    try:
        return act(*arguments)
    except (ValueError, OSError) as error:
        line = str(error)
    assert "\n" not in line.strip(), (changes, line)
    names = {part for key in changes for part in (f"config.{key}", key.split(".")[-1])}
    assert any(name in line for name in names), (changes, line)
    return None


@pytest.mark.parametrize("name", OURS)
def test_what_is_read(name):
    """A tenth of it is accepted at least, and a tenth refused."""
    each = (mutated(name, seed) for seed in range(300))
    read = [attempt(changes, recipes.read, config) for config, changes in each]
    assert 30 < sum(own is not None for own in read) < 270


def accepted():
    """Those of 300 mutations of the digits' configuration that can be read."""
    for seed in range(300):
        config, changes = mutated("digits", seed)
        if attempt(changes, recipes.read, config) is not None:
            yield config, changes


@pytest.mark.slow
def test_what_is_checked_before_anything_is_run(tmp_path):
    for config, changes in accepted():
        attempt(changes, recipes.of_config, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_some_really_run(tmp_path):
    """Two steps of each stage, on few images and channels, but for what was changed."""
    done = 0
    for i, (config, changes) in enumerate(accepted()):
        small = {
            key: 2 for key, n in recipes.flatten(config).items() if key.endswith(".steps") and n
        }
        small |= {"data.train_size": 64, "model.widths": (4, 8, 8)}
        recipes.override(config, {key: own for key, own in small.items() if key not in changes})
        run = attempt(changes, recipes.of_config, config, tmp_path / str(i))
        done += run is not None and attempt(changes, run) is not None
        if done == 5:
            return
    raise AssertionError(f"5 must run, got {done}")
