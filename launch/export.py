"""Writes what a finished run has made for the runtimes of devices, and checks every file.

    python -m launch.export --workdir=/tmp/digits --target=stablehlo,onnx,tflite,packed,c

The dense parent in floats and in integers, the best single expert and the top-1 mixture are written
to the directory deploy/ of the run, each beside its manifest. Every file is run in its target's
runtime on the test images and timed against the dense parent's in the same runtime; the report of
the run is written again with the results. What a target lacks to run is said, and the others go on.
`--compilation_cache` is as for `launch.compress`.
"""

import sys

from absl import flags

from hybrid_jax import core, deploy, recipes, report
from launch import command, compilation


def main(workdir: str, targets: list[str], pairs: int = 30) -> recipes.Result:
    """Exports and checks.

    Args:
      workdir: Directory of a finished run.
      targets: Of `deploy.TARGETS`.
      pairs: How many pairs of calls each latency is taken over.

    Raises:
      FileNotFoundError: If there is no finished run in `workdir`.
      ValueError: If a target is unknown; names the nearest.
    """
    if not targets:
        raise ValueError(f"--target must be of {', '.join(deploy.TARGETS)}, got nothing")
    for target in targets:
        core.check_choice("--target", target, deploy.TARGETS)
    return recipes.export(workdir, targets, pairs)


def cli(argv: list[str]) -> int:
    """Runs the command line."""
    return command.run(argv, __doc__, _export)


def _define(values):
    flags.DEFINE_string("workdir", "", "Directory of a finished run.", flag_values=values)
    flags.DEFINE_list("target", [], "Targets, separated by commas.", flag_values=values)
    flags.DEFINE_integer("pairs", 30, "Pairs of calls for a latency.", flag_values=values)
    command.define_cache(values)


def _export(argv):
    values = command.parse(argv, _define)
    command.required(values, "workdir")
    core.check_integer("--pairs", values.pairs, 1)
    compilation.set_up(values.compilation_cache)
    made = main(values.workdir, values.target, values.pairs)
    report.show(made.results)
    print(f"report: {made.report}")


if __name__ == "__main__":
    sys.exit(cli(sys.argv))
