"""What a run has made, written for devices and checked there."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hybrid_jax import deploy
from hybrid_jax import program as p
from hybrid_jax.recipes.job import Job
from hybrid_jax.recipes.programs import Models, Programs, artifact, logits, top_1_logits


class Exported(NamedTuple):
    """A model of a run to be written for devices.

    `expected` (n, N) are the logits of the model as it was evaluated, on the test images.
    """

    program: p.Program | p.Choice
    expected: np.ndarray


def exported(job: Job, models: Models, programs: Programs) -> dict[str, Exported]:
    """Returns what every run exports: the dense parent in floats, the best expert, the mixture."""
    test = job.splits.test
    source, best = programs.chosen
    dense = job.logits(models.dense.predict, models.variables, test)
    return {
        "dense": Exported(programs.dense, dense),
        "expert": Exported(programs.best, logits(job, source, test)[best]),
        "mixture": Exported(programs.mixture, top_1_logits(job, models)),
    }


def write(
    job: Job, made: Mapping[str, Exported], targets: Sequence[str], pairs: int = 30
) -> list[dict]:
    """Writes each model for each target, runs it there on the test images and times it.

    A target that cannot express a model, or lacks what it needs to run, gets an entry that says so.

    Files are compared with that of the first of `made` that a target can express; `pairs` is how
    many pairs of calls each latency is taken over. There is an entry for each file, as
    `results.json` holds them under 'exports'.
    """
    images = np.asarray(job.normalize(job.splits.test.images))
    batches = [batch for batch in (1, 32) if batch <= len(images)]
    options = {"stablehlo": {"platforms": tuple(job.config.deploy.platforms)}}
    records = []
    for target in targets:
        reference = None
        for name, (program, expected) in made.items():
            record = {"target": target, "model": name, "artifact": artifact(name, target)}
            path = job.workdir / record["artifact"]
            try:
                manifest = deploy.export_to(target, path, program, **options.get(target, {}))
                reference = reference or (name, path)
                checked = deploy.check(
                    target, path, reference[1], images, expected, batches=batches, pairs=pairs
                )
            except (ValueError, ImportError, RuntimeError) as error:
                records.append(record | {"error": " ".join(str(error).split())})
            else:
                records.append(record | _entry(manifest, checked, reference[0]))
    return records


def _entry(manifest, checked, reference):
    return {
        "reference": reference,
        "bytes": checked.bytes,
        "reference_bytes": checked.dense_bytes,
        "kernel_bits": manifest.get("kernel_bits"),
        "max_difference": checked.max_difference,
        "agreement": checked.agreement,
        "images": checked.count,
        "larger": checked.larger,
        "slower": list(checked.slower),
        "latency": {str(b): dict(t._asdict()) for b, t in checked.latencies.items()},
        "memory": {key: manifest[key] for key in ("flash", "ram") if key in manifest},
    }
