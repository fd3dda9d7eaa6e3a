"""What a run ships: each model as a file of each target, run there on the test images."""

import dataclasses
import math
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hybrid_jax import core, data, deploy
from hybrid_jax import program as p
from hybrid_jax.recipes.rows import Shipped
from hybrid_jax.recipes.task import Task
from hybrid_jax.report import File, Row

LOOPS = 10**11
"""MACs of all test images that files of C, whose loops are plain, run at most: minutes."""
TIMED = 32
"""Images that a mixture or a cascade is timed on: one takes more time than another."""
MEMORY = 2**31
"""Bytes of test images, in floats, that files are run on at most."""


def write(
    task: Task,
    rows: Sequence[Row],
    shipped: Mapping[str, Shipped],
    targets: Sequence[str],
    pairs: int = 30,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> list[Row]:
    """Returns the rows with their files for the targets, each run in its runtime.

    A target that cannot express a model, or lacks what it needs to run, gets a file that says so.
    Times are ratios to the file of the first of `shipped` that a target can express, over `pairs`
    pairs of calls. Beside the files lies input.json: what they take, and the names of the classes.
    All files of a target are run on the same images: the first ones where all would take too long.
    """
    test = task.judged.images
    most = min(len(test), max(1, MEMORY // (4 * math.prod(test.shape[1:]))))
    loops = int(
        LOOPS // max(row.macs_worst or row.macs or 1 for row in rows if row.name in shipped)
    )
    images = np.asarray(task.normalize(test[:most]))
    core.write_json(task.workdir / "deploy" / "input.json", preprocessing(task))
    files: dict[str, dict[str, File]] = {row.name: dict(row.files) for row in rows}
    with core.on_this_machine(task.workdir) as folder:
        for target in targets:
            options = {"platforms": tuple(platforms)} if target == "stablehlo" else {}
            count = min(most, max(loops, 100)) if target == "c" else most
            reference = None
            for name, own in shipped.items():
                artifact = f"deploy/{name.replace(' ', '_')}{deploy.TARGETS[target].suffix}"
                path = folder / artifact
                try:
                    manifest = deploy.export_to(target, path, own.program, **options)
                    reference = reference or path
                    checked = deploy.check(
                        target,
                        path,
                        reference,
                        images[:count],
                        own.outputs[:count],
                        batches=[1],
                        pairs=pairs,
                        parts=TIMED if isinstance(own.program, p.Choice) else 1,
                    )
                    files[name][target] = _file(task, artifact, manifest, checked)
                except (ValueError, ImportError, RuntimeError) as error:
                    files[name][target] = File(artifact, error=" ".join(str(error).split()))
    return [dataclasses.replace(row, files=files[row.name]) for row in rows]


def lacking(targets: Sequence[str]) -> list[str]:
    """Returns what each target says that could not run a file here, where an extra is missing.

    It is asked with the smallest of networks, before hours of training go by.
    """
    one = np.ones((1, 1), np.float32)
    program = p.lower(lambda params, x: x @ params, one, one)

    def asked() -> list[str]:
        found = []
        for target in targets:
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder, "one" + deploy.TARGETS[target].suffix)
                try:
                    deploy.export_to(target, path, program)
                    deploy.TARGETS[target].session(path, 1, 1)
                except ImportError as error:
                    found.append(f"{target}: {error}")
        return found

    return core.of_first(asked)


def preprocessing(task: Task) -> dict[str, Any]:
    """Returns what the files take and what their outputs mean, as JSON."""
    return {
        "input": "float32 (pixel / 255 - mean) / std, of shape (1, H, W, C)",
        "shape": list(task.splits.image_shape),
        "mean": list(task.splits.mean),
        "std": list(task.splits.std),
        "class_names": list(task.splits.class_names or ()),
    }


def _file(task: Task, artifact: str, manifest: Mapping[str, Any], checked: deploy.Check) -> File:
    times = checked.latencies[1]
    test = data.Arrays(*(part[: checked.count] for part in task.judged))
    return File(
        artifact,
        bytes=checked.bytes,
        accuracy=float(task.score(checked.outputs, test).mean()),
        images=checked.count,
        agreement=checked.agreement if task.splits.num_classes else None,
        max_difference=checked.max_difference,
        milliseconds=1e3 * times.p50,
        milliseconds_quartiles=tuple(1e3 * t for t in times.quartiles),
        ratio=times.ratio,
        ratio_quartiles=times.spread,
        flash=manifest.get("flash"),
        ram=manifest.get("ram"),
        kernel_bits=tuple(manifest.get("kernel_bits", ())),
    )
