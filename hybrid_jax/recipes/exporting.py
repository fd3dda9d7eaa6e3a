"""What a finished run has made, as inference graphs, written for devices and checked there."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hybrid_jax import deploy
from hybrid_jax.recipes import config as configuration
from hybrid_jax.recipes import evaluation, phase1, workdir
from hybrid_jax.recipes.evaluation import Models
from hybrid_jax.recipes.job import Job
from hybrid_jax.recipes.pipeline import make, prepare

CALIBRATION_IMAGES = 512


def resume(path: str | pathlib.Path) -> Job:
    """Returns the job of a finished run, with the configuration that it was made with.

    Raises:
      FileNotFoundError: If the directory holds no finished run.
      ValueError: If its data is not where it was.
    """
    path = pathlib.Path(path)
    for file in ("config.json", "results.json"):
        if not (path / file).is_file():
            raise FileNotFoundError(f"workdir must hold a finished run, got {path} without {file}")
    config = configuration.default_config()
    nested: dict[str, Any] = {}
    for key, value in json.loads((path / "config.json").read_text()).items():
        *parents, name = key.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = tuple(value) if isinstance(value, list) else value
    config.update(ConfigDict(nested))
    return prepare(config, path)


def programs(job: Job, models: Models) -> dict[str, deploy.Program | deploy.Mixture]:
    """Returns the inference graphs: 'dense' in floats, 'expert' (the best) and 'mixture' (top-1).

    Args:
      job: The run.
      models: What it has made.
    """
    images = job.normalize(job.splits.train.images[:CALIBRATION_IMAGES])
    experts = [
        deploy.lower(e.predict, e.variables, e.quantizer, e.ranges, images)
        for e in phase1.alone(models.made)
    ]
    gate = models.gate
    choice = deploy.lower(
        gate.float_predict, gate.params["variables"], gate.quantizer, gate.params["ranges"], images
    )
    return {
        "dense": deploy.lower(models.dense.predict, models.variables, None, None, images),
        "expert": experts[_best(job, models)],
        "mixture": deploy.Mixture(choice, tuple(experts)),
    }


def export(job: Job, targets: Sequence[str], pairs: int = 30) -> list[dict]:
    """Writes each graph for each target, runs it there on the test images and times it.

    A target that cannot express a graph, or lacks what it needs to run, gets an entry that says so.

    Args:
      job: A finished run.
      targets: Of `deploy.TARGETS`.
      pairs: How many pairs of calls each latency is taken over.

    Returns:
      The entries, which `results.json` then has under 'exports' too.
    """
    models = make(job)
    made = programs(job, models)
    images = np.asarray(job.normalize(job.splits.test.images))
    best = _best(job, models)
    expected = {
        "dense": job.logits(models.dense.predict, models.variables, job.splits.test),
        "expert": evaluation.logits(job, models.made, job.splits.test)[best],
        "mixture": evaluation.top_1_logits(job, models),
    }
    records = []
    for target in targets:
        paths = {
            name: job.workdir / "deploy" / f"{name}{deploy.TARGETS[target].suffix}" for name in made
        }
        for name, program in made.items():
            record = {"target": target, "model": name, "artifact": f"deploy/{paths[name].name}"}
            try:
                manifest = deploy.export_to(target, paths[name], program)
                # What has no float form is compared with the best expert's.
                reference = paths["dense"] if paths["dense"].exists() else paths["expert"]
                checked = deploy.check(
                    target,
                    paths[name],
                    reference,
                    images,
                    expected[name],
                    batches=[b for b in (1, 32) if b <= len(images)],
                    pairs=pairs,
                )
            except (ValueError, ImportError, RuntimeError) as error:
                records.append(record | {"error": " ".join(str(error).split())})
                continue
            records.append(record | _entry(manifest, checked, reference.stem))
    file = job.workdir / "results.json"
    workdir.write_json(file, json.loads(file.read_text()) | {"exports": records})
    return records


def _entry(manifest, checked, reference):
    return {
        "reference": reference,
        "bytes": checked.bytes,
        "reference_bytes": checked.dense_bytes,
        "max_difference": checked.max_difference,
        "agreement": checked.agreement,
        "images": checked.count,
        "larger": checked.larger,
        "slower": list(checked.slower),
        "latency": {str(b): dict(t._asdict()) for b, t in checked.latencies.items()},
        "memory": {key: manifest[key] for key in ("flash", "ram") if key in manifest},
    }


def _best(job, models):
    """The expert that is best on the validation images."""
    logits = evaluation.logits(job, models.made, job.splits.validation)
    return int((logits.argmax(-1) == job.splits.validation.labels).mean(-1).argmax())
