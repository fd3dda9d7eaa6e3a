r"""A study on an accelerator that is lent for minutes and reaches nothing: what to carry, the runs.

    python -m launch.accelerator --pack=carried --data=~/tensorflow_datasets --weights=weights
    python -m launch.accelerator --carried=carried --out=results --minutes=24     # over there

The first makes a folder of images as JPEG bytes, the two trained ResNets, and wheels of what a
Python with jax, flax and optax lacks (`pip install --no-deps carried/*.whl`). The second decodes
the images, and does the runs of `--study` seed by seed, each with `--scale` times its steps, on
test images, for as long as the longest such run before it leaves time. `--out` gets the records as
they come, and an archive of each run, which a directory of runs takes up here; what time is left
goes to tests marked `accelerator`, and to the speed of pruned, quantized and stacked steps.
"""

import concurrent.futures
import contextlib
import io
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import flags

from launch import command

PARTS = ("train", "test")
WEIGHTS = ("resnet20_cifar10_jpeg.safetensors", "resnet56_cifar10_jpeg.safetensors")
LACKED = ("ml_collections",)
KEPT = ("run.json", "splits.json", "results.json", "choices.json", "records.jsonl", "stages")
"""What of a run comes back: all but checkpoints and files for devices."""
SPEED = ("pruning", "quantization", "experts")
RESERVE = 45.0
"""Seconds for what follows the last run."""


def pack(folder: pathlib.Path, data: str, weights: pathlib.Path) -> None:
    """Makes the folder to carry.

    Args:
      folder: Made anew; must be absent.
      data: TFDS root that holds a prepared cifar10.
      weights: Directory of the trained ResNets.
    """
    import tensorflow_datasets as tfds

    for name in WEIGHTS:
        if not (weights / name).is_file():
            raise ValueError(f"--weights must be a directory with {name}, got {weights}")
    builder = tfds.builder("cifar10", data_dir=str(pathlib.Path(data).expanduser()))
    folder.mkdir(parents=True)
    arrays = {}
    for part in PARTS:
        source = builder.as_data_source(part, decoders={"image": tfds.decode.SkipDecoding()})
        files = [bytes(example["image"]) for example in source]
        arrays[f"{part}_bytes"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{part}_ends"] = np.cumsum([len(file) for file in files])
        arrays[f"{part}_labels"] = np.array([example["label"] for example in source], np.uint8)
    np.savez(folder / "jpeg.npz", names=np.array(builder.info.features["label"].names), **arrays)
    (folder / "weights").mkdir()
    for name in WEIGHTS:
        shutil.copy(weights / name, folder / "weights" / name)
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*fetch, *LACKED], check=True)


def unpack(carried: pathlib.Path, path: pathlib.Path) -> tuple[str, ...]:
    """Decodes the images that `pack` carries into an .npz file; returns names of the classes."""
    from PIL import Image

    def decode(file):
        return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))

    arrays = {}
    with np.load(carried / "jpeg.npz") as held, concurrent.futures.ThreadPoolExecutor() as pool:
        for part in PARTS:
            whole, ends = held[f"{part}_bytes"].tobytes(), held[f"{part}_ends"].tolist()
            files = [whole[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
            arrays[f"{part}_images"] = np.stack(list(pool.map(decode, files)))
            arrays[f"{part}_labels"] = held[f"{part}_labels"]
        names = tuple(map(str, held["names"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return names


def in_time(
    jobs: Sequence[tuple[str, Callable[[], object]]], left: Callable[[], float]
) -> Iterator[tuple[str, float]]:
    """Does the jobs that there is time for, in order, and yields the kind and seconds of each done.

    One begins where `left()` seconds are as many as the longest of its kind took; the first of a
    kind where any are left.

    Example:
      >>> clock = iter([90, 50, 50, 10, 10, 0])
      >>> jobs = [('a', lambda: None), ('a', lambda: None), ('b', lambda: None)]
      >>> [kind for kind, _ in in_time(jobs, lambda: next(clock))]
      ['a', 'a', 'b']
    """
    longest: dict[str, float] = {}
    for kind, job in jobs:
        before = left()
        if before <= longest.get(kind, 0.0):
            continue
        job()
        seconds = before - left()
        longest[kind] = max(seconds, longest.get(kind, 0.0))
        yield kind, seconds


def main(
    carried: pathlib.Path,
    out: pathlib.Path,
    minutes: float,
    study: str = "cifar10_study",
    scale: float = 4.0,
    only: Sequence[str] = (),
    workdir: pathlib.Path | None = None,
) -> None:
    """Runs a study, tests and benchmarks for some minutes; see the text of this module.

    Args:
      carried: Folder that `pack` made.
      out: Gets STUDY.jsonl, its tables and plot, RUN_SEED.tar.xz of each run, and JSON of speeds.
      minutes: Of all.
      study: As of `launch.study`.
      scale: Times the steps of each run's training.
      only: Runs; () for those that a cascade of the study is made of, the cascades, and then all.
      workdir: Where runs lie meanwhile; None for a folder beside `carried`.
    """
    from launch import study as studies

    end = time.monotonic() + 60 * minutes
    module, _ = studies.load(study)
    workdir = carried.parent / "accelerator_runs" if workdir is None else workdir
    images = workdir / "images.npz"
    names = unpack(carried, images)
    out.mkdir(parents=True, exist_ok=True)

    def left():
        return end - time.monotonic() - RESERVE

    def job(name, seed):
        own = module["STUDY"][name]
        changes = {"data.name": "npz", "data.dir": str(images), "data.class_names": names}
        if "experts.steps" in own:
            changes["experts.steps"] = round(scale * own["experts.steps"])
        for key in ("model.weights", "teacher.weights"):
            if key in own:
                changes[key] = str(carried / own[key])
        runs = str(workdir / "runs")
        studies.main(study, runs, changes, [name], [seed], results=out, test=True)
        archive(studies.place(runs, name, seed), out)

    chosen = only or ordered(module["STUDY"])
    jobs = [
        (name, lambda name=name, seed=seed: job(name, seed))
        for seed in module["SEEDS"]
        for name in chosen
    ]
    for kind, seconds in in_time(jobs, left):
        print(f"{kind}: {seconds:.0f} s, {left() / 60:.1f} min left", file=sys.stderr, flush=True)
    spend(out, left)


def spend(out: pathlib.Path, left: Callable[[], float]) -> None:
    """Spends what time is left on tests marked `accelerator`, and on the speed of steps."""
    tests = ["pytest", "-q", "-m", "accelerator", "tests/test_accelerator.py"]
    speed = [
        ["launch.benchmark", f"--what={what}", f"--output={out}/{what}.json"] for what in SPEED
    ]
    for module in (tests, *speed):
        if left() > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run([sys.executable, "-m", *module], timeout=left())


def ordered(study: dict[str, dict]) -> list[str]:
    """Returns the names of a study's runs: first members of mixtures, then these, then the others.

    Example:
      >>> ordered({'a': {}, 'b': {}, 'pair': {'mixture.members': ('b', 'c')}, 'c': {}})
      ['b', 'c', 'pair', 'a']
    """
    mixtures = [name for name, own in study.items() if "mixture.members" in own]
    members = [member for name in mixtures for member in study[name]["mixture.members"]]
    return list(dict.fromkeys([*members, *mixtures, *study]))


def archive(folder: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """Writes what is `KEPT` of a run, under its place among the runs, and returns the file."""
    run, seed = folder.parts[-2:]
    path = out / f"{run}_{seed}.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        for name in KEPT:
            if (folder / name).exists():
                tar.add(folder / name, f"{run}/{seed}/{name}")
    return path


def cli(argv: list[str]) -> int:
    """Runs the command line."""
    return command.run(argv, __doc__, _act)


def _define(values):
    for name, text in (
        ("pack", "Folder to make."),
        ("data", "TFDS root with a prepared cifar10."),
        ("weights", "Directory of the trained ResNets."),
        ("carried", "Folder that --pack made."),
        ("out", "Directory of what comes back."),
        ("study", "A study's module, or one of ours."),
    ):
        default = "cifar10_study" if name == "study" else ""
        flags.DEFINE_string(name, default, text, flag_values=values)
    flags.DEFINE_float("minutes", 24.0, "Of all.", 0.5, flag_values=values)
    flags.DEFINE_float("scale", 4.0, "Times the steps of the study.", 0.0, flag_values=values)
    flags.DEFINE_list("only", [], "Runs, by name.", flag_values=values)


def _act(argv):
    values = command.parse(argv, _define)
    if values.pack:
        command.required(values, "data", "weights")
        folder = pathlib.Path(values.pack)
        if folder.exists():
            raise ValueError(f"--pack must be a folder that is not there yet, got {folder}")
        pack(folder, values.data, pathlib.Path(values.weights).expanduser())
        sizes = {f.name: f.stat().st_size for f in folder.rglob("*") if f.is_file()}
        print(json.dumps({"bytes": sum(sizes.values()), **sizes}, indent=1))
        return None
    command.required(values, "carried", "out")
    given = pathlib.Path(values.carried).resolve(), pathlib.Path(values.out).resolve()
    return lambda: main(*given, values.minutes, values.study, values.scale, values.only)


if __name__ == "__main__":
    sys.exit(cli(sys.argv))
