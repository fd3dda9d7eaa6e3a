r"""Compresses a trained network, writes it for devices, and runs every file on the test images.

    python -m launch.compress --config=own --workdir=run --config.model.make=my_model.py:make \
        --config.data.name=folder --config.data.dir=photos --config.deploy.targets=onnx,tflite
    python -m launch.compress --config=digits --workdir=/tmp/digits

`--config` is a file, or one of ours by its name: `own` is for your network and images, of effort
ptq; `digits` is the whole method, from a dense network to a mixture, on images that are here.
`make` is a function without arguments that returns (module, variables), an NNX module, a Keras
model, or (predict, train, params); the network gets (pixel / 255 - data.mean) / data.std.

The work directory gets the report with its plots, the files in deploy/, and the checkpoints. The
same command resumes a run that was stopped; on a finished run it writes files and report again.
From a notebook call `main(config, workdir)` or `hybrid_jax.compress`. `--dry_run` prints what
would be done: sites, groups of channels, what is frozen and why, and costs beside the budget.

What is compiled is kept for later runs in ~/.cache/hybrid_jax, which may be deleted at any time;
`--compilation_cache=/scratch/mine` keeps it elsewhere, and `--compilation_cache=` not at all.

All devices of the machine are used. Of several machines, each runs the same command with
`--distributed=auto` on a TPU pod, under SLURM or Kubernetes, and elsewhere with
`--distributed=HOST:PORT,PROCESSES,NUMBER`; the work directory is one that all of them see, on this
machine, mounted, or a bucket, `gs://BUCKET/run`, with `pip install gcsfs`.
"""

import pathlib
import runpy
import shlex
import sys

from absl import flags
from ml_collections import ConfigDict

import configs
from hybrid_jax import recipes
from launch import command


def main(config: ConfigDict, workdir: str, command: str = "") -> "recipes.Result":
    """Runs `config` in `workdir`, as `recipes.run` does."""
    return recipes.run(config, workdir, command)


def parse(argv: list[str]) -> tuple[ConfigDict, str, str | None, bool, str | None]:
    """Returns what a command line says: configuration, work directory, cache, dry, distributed.

    A key that there is not is found without importing JAX.

    Args:
      argv: The command line; its first entry is the program's name.

    Raises:
      ValueError: Names the flag or key, what it got, what was expected and the nearest valid key.
    """
    overrides = [flag for flag in argv[1:] if flag.startswith("--config.")]
    changes = recipes.flag_values(overrides)
    values = command.parse([flag for flag in argv if flag not in overrides], _define)
    command.required(values, "config", *(() if values.dry_run else ("workdir",)))
    config = _load(values.config)
    recipes.override(config, changes)
    recipes.check_read(recipes.read(config).effort, changes)
    return config, values.workdir, values.compilation_cache, values.dry_run, values.distributed


def cli(argv: list[str]) -> int:
    """Runs the command line."""

    def doc():
        for flag in argv:
            if flag.startswith("--config="):
                _load(flag.partition("=")[2])  # which may add names of one's own
        return f"{__doc__}\nKeys of the configuration:\n\n{recipes.help_text()}"

    return command.run(argv, doc, _compress)


def _compress(argv):
    config, workdir, cache, dry, distributed = parse(argv)
    from launch import compilation  # not before: it imports JAX

    compilation.set_up(cache)
    command.connect(distributed)
    line = shlex.join(["python", "-m", "launch.compress", *argv[1:]])
    run = recipes.of_config(config, workdir or "", line)
    if dry:
        print(run.describe())
        return None
    lock = run.claim()

    def act():
        from hybrid_jax import core, report

        try:
            with lock:
                made = run.finish()
        except recipes.CannotBeMet as error:  # what was measured does not keep what was counted
            raise command.Told(error) from error
        if core.is_first():
            report.show(made.results)
            print(f"report: {made.report}")

    return act


def _define(values):
    flags.DEFINE_string("config", None, "A config module, or one of ours.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Directory of the run.", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "Print what would be done.", flag_values=values)
    command.define_cache(values)
    command.define_distributed(values)


def _load(name: str) -> ConfigDict:
    """The configuration of a file, or of that name among ours."""
    ours = pathlib.Path(configs.__file__).parent
    file = pathlib.Path(name) if pathlib.Path(name).is_file() else ours / f"{name}.py"
    if not file.is_file():
        names = ", ".join(sorted(path.stem for path in ours.glob("[a-z]*.py")))
        raise ValueError(f"--config must be a file, or one of {names}, got {name!r}")
    try:
        config = runpy.run_path(str(file))["get_config"]()
        if not isinstance(config, ConfigDict):
            raise TypeError(f"it returns {type(config).__name__}")
    except Exception as error:
        raise ValueError(
            "--config must be a file whose get_config() returns the configuration, "
            f"got {file}: {type(error).__name__}: {error}"
        ) from error
    return config


if __name__ == "__main__":
    sys.exit(cli(sys.argv))
