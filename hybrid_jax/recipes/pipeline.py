"""One call, from a trained network to the files that a device runs."""

import contextlib
import dataclasses
import datetime
import platform
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import numpy as np

from hybrid_jax import core, data, models, report, training
from hybrid_jax.recipes import demands, files, gate, given, rows, schema, state, within, workdir
from hybrid_jax.recipes.budget import Budget
from hybrid_jax.recipes.config import expert_specs, single_spec
from hybrid_jax.recipes.describe import describe
from hybrid_jax.recipes.efforts import EFFORTS
from hybrid_jax.recipes.sections import Config
from hybrid_jax.recipes.state import State
from hybrid_jax.recipes.task import Task


class Result(NamedTuple):
    """What a run made.

    Attributes:
      accuracy: Of the compressed network or mixture on the test images, from the file of the first
        target, or of the model where it has none; by the metric of the run.
      files: {target: path of its file}.
      report: Path of the report, one HTML file.
      results: Everything that the run made and compared, as the report tells it.
      state: What the stages made, for one's own use.
    """

    accuracy: float
    files: dict[str, core.Path]
    report: core.Path
    results: report.Results
    state: State


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run that was checked; called, it is run."""

    task: Task
    config: Config
    stages: Sequence[state.Stage]
    start: State
    command: str

    def claim(self) -> contextlib.ExitStack:
        """Makes the work directory the run's own; returns its lock, see `workdir.claim`.

        The first of several processes holds it, and all must see the directory.
        """
        task, lock = self.task, contextlib.ExitStack()
        weights = [task.network.params] if task.given else []
        weights += [task.teacher.params] if task.teacher else []
        weights += [model.params for model in task.members]
        config = schema.flatten(self.config)

        def claim() -> str:
            lock.enter_context(workdir.claim(task.workdir, config, task.splits, weights or None))
            return task.whose

        if core.of_first(claim) != task.whose:
            raise ValueError(
                f"workdir must be one that all processes see, got {task.workdir}, which process "
                f"{jax.process_index()} does not"
            )
        return lock

    def describe(self) -> str:
        """Returns what it would do."""
        task, config = self.task, self.config
        specs = {"finetune": (single_spec(config),), "mixture": expert_specs(config)}
        own = () if task.members else specs.get(config.effort, ())
        planned = {} if task.members else within.planned(task, config, own)
        limits, targets = within.limits(self.start.parent, config), config.deploy.targets
        plan = describe(self.start.parent, self.stages, limits, targets, planned)
        return f"{self._notes()}\n{plan}"

    def __call__(self) -> Result:
        """Runs what is not done yet, writes the files, and reports.

        Raises:
          ValueError: If the work directory is not the run's own.
          FloatingPointError: If a loss is not finite.
        """
        with self.claim():
            return self.finish()

    def finish(self) -> Result:
        """Does so in a directory that is claimed."""
        core.say(self._notes())
        task = self.task
        made = state.run(self.stages, self.start, task.workdir, self._source, task.whose)
        return _result(task, made, self.config, self.command)

    def finished(self) -> State:
        """Returns what the run has made; ValueError if it is not done."""
        task = self.task
        made = state.finished(self.stages, self.start, task.workdir, self._source, task.whose)
        if made is None:
            raise ValueError(
                f"{task.workdir} must hold a finished run, got stages undone: launch.compress with "
                "the same config goes on"
            )
        return made

    def _source(self, origin: str) -> models.Network:
        """The network, other than the parent, that something of this run was cut from."""
        if origin == "gate":
            count = len(self.task.members) or self.config.experts.count
            return gate.source(self.task, count, self.config.gate)
        return self.task.members[int(origin.split()[1])].cut.source

    def _notes(self) -> str:
        """What a network that was trained elsewhere must agree with, and what cannot be run."""
        splits, told = self.task.splits, self.config.data
        mean, std = (" ".join(f"{x:.4g}" for x in own) for own in (splits.mean, splits.std))
        text = f"the network takes (pixel / 255 - mean) / std, with mean {mean} and std {std}"
        if not (told.mean and told.std):
            text += "; where it was trained with others, data.mean and data.std say so"
        lacking = files.lacking(self.config.deploy.targets)
        return "\n".join([text, *demands.undivided(self.task, self.config), *lacking])


def compress(
    network: Any,
    images: Any,
    budget: Budget | None = None,
    *,
    workdir: str | core.Path,
    effort: str | Callable[[Task, Config], Sequence[Any]] | None = None,
    targets: Sequence[str] | None = None,
    config: Any = None,
    loss: Any = None,
    metric: Any = None,
    confidence: Any = None,
    training_mode: str | None = None,
    teacher: Any = None,
    members: Sequence[Result] = (),
) -> Result:
    """Compresses a network, writes it for devices, and runs every file on the test images.

    Stopped at any moment, the same call goes on where it was; on a finished run it writes files and
    report again.

    Args:
      network: What `models.take` takes: a Linen module with its variables, an NNX module, a Keras
        model, (predict, train, params), or a bare Linen module, which is trained first.
      images: What `data.take` takes: (images, labels), parts of such, an iterable of batches, which
        is read once, or `data.Splits`. The network gets (pixel / 255 - mean) / std: where it was
        trained with other than the mean and std of these training images, config.data.mean and std
        say so; config.data also says how they are resized and divided.
      budget: What it may cost; None for that of the configuration.
      workdir: Directory that is empty, absent, or holds the same run.
      effort: 'ptq', 'finetune' or 'mixture', or a function from a `Task` and the configuration to
        a list of stages; None for that of the configuration.
      targets: Of `deploy.TARGETS`; None for those of the configuration.
      config: As `default_config` returns it, changed; None for the defaults, with effort 'ptq'.
      loss: Name of an objective, or loss(outputs, labels) -> (B,); None for that of the
        configuration, which is as labels are by default.
      metric: metric(outputs, labels) -> (B,), higher is better; None for that of the objective.
      confidence: confidence(outputs) -> (B,) in [0, 1], how sure an answer is, by which a cascade
        hands on, in its files too; None for that of the objective, which regression has not.
      training_mode: Argument that puts the module in training mode; None where its name tells.
      teacher: A trained network, as `network`, that compressed ones learn from; None for `network`.
      members: Of effort 'mixture', results of runs on the same images that are its experts, of
        whatever network each was cut; () cuts them from `network`.

    Raises:
      ValueError: If anything does not fit; names it, before anything is written.
      FloatingPointError: If a loss is not finite.
    """
    if config is None:
        config, effort = schema.default_config(), effort or "ptq"
    config = given.config_of(config, budget, effort, targets)
    stages = effort if callable(effort) else EFFORTS[config.effort]
    images = given.images(images, config.data)
    return prepare(
        network,
        images,
        config,
        workdir,
        stages,
        loss=loss,
        metric=metric,
        confidence=confidence,
        mode=training_mode,
        teacher=teacher,
        members=[result.state for result in members],
    )()


def run(config: Any, path: str | core.Path, command: str = "") -> Result:
    """Runs what a configuration says, and goes on where a run of it was stopped.

    Args:
      config: As `default_config` returns it, changed.
      path: The work directory.
      command: The command line, for the report.

    Raises:
      ValueError: If anything does not fit; names it, before anything is written.
      FileNotFoundError: If data or weights are not there.
      FloatingPointError: If a loss is not finite.
    """
    return of_config(config, path, command)()


def of_config(config: Any, path: str | core.Path, command: str = "") -> Run:
    """Returns the run of a configuration, checked; arguments as of `run`. Writes nothing."""
    config = schema.read(config)
    splits = given.load(config.data)
    return _of_splits(config, splits, path, command)


def _of_splits(config: Config, splits: data.Splits, path: Any, command: str = "") -> Run:
    """The run of a configuration on the images that it says."""
    members = []
    for folder in config.mixture.members:
        own = schema.read(schema.completed(report.read(folder).config))
        given.check_same_images(folder, own.data, config.data)
        members.append(_of_splits(own, splits, folder).finished())
    return prepare(
        given.of_section("model", config.model, splits),
        splits,
        config,
        path,
        EFFORTS[config.effort],
        mode=config.model.training or None,
        teacher=given.teacher(config.teacher, splits),
        members=members,
        command=command,
    )


def prepare(
    network: Any,
    splits: data.Splits,
    config: Config,
    path: str | core.Path,
    effort: Callable[[Task, Config], Sequence[Any]],
    *,
    loss: Any = None,
    metric: Any = None,
    confidence: Any = None,
    mode: str | None = None,
    teacher: Any = None,
    members: Sequence[State] = (),
    command: str = "",
) -> Run:
    """Checks everything that can be known before training; writes nothing.

    Arguments are as of `compress`, the images as splits and members as the states of their runs.
    """
    if members and effort in (EFFORTS["ptq"], EFFORTS["finetune"]):
        raise ValueError(f"members must be given with effort 'mixture', got {config.effort!r}")
    few = jax.ShapeDtypeStruct((2, *splits.image_shape), np.float32)
    taken = given.network(network, few, mode, config.seed)
    labelled = splits.label_kind is not None
    if not labelled:
        splits = given.labelled(taken, splits)
    task = Task(
        taken,
        splits,
        core.as_path(path, "workdir"),
        given.objective(
            loss or config.loss, metric, confidence, splits, config.distillation.temperature
        ),
        given.augmentation(config.data, splits),
        config.seed,
        config.checkpoint_every,
        config.evaluation.batch_size,
        config.evaluation.part,
        None if teacher is None else given.network(teacher, few, None, 0, "teacher"),
        config.teacher.views,
        core.as_path(config.teacher.answers, "teacher.answers") if config.teacher.answers else None,
        tuple(given.member(*pair) for pair in enumerate(members)),
        given=not isinstance(network, nn.Module),
        labelled=labelled,
        devices=demands.devices(config.devices),
        precision=config.precision,
    )
    demands.divided(task, config)
    outputs = jax.eval_shape(taken.predict, taken.params, few)
    demands.outputs(outputs, splits)
    demands.alike(task, outputs)
    demands.platforms(config)
    training.check_objective(task.objective, outputs, splits.test.labels[:2])
    stages = [state.named(stage) for stage in effort(task, config)]
    return Run(task, config, stages, State(task.parent), command)


def export(path: str | core.Path, targets: Sequence[str], pairs: int = 30) -> Result:
    """Writes what a finished run of a configuration has made for other targets, and reports again.

    `pairs` is how many pairs of calls each latency is taken over.

    Raises:
      FileNotFoundError: If there is no results.json.
      ValueError: If it was changed, or something is left to be trained.
    """
    results = report.read(path)
    every = dict.fromkeys((*results.config["deploy.targets"], *targets))
    changed = {"deploy.targets": tuple(every), "evaluation.latency_calls": pairs}
    made = of_config(
        schema.read({**schema.completed(results.config), **changed}), path, results.command
    )
    with made.claim():
        made.finished()  # nothing is trained in silence
        return made.finish()


def _result(task: Task, made: State, config: Any, command: str) -> Result:
    """Evaluates what was made, writes its files, and reports: the first process does, for all."""
    found = rows.evaluate(task, made, config.gate.k)
    page = core.of_first(lambda: _report(task, made, found, config, command))
    results = report.read(task.workdir)
    own = _shipped(results.rows)
    ready = {t: task.workdir / file.artifact for t, file in own.files.items() if not file.error}
    measured = [file.accuracy for file in own.files.values() if file.accuracy is not None]
    accuracy = measured[0] if measured else own.accuracy
    return Result(accuracy, ready, core.as_path(page), results, made)


def _report(task: Task, made: State, found: rows.Evaluated, config: Any, command: str) -> str:
    """Writes the files of a run, its results and its report, and returns the path of that."""
    table = files.write(
        task,
        found.rows,
        found.shipped,
        config.deploy.targets,
        config.evaluation.latency_calls,
        config.deploy.platforms,
    )
    for line in within.above(made.parent, config, _shipped(table).files):
        core.say(line)
    records = training.read_records(task.workdir / "records.jsonl")
    results = report.Results(
        rows=tuple(table),
        metric=task.objective.metric,
        limits=within.limits(made.parent, config),
        dataset=_dataset(task.splits, config),
        layers=rows.layers(made),
        history={name: [r for r in records if r["name"] == name] for name in _names(records)},
        environment=_environment(task),
        config=schema.flatten(config),
        certificates=[dict(model.facts) for model in made.experts],
        command=command,
        seconds=made.facts.get("seconds", {}),
        **found.facts,
    )
    report.save(results, task.workdir)
    return str(report.write(results, task.workdir))


def _shipped(table: Sequence[report.Row]) -> report.Row:
    """The row of what the run was for."""
    return next((row for row in table if row.role in ("mixture", "single")), table[0])


def _dataset(splits: data.Splits, config: Any) -> dict[str, Any]:
    return {
        "name": config.data.name,
        "num_classes": splits.num_classes,
        "class_names": list(splits.class_names or ()),
        "sizes": {
            part: len(getattr(splits, part).images) for part in ("train", "validation", "test")
        },
        "mean": list(splits.mean),
        "std": list(splits.std),
    }


def _environment(task: Task) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "machine": core.machine(),
        **({"begun on": task.choices.moved} if task.choices.moved else {}),
    }


def _names(records: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(record["name"] for record in records))
