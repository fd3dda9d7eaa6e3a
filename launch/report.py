"""Writes the report of a finished run again, or the report over several seeds.

    python -m launch.report --workdirs=runs/0,runs/1,runs/2 --output=runs/report

Each work directory must hold a results.json; their configs may differ in nothing but the seed. One
directory gives the report of that run, several give mean ± standard deviation. What to ship, and
the table of what could be shipped, are printed too.
"""

import sys

from absl import flags

from hybrid_jax import report
from launch import command


def main(workdirs: list[str], output: str) -> str:
    """Reports the runs in `workdirs` into the directory `output`.

    Args:
      workdirs: Work directories, each with a results.json.
      output: Directory to write to; made where it does not exist.

    Returns:
      The path of report.html.

    Raises:
      FileNotFoundError: If a directory has no results.json.
      ValueError: If a results.json is broken, or configs differ in more than the seed.
    """
    runs = [report.read(workdir) for workdir in workdirs]
    if len(runs) > 1:
        report.show(report.average(runs))
        return str(report.write_average(runs, output))
    report.show(runs[0])
    return str(report.write(runs[0], output))


def cli(argv: list[str]) -> int:
    """Runs the command line."""
    return command.run(argv, __doc__, _report)


def _define(values):
    flags.DEFINE_list("workdirs", [], "Work directories of finished runs.", flag_values=values)
    flags.DEFINE_string("output", "", "Directory to write the report to.", flag_values=values)


def _report(argv):
    values = command.parse(argv, _define)
    command.required(values, "workdirs", "output")
    print("report:", main(values.workdirs, values.output))


if __name__ == "__main__":
    sys.exit(cli(sys.argv))
