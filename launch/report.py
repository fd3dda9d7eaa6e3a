"""Writes the report of a finished run again, or the report over several seeds.

    python -m launch.report --workdirs=runs/0,runs/1,runs/2 --output=runs/report

Each work directory must hold a results.json; their configs may differ in nothing but the seed. One
directory gives the report of that run, several give mean ± standard deviation.
"""

import sys

from absl import flags

from hybrid_jax import report


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
    results = [report.read(workdir) for workdir in workdirs]
    write = report.write_aggregate if len(results) > 1 else report.write
    return str(write(results if len(results) > 1 else results[0], output))


def cli(argv: list[str]) -> int:
    """Runs the command line; a user's error is one line on stderr and an exit code of 2."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    values = flags.FlagValues()
    flags.DEFINE_list("workdirs", [], "Work directories of finished runs.", flag_values=values)
    flags.DEFINE_string("output", "", "Directory to write the report to.", flag_values=values)
    try:
        rest = values(argv)[1:]
        if rest:
            raise ValueError(f"arguments must be flags, got {rest[0]!r}; write --name=value")
        for flag in ("workdirs", "output"):
            if not values[flag].value:
                raise ValueError(f"--{flag} must be given, got nothing")
        print("report:", main(values.workdirs, values.output))
    except (flags.Error, ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli(sys.argv))
