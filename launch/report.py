"""Write the report of finished runs again, or the report over several seeds.

    python -m launch.report --workdirs=runs/0,runs/1,runs/2 --output=runs/report

Each work directory must hold a results.json; the configs may differ in nothing but the seed. One
directory gives the report of that run, several give mean ± standard deviation.
"""

from absl import app, flags

from hybrid_jax import report

_WORKDIRS = flags.DEFINE_list("workdirs", None, "Work directories of finished runs.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write the report to.", required=True)


def main(argv) -> None:
    """Read, aggregate, write; whatever is wrong ends in one line and exit code 1."""
    if len(argv) > 1:
        raise SystemExit(f"error: arguments must be flags, got {' '.join(argv[1:])!r}")
    try:
        results = [report.read(workdir) for workdir in _WORKDIRS.value]
        if len(results) == 1:
            path = report.write(results[0], _OUTPUT.value)
        else:
            path = report.write_aggregate(results, _OUTPUT.value)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(path)


if __name__ == "__main__":
    app.run(main)
