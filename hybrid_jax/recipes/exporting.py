"""What a finished run has made, as inference graphs, written for devices and checked there."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from hybrid_jax import core, deploy, quantization
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
      ValueError: If its data is not where it was, or another version made it.
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
    try:
        config.update(ConfigDict(nested))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"workdir must hold a run of this version, got another configuration: {error.args[0]}"
        ) from None
    return prepare(config, path)


class Exported(NamedTuple):
    """A model of a run to be written for devices.

    Attributes:
      program: Its inference graph.
      expected: (n, N) logits of the model as it was evaluated, on the test images.
    """

    program: deploy.Program | deploy.Mixture
    expected: np.ndarray


def programs(job: Job, models: Models) -> dict[str, Exported]:
    """Returns what is exported: the dense parent in floats and in 8 bits, expert and mixture.

    Args:
      job: The run.
      models: What it has made; 'expert' is the best of its experts on the validation images.
    """
    test = job.splits.test
    images = job.normalize(job.splits.train.images[:CALIBRATION_IMAGES])
    dense, gate = models.dense, models.gate
    graph = core.trace(dense.predict, models.variables, job.images)
    spec = quantization.spec(graph, deployable=True)
    ranges = quantization.calibrate(dense.predict, models.variables, [(images,)], spec)
    fake_quantized = quantization.fake_quantized(dense.predict, spec)
    each = [
        deploy.lower(e.predict, e.variables, e.quantizer, e.ranges, images)
        for e in phase1.alone(models.made)
    ]
    choice = deploy.lower(
        gate.float_predict, gate.params["variables"], gate.quantizer, gate.params["ranges"], images
    )
    best = int(evaluation.validation_accuracies(job, models.made).argmax())
    return {
        "dense": Exported(
            deploy.lower(dense.predict, models.variables, None, None, images),
            job.logits(dense.predict, models.variables, test),
        ),
        "dense int8": Exported(
            deploy.lower(dense.predict, models.variables, spec, ranges, images),
            job.logits(lambda params, x: fake_quantized(params, ranges, x), models.variables, test),
        ),
        "expert": Exported(each[best], evaluation.logits(job, models.made, test)[best]),
        "mixture": Exported(
            deploy.Mixture(choice, tuple(each)), evaluation.top_1_logits(job, models)
        ),
    }


def export(job: Job, targets: Sequence[str], pairs: int = 30) -> list[dict]:
    """Writes each model for each target, runs it there on the test images and times it.

    A target that cannot express a model, or lacks what it needs to run, gets an entry that says so.

    Args:
      job: A finished run.
      targets: Of `deploy.TARGETS`.
      pairs: How many pairs of calls each latency is taken over.

    Returns:
      The entries, which `results.json` then has under 'exports' too.
    """
    made = programs(job, make(job))
    images = np.asarray(job.normalize(job.splits.test.images))
    batches = [batch for batch in (1, 32) if batch <= len(images)]
    records = []
    for target in targets:
        reference = None
        for name, (program, expected) in made.items():
            file = f"{name.replace(' ', '_')}{deploy.TARGETS[target].suffix}"
            path = job.workdir / "deploy" / file
            record = {"target": target, "model": name, "artifact": f"deploy/{file}"}
            try:
                manifest = deploy.export_to(target, path, program)
                # The first that the target can express: C has no floats, and starts at 8 bits.
                reference = reference or (name, path)
                checked = deploy.check(
                    target, path, reference[1], images, expected, batches=batches, pairs=pairs
                )
            except (ValueError, ImportError, RuntimeError) as error:
                records.append(record | {"error": " ".join(str(error).split())})
            else:
                records.append(record | _entry(manifest, checked, reference[0]))
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
