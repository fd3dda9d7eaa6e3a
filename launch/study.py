"""Runs a study: several configurations, each over several seeds, as records that outlive the runs.

    python -m launch.study --config=cifar10_study --workdir=/tmp/study --config.data.dir=~/tfds
    python -m launch.study --config=cifar10_study --tables   # from the records alone

A study is a module with STUDY, {name: changes of the configuration}, SEEDS, and, where a seed is to
be that of other keys too, SEEDED, the names of these. Members of a mixture are names of runs before
it. Each run lies in `--workdir`/NAME/SEED and goes on where it was stopped; when it is done, its
record, a line of JSON, is added to configs/results/STUDY.jsonl, and STUDY.md and STUDY.svg are made
from all records.
`--only=NAME,NAME` and `--seeds=0,1` run a part. Validation images judge a run, until `--test` has
those of test read, which its record says: once, at the end. A record is never removed: one that
misses its goal stays.
"""

import json
import pathlib
import re
import runpy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from matplotlib.figure import Figure
from scipy import stats

import configs
from hybrid_jax import recipes
from hybrid_jax.report import plots
from hybrid_jax.report.rows import Mean
from launch import command

RESULTS = pathlib.Path(configs.__file__).parent / "results"
FIELDS = ("accuracy", "macs", "bops", "parameters_total")
DRAWN = ("parent", "parent_int8", "single", "mixture", "control")
"""Roles of the rows that the plot shows, and whose answers to single images are kept."""
RESAMPLES = 2000


def main(
    study: str,
    workdir: str,
    changes: Mapping[str, Any] | None = None,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    results: str | pathlib.Path | None = None,
    test: bool = False,
) -> pathlib.Path:
    """Runs what has no record yet, and writes the tables.

    Args:
      study: Path of a study's module, or its name among our configs.
      workdir: Where the runs lie.
      changes: {dotted key: value} of every run, such as where the data lies.
      only: Names of runs; () for all.
      seeds: () for those of the study.
      results: Folder of records and tables; None for configs/results.
      test: Whether test images judge the runs, and not those of validation.

    Returns:
      The path of the tables.

    Raises:
      ValueError: If a name is none of the study's; names those that there are.
    """
    module, name = load(study)
    for run in only:
        if run not in module["STUDY"]:
            raise ValueError(f"--only must be of {', '.join(module['STUDY'])}, got {run!r}")
    folder = pathlib.Path(results or RESULTS)
    records = folder / f"{name}.jsonl"
    part = "test" if test else "validation"
    for seed in seeds or module["SEEDS"]:
        for run in only or module["STUDY"]:
            if (run, seed, part) in [
                (own["run"], own["seed"], own["part"]) for own in read(records)
            ]:
                continue
            config, own = module["get_config"](), dict(module["STUDY"][run])
            if members := own.get("mixture.members"):
                own["mixture.members"] = tuple(str(place(workdir, m, seed)) for m in members)
            fixed = {**dict.fromkeys(module["SEEDED"], seed), "evaluation.part": part}
            recipes.override(config, {**own, **(changes or {}), **fixed})
            made = recipes.run(config, place(workdir, run, seed))
            _append(records, record(run, seed, part, made.results))
            write(records)
    return write(records)


def write(records: pathlib.Path) -> pathlib.Path:
    """Writes tables and plot of a file of records beside it, and returns the path of the tables."""
    every, path = read(records), records.with_suffix(".md")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tables(every))
    if drawn := figure(every):
        drawn.savefig(records.with_suffix(".svg"), metadata={"Date": None})
    return path


def record(run: str, seed: int, part: str, results: Any) -> dict[str, Any]:
    """Returns what is kept of a run: its rows, with answers to single images as bits in hex."""
    rows = []
    for row in results.rows:
        own = {name: getattr(row, name) for name in ("name", "role", *FIELDS)}
        files = {
            target: {"bytes": f.bytes, "accuracy": f.accuracy} for target, f in row.files.items()
        }
        if row.role in DRAWN and set(row.correct or "no") <= {0, 1}:
            own["correct"] = np.packbits(np.array(row.correct, bool)).tobytes().hex()
        rows.append(own | {"files": files})
    return {
        "run": run,
        "seed": seed,
        "part": part,
        "rows": rows,
        "images": results.dataset["sizes"][part],
        "seconds": round(sum(results.seconds.values())),
        "date": results.environment["date"],
        "machine": results.environment["machine"],
    }


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the records of a study; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def tables(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns one table for each run: its rows, mean ± standard deviation over the seeds.

    Example:
      >>> row = {'name': 'parent', 'role': 'parent', 'accuracy': 0.9, 'macs': 4e6, 'bops': 4e9}
      >>> row |= {'parameters_total': 1e5, 'files': {'onnx': {'bytes': 4e5, 'accuracy': 0.9}}}
      >>> own = {'run': 'a', 'part': 'test', 'seconds': 60, 'images': 10, 'rows': [row]}
      >>> print(tables([own | {'seed': 0}, own | {'seed': 1}]))
      ## a
      <BLANKLINE>
      Seeds 0, 1; 10 test images; 1 min a run.
      <BLANKLINE>
      | model | accuracy | Δ | 95 % | ÷ MACs | ÷ BOPs | ÷ bytes |
      |:--|--:|--:|--:|--:|--:|--:|
      | parent | 90.00 ± 0.00 | 0.00 ± 0.00 | – | 1.00 | 1.00 | 1.00 |
      <BLANKLINE>
    """
    return "\n".join(_table(*key, own) for key, own in _runs(records).items())


def figure(records: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Returns the plot of accuracy against mean BOPs of what was judged last, over the seeds.

    That is the test images where any run was. What several runs have, as their parent, is shown of
    the first.
    """
    runs = _runs(records)
    parts = [part for _, part in runs]
    points: dict[tuple, plots.Point] = {}
    for (run, part), every in runs.items():
        if part != ("test" if "test" in parts else "validation"):
            continue
        for model in _models(every):
            rows = [own["rows"][i] for own, i in _found(every, model)]
            role = rows[0]["role"]
            if role not in DRAWN:
                continue
            bops, accuracy = (Mean([row[key] for row in rows]) for key in ("bops", "accuracy"))
            name = run if role in ("single", "mixture") else f"{model}: {run}"
            same = (model, bops, accuracy) if name != run else name
            points.setdefault(same, plots.Point(name, role, bops, accuracy))
    every = list(points.values())
    return plots.accuracy_against(every, "mean BOPs of an image", "", "accuracy")


def _runs(records):
    """{(run, part): its records}."""
    runs: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for own in records:
        runs.setdefault((own["run"], own["part"]), []).append(own)
    return runs


def _models(records):
    return dict.fromkeys(row["name"] for own in records for row in own["rows"])


def _found(records, model):
    """Each record that has the model, and which of its rows that is."""
    for own in records:
        for i, row in enumerate(own["rows"]):
            if row["name"] == model:
                yield own, i


def _table(name, part, records):
    seeds = ", ".join(str(own["seed"]) for own in records)
    minutes = round(np.mean([own["seconds"] for own in records]) / 60)
    lines = [
        f"## {name}\n",
        f"Seeds {seeds}; {records[0]['images']:,} {part} images; {minutes} min a run.\n",
        "| model | accuracy | Δ | 95 % | ÷ MACs | ÷ BOPs | ÷ bytes |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for model in _models(records):
        pairs = [(own["rows"][0], own["rows"][i]) for own, i in _found(records, model)]
        accuracy = _spread([100 * row["accuracy"] for _, row in pairs])
        delta = _spread([100 * (row["accuracy"] - dense["accuracy"]) for dense, row in pairs])
        cells = [
            accuracy,
            delta,
            _interval(pairs, [own["images"] for own, _ in _found(records, model)]),
            *(_ratio(pairs, field) for field in ("macs", "bops")),
            _bytes(pairs),
        ]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _interval(pairs, counts):
    """The 95 % bootstrap over images of Δ; runs of one parent's answers share their images."""
    by_images: dict[str, list[np.ndarray]] = {}
    for (dense, row), count in zip(pairs, counts, strict=True):
        if dense is row or not (dense.get("correct") and row.get("correct")):
            return "–"
        a, b = (
            np.unpackbits(np.frombuffer(bytes.fromhex(own["correct"]), np.uint8), count=count)
            for own in (dense, row)
        )
        by_images.setdefault(dense["correct"], []).append(b.astype(float) - a)
    each = np.concatenate([np.mean(own, 0) for own in by_images.values()])
    if not each.any():
        return "–"
    options = {"n_resamples": RESAMPLES, "method": "percentile", "batch": 100, "rng": 0}
    low, high = stats.bootstrap((each,), np.mean, **options).confidence_interval
    return f"[{100 * low:+.2f}, {100 * high:+.2f}]"


def _spread(values):
    mean = f"{np.mean(values):.2f}"
    return f"{mean} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else mean


def _ratio(pairs, field):
    return f"{np.mean([dense[field] / row[field] for dense, row in pairs]):.2f}"


def _bytes(pairs):
    """Of the file of the first target that both have."""
    found = [
        dense["files"][target]["bytes"] / file["bytes"]
        for dense, row in pairs
        for target, file in list(row["files"].items())[:1]
        if file["bytes"] and dense["files"].get(target, {}).get("bytes")
    ]
    return f"{np.mean(found):.2f}" if found else "–"


def load(study: str) -> tuple[dict[str, Any], str]:
    """Returns what a study's module holds, and its name."""
    ours = pathlib.Path(configs.__file__).parent
    path = pathlib.Path(study) if pathlib.Path(study).is_file() else ours / f"{study}.py"
    if not path.is_file():
        raise ValueError(f"--config must be a file, or one of our studies, got {study!r}")
    module = runpy.run_path(str(path))
    for needed in ("STUDY", "SEEDS", "get_config"):
        if needed not in module:
            raise ValueError(f"--config must be a module with {needed}, got {path} without")
    return {"SEEDED": ("seed",), **module}, path.stem


def place(workdir: str | pathlib.Path, run: str, seed: int) -> pathlib.Path:
    """Returns the work directory of a run."""
    return pathlib.Path(workdir) / re.sub(r"[^\w.-]+", "_", run) / str(seed)


def _append(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


def cli(argv: list[str]) -> int:
    """Runs the command line."""
    return command.run(argv, __doc__, _study)


def _define(values):
    flags.DEFINE_string("config", "", "A study's module, or one of ours.", flag_values=values)
    flags.DEFINE_string("workdir", "", "Directory of the runs.", flag_values=values)
    flags.DEFINE_list("only", [], "Runs, by name.", flag_values=values)
    flags.DEFINE_list("seeds", [], "Seeds in place of the study's.", flag_values=values)
    flags.DEFINE_bool("test", False, "Test images judge the runs.", flag_values=values)
    flags.DEFINE_bool("tables", False, "Write the tables alone.", flag_values=values)
    command.define_cache(values)


def _study(argv):
    overrides = [flag for flag in argv[1:] if flag.startswith("--config.")]
    values = command.parse([flag for flag in argv if flag not in overrides], _define)
    command.required(values, "config", *(() if values.tables else ("workdir",)))
    if values.tables:
        _, name = load(values.config)
        print("tables:", write(RESULTS / f"{name}.jsonl"))
        return
    from launch import compilation

    compilation.set_up(values.compilation_cache)
    seeds = [int(seed) for seed in values.seeds]
    changes = recipes.flag_values(overrides)
    path = main(values.config, values.workdir, changes, values.only, seeds, test=values.test)
    print("tables:", path)


if __name__ == "__main__":
    sys.exit(cli(sys.argv))
