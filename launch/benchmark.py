"""Measures what the library costs, as ratios of two functions called by turns in one run.

    python -m launch.benchmark --what=pruning
    python -m launch.benchmark --what=experts --output=experts.json

`--what` is core, pruning, quantization, experts, deploy, training, scaling or microcontroller;
`--size=small` runs it on tiny models, which no target is meant for. Scaling is over all devices, of
a machine without accelerators over eight that share its cores. A value is a median, with its
quartiles behind it; seconds are of this machine, ratios carry over to similar ones. Nothing else
should run meanwhile. Quantization is measured against Qwix too, deployment in OpenVINO, and
training against PyTorch, where these are installed: `pip install -e '.[benchmark]'`, and PyTorch by
oneself. The runtimes of deploy have one thread each; XLA and PyTorch have all that the process is
given: `taskset -c 0` before the command gives them one too. Microcontrollers are emulated: counted
are instructions, which are no cycles, of what Clang makes of a C file, where
`pip install -e '.[microcontroller]'` was.
"""

import json
import os
import pathlib
import platform
import sys
from collections.abc import Iterator
from typing import Any

import flax
import jax
import rich.box
import rich.console
import rich.table
from absl import flags

from hybrid_jax import core, training
from launch import benchmarks, command

_FILE_WIDTH = 160


def main(what: str, size: str = "full") -> dict[str, Any]:
    """Measures one part of the library.

    Args:
      what: One of `benchmarks.BENCHMARKS`.
      size: One of `benchmarks.SIZES`.

    Returns:
      {'what', 'size', 'rows': [dict of a `benchmarks.Row`], 'environment'}.

    Raises:
      ValueError: If `what` or `size` is unknown; names the nearest.
    """
    core.check_choice("--what", what, benchmarks.BENCHMARKS)
    core.check_choice("--size", size, benchmarks.SIZES)
    load = os.getloadavg()[0]
    rows = []
    for benchmark in training.track(benchmarks.BENCHMARKS[what], what):
        for row in benchmark(benchmarks.SIZES[size]):
            rows.append(row._asdict())
            print(f"{row.name}: {row.value:.3g} {row.unit}; {row.note}", file=sys.stderr)
    environment = {
        "jax": jax.__version__,
        "flax": flax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "cpu cores": os.cpu_count(),
        "load before": round(load, 1),
    }
    return {"what": what, "size": size, "rows": rows, "environment": environment}


def table(results: dict[str, Any]) -> rich.table.Table:
    """Lays out what `main` returns."""
    facts = ", ".join(f"{name} {value}" for name, value in results["environment"].items())
    made = rich.table.Table(
        title=f"{results['what']}, {results['size']}", caption=facts, box=rich.box.MARKDOWN
    )
    made.add_column("measured", overflow="fold")
    for name in ("median", "quartiles", "target"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("note", overflow="fold")
    for row in results["rows"]:
        target = row["target"] if results["size"] == "full" else None
        made.add_row(row["name"], *_cells(row | {"target": target}), row["note"])
    return made


def cli(argv: list[str]) -> int:
    """Runs the command line."""
    return command.run(argv, __doc__, _benchmark)


def _define(values):
    flags.DEFINE_string("what", "", "Part of the library to measure.", flag_values=values)
    flags.DEFINE_string("size", "full", "small or full.", flag_values=values)
    flags.DEFINE_string("output", "", "File to write the results to, as JSON.", flag_values=values)


def _benchmark(argv):
    values = command.parse(argv, _define)
    output = pathlib.Path(values.output) if values.output else None
    if output and not output.parent.is_dir():
        raise ValueError(f"--output must be a file in a directory that exists, got {output}")
    if values.what == "scaling":
        jax.config.update("jax_num_cpu_devices", max(benchmarks.scaling.DEVICES))
    results = main(values.what, values.size)
    width = None if sys.stdout.isatty() else _FILE_WIDTH
    rich.console.Console(width=width).print(table(results))
    if output:
        output.write_text(json.dumps(results, indent=2) + "\n")


def _cells(row: dict[str, Any]) -> Iterator[str]:
    """Median, quartiles and target; a target that was missed is marked."""
    unit, target = row["unit"], row["target"]
    yield f"{row['value']:.3g} {unit}"
    yield f"{row['low']:.3g}–{row['high']:.3g}"
    missed = target is not None and row["value"] > target
    yield "" if target is None else f"≤ {target:g} {unit}" + (" missed" if missed else "")


if __name__ == "__main__":
    sys.exit(cli(sys.argv))
