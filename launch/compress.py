"""Runs the whole method: from a dense CNN to a deployed mixture of compressed experts.

    python -m launch.compress --config=configs/digits.py --workdir=/tmp/digits
    python -m launch.compress --config=configs/digits.py --workdir=/tmp/k3 --config.experts.count=3

The work directory gets the checkpoints, the report with its plots and the deployed model. The same
command resumes a run that was stopped; on a finished run it only writes the report again. From a
notebook call `main(config, workdir)`.

What is compiled is kept for later runs in ~/.cache/hybrid_jax, which may be deleted at any time;
`--compilation_cache=/scratch/mine` keeps it elsewhere, and `--compilation_cache=` not at all.
"""

import pathlib
import shlex
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

import configs
from hybrid_jax import recipes
from launch import command, compilation


def main(config: ConfigDict, workdir: str, command: str = "") -> dict:
    """Runs `config` in `workdir` and returns the results, as `results.json` holds them.

    Args:
      config: A configuration as `configs/digits.py` returns it.
      workdir: A directory that is empty, absent, or holds a run of the same config.
      command: The command line, for the report.

    Raises:
      ValueError: If the configuration, the data or the work directory does not fit.
      FileNotFoundError: If the data is not where the configuration says.
      FloatingPointError: If a loss is not finite.
    """
    return recipes.run(recipes.prepare(config, workdir, command))


def parse(argv: list[str]) -> tuple[ConfigDict, str, str | None]:
    """Returns the configuration, the work directory and the cache that a command line names.

    Args:
      argv: The command line; its first entry is the program's name.

    Raises:
      ValueError: Names the flag, what it got, what was expected and the nearest valid key.
    """
    argv = [_with_file(flag) for flag in argv]
    overrides = [flag[2:].split("=")[0] for flag in argv[1:] if flag.startswith("--config.")]
    valid = {f"config.{key}" for key in recipes.flatten(recipes.default_config())}
    for key in overrides:
        if key not in valid:
            hint = recipes.nearest_key(key.removeprefix("config."))
            raise ValueError(f"--{key} is no key of the configuration{hint}")

    def define(values):
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        flags.DEFINE_string("workdir", None, "Directory of the run.", flag_values=values)
        compilation.define_flag(values)

    try:
        values = command.parse(argv, define)
    except ValueError as error:
        raise ValueError(_illegal_value(str(error))) from error
    command.required(values, "config", "workdir")
    return values.config, values.workdir, values.compilation_cache


def cli(argv: list[str]) -> int:
    """Runs the command line."""
    keys = recipes.flatten(recipes.default_config())
    listed = "\n".join(f"  --config.{key}={value}" for key, value in keys.items())
    doc = f"{__doc__}\nKeys of the configuration, with their defaults:\n{listed}"
    return command.run(argv, doc, _compress)


def _compress(argv):
    config, workdir, cache = parse(argv)
    compilation.set_up(cache)
    line = shlex.join(["python", "-m", "launch.compress", *argv[1:]])
    job = recipes.prepare(config, workdir, line)

    def run():
        recipes.run(job)
        print(f"report: {pathlib.Path(workdir) / 'report.md'}")

    return run


def _with_file(flag):
    """`--config=digits` with the file of that name among ours."""
    if not flag.startswith("--config="):
        return flag
    given = pathlib.Path(flag.removeprefix("--config="))
    ours = pathlib.Path(configs.__file__).parent
    file = given if given.is_file() else ours / f"{given}.py"
    if not file.is_file():
        names = ", ".join(sorted(path.stem for path in ours.glob("[a-z]*.py")))
        raise ValueError(f"--config must be a file, or one of {names}, got {str(given)!r}")
    return f"--config={file}"


def _illegal_value(message: str) -> str:
    """Says `flag --config.a=x: invalid literal for int()…` in our words, if it is about a key."""
    flag, _, value = message.removeprefix("flag --").partition(":")[0].partition("=")
    default = recipes.flatten(recipes.default_config()).get(flag.removeprefix("config."))
    if default is None:
        return message
    kind = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return f"--{flag} must be {kind.get(type(default), 'a tuple')}, got {value!r}"


if __name__ == "__main__":
    sys.exit(cli(sys.argv))
