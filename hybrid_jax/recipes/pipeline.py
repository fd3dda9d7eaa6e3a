"""The whole run: prepared without writing anything, then stage by stage to the report."""

import json
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import flax
import jax
import numpy as np
from ml_collections import ConfigDict

from hybrid_jax import core, data, report, training
from hybrid_jax.recipes import config as configuration
from hybrid_jax.recipes import (
    controls,
    diversity,
    evaluation,
    exporting,
    phase1,
    phase2,
    programs,
    workdir,
)
from hybrid_jax.recipes.checks import check_config
from hybrid_jax.recipes.collapse import collapsed_mixture
from hybrid_jax.recipes.exporting import Exported
from hybrid_jax.recipes.job import Job
from hybrid_jax.recipes.parent import network, parent
from hybrid_jax.recipes.programs import Models

PATHS = ("dir", "labels", "classes")  # keys of config.data that may begin with ~


def prepare(config: ConfigDict, path: str | pathlib.Path, command: str = "") -> Job:
    """Checks the configuration, loads the data and claims the work directory, in this order.

    `path` is empty, absent, or holds a run of the same config; `command` is for the report. Where
    something does not fit, nothing was written; else `config.json` and `splits.json`, which images
    of which part of the data are training, validation and test images.
    """
    check_config(config)
    splits = _load(config.data)
    job = Job(config, pathlib.Path(path), splits, command)
    _check_model(job)
    workdir.claim(path, config)
    where = {part: [of, index.tolist()] for part, (of, index) in splits.indices.items()}
    core.write_json(job.workdir / "splits.json", where)
    return job


def resume(path: str | pathlib.Path) -> Job:
    """Returns the job of a finished run, with the configuration that it was made with.

    Raises:
      FileNotFoundError: If the directory holds no finished run.
    """
    path = pathlib.Path(path)
    for file in ("config.json", "results.json"):
        if not (path / file).is_file():
            raise FileNotFoundError(f"workdir must hold a finished run, got {path} without {file}")
    config = configuration.default_config()
    nested: dict[str, Any] = {}
    for key, value in json.loads((path / "config.json").read_text()).items():
        *sections, name = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = tuple(value) if isinstance(value, list) else value
    try:
        config.update(ConfigDict(nested))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"workdir must hold a run of this version, got another configuration: {error.args[0]}"
        ) from None
    return prepare(config, path)


def run(job: Job) -> dict:
    """Runs what is not done yet, writes `results.json` and the report, and returns the results.

    Every stage resumes from its checkpoints. A run that is done only has its report written again.

    Raises:
      FloatingPointError: If a loss is not finite.
    """
    file = job.workdir / "results.json"
    if file.exists():
        results = json.loads(file.read_text())
    else:
        results = _results(job)
        core.write_json(file, results)
    report.write(results, job.workdir)
    return results


def export(job: Job, targets: Sequence[str], pairs: int = 30) -> list[dict]:
    """Writes what a finished run has made for devices, and checks every file, see `write`.

    The dense parent in floats and in integers, the best single expert and the top-1 mixture. In
    `results.json` the entries, which are returned, take the place of those of the same targets.
    `pairs` is how many pairs of calls each latency is taken over.
    """
    models = make(job)
    dense, *others = exporting.exported(job, models, programs.lower(job, models)).items()
    integers = ("dense int8", Exported(*programs.dense_integers(job, models)))
    records = exporting.write(job, dict([dense, integers, *others]), targets, pairs)
    file = job.workdir / "results.json"
    results = json.loads(file.read_text())
    kept = [record for record in results.get("exports", ()) if record["target"] not in targets]
    core.write_json(file, results | {"exports": kept + records})
    return records


def make(job: Job) -> Models:
    """Trains everything that is not trained yet, and returns it."""
    config = job.config
    with workdir.stage(job.workdir, "parent"):
        dense, variables = parent(job)
    with workdir.stage(job.workdir, "experts"):
        weights = diversity.image_weights(job, dense, variables)
        specs = configuration.expert_specs(config)
        steps = config.experts.steps
        before = phase1.compress(job, dense, variables, specs, "experts", steps, weights)
    with workdir.stage(job.workdir, "gate"):
        owned = {"cluster", "classes"} & set(configuration.diversity_sources(config))
        gate = phase2.learn_gate(job, dense, variables, before, weights if owned else None)
    with workdir.stage(job.workdir, "joint"):
        made, gate = phase2.fine_tune(job, dense, variables, before, gate)
    if config.joint.refit:
        with workdir.stage(job.workdir, "refit"):
            gate = phase2.learn_gate(job, dense, variables, made, name="refit", start=gate)
    with workdir.stage(job.workdir, "controls"):
        singles = controls.singles(job, dense, variables, made, gate)
    if config.collapse.steps:
        with workdir.stage(job.workdir, "collapse"):
            singles["collapsed mixture"] = collapsed_mixture(job, made, gate)
    return Models(dense, variables, made, before, gate, singles)


def _results(job: Job) -> dict:
    config, models = job.config, make(job)
    with workdir.stage(job.workdir, "evaluation"):
        lowered = programs.lower(job, models)
        results = evaluation.evaluate(job, models, lowered)
    with workdir.stage(job.workdir, "deployment"):
        made = exporting.exported(job, models, lowered)
        pairs = config.evaluation.latency_calls
        exports = exporting.write(job, made, ["stablehlo"], pairs)
    records = training.read_records(job.workdir / "records.jsonl")
    names = list(dict.fromkeys(record["name"] for record in records))
    results["gate"]["per_epoch"] = [
        entropy
        for name, batches in (("gate", "gate"), ("joint", "joint"), ("refit", "gate"))
        for entropy in entropy_per_epoch(records, name, phase2.epoch_steps(job, batches))
    ]
    return {
        "config": configuration.flatten(config),
        "dataset": {
            "name": config.data.name,
            "num_classes": job.splits.num_classes,
            "class_names": list(job.splits.class_names),
            "sizes": {
                part: len(getattr(job.splits, part).labels)
                for part in ("train", "validation", "test")
            },
            "mean": list(job.splits.mean),
            "std": list(job.splits.std),
        },
        **results,
        "certificates": [
            {"difference": c.difference, "macs": c.macs, "parameters": c.parameters}
            for c in (expert.certificate for expert in models.made.each)
        ],
        "exports": exports,
        "history": {name: [r for r in records if r["name"] == name] for name in names},
        "environment": {
            "jax": jax.__version__,
            "flax": flax.__version__,
            "device": jax.devices()[0].device_kind,
            "python": platform.python_version(),
            "experts mapped by": models.made.method,
            "machine": core.machine(),
            **({"begun on": job.choices.moved} if job.choices.moved else {}),
        },
        "command": job.command,
        "seconds": workdir.seconds(job.workdir),
    }


def entropy_per_epoch(records: list[dict], name: str, epoch: int) -> list[float]:
    """Returns the gate's usage entropy in nats, as the mean over the steps of each epoch.

    `records` are those of a run, of which there is one for every checkpoint too, of fewer steps
    than an epoch; `epoch` is the steps of one.

    Example:
      >>> records = [{"name": "gate", "step": s, "entropy": e} for s, e in [(2, 0.9), (3, 0.6)]]
      >>> entropy_per_epoch(records, "gate", epoch=3)  # (0.9 + 0.9 + 0.6) / 3
      [0.8]
    """
    own = [record for record in records if record["name"] == name]
    steps = np.diff([0, *(record["step"] for record in own)])
    entropies = np.repeat([record["entropy"] for record in own], steps)
    starts = range(0, len(entropies), epoch)
    return [round(float(entropies[first : first + epoch].mean()), 6) for first in starts]


def _load(settings: Any) -> data.Splits:
    augmentation = ("padding", "flip", "augment")
    given = {k: v for k, v in settings.items() if k not in augmentation and v not in ("", (), 0)}
    paths = {k: str(pathlib.Path(given[k]).expanduser()) for k in PATHS if k in given}
    try:
        splits = data.load(**{**given, **paths})
        core.check_integer("padding", settings.padding, 0, min(splits.image_shape[:2]) - 1)
    except ValueError as error:
        raise ValueError(f"config.data: {error}") from error
    return splits


def _check_model(job: Job) -> None:
    """Checks what only the model can tell, on its shapes alone."""
    try:
        dense, init = network(job)
        variables = jax.eval_shape(init)
    except ValueError as error:
        raise ValueError(f"config.model: {error}") from error
    if job.config.parent.restore:
        path = pathlib.Path(job.config.parent.restore).expanduser()
        if training.Checkpoints(path).latest() is None:
            raise ValueError(
                f"config.parent.restore must be a directory with a checkpoint, got {path}"
            )
    graph = core.trace(dense.predict, variables, job.images)
    programs = set()
    for first in (False, True):
        keep = {
            g.name: np.arange(g.size) < g.size / 2 if first else np.arange(g.size) >= g.size / 2
            for g in graph.groups
        }
        masks = core.expand(keep, graph.groups, variables)
        predict, small, _ = core.shrink(dense.predict, variables, masks, job.images)
        programs.add(str(jax.make_jaxpr(predict)(small, job.images)))
    if len(programs) > 1:
        raise ValueError(
            f"config.model must give experts that keep different channels one program, got "
            f"{job.config.model.name} with shortcut {job.config.model.shortcut!r}; "
            "set config.model.shortcut='project'"
        )
