"""What a run found, typed: a row for each model, a file of it for each target; to and from JSON."""

import dataclasses
import json
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from hybrid_jax import core

# What a row is in a run; the first five can be shipped.
ROLES = ("parent", "parent_int8", "single", "expert", "mixture", "control", "bound")
SHIPPED = ROLES[:5]
Number = float | None


class Mean(float):
    """The mean of a number over several runs, which keeps the numbers as `values`.

    Example:
        >>> accuracy = Mean((0.90, 0.92))
        >>> round(accuracy, 4), round(accuracy.std, 4)
        (0.91, 0.0141)
    """

    values: tuple[float, ...]

    def __new__(cls, values: Sequence[float]):
        """Takes the numbers, one a run."""
        # Exact where all are the same: their sum divided may differ in the last bit.
        same = len(set(values)) == 1
        mean = super().__new__(cls, values[0] if same else np.mean(values))
        mean.values = tuple(values)
        return mean

    @property
    def std(self) -> Number:
        """The sample standard deviation (ddof = 1); None of one run."""
        if len(self.values) < 2:
            return None
        return 0.0 if len(set(self.values)) == 1 else float(np.std(self.values, ddof=1))


@dataclasses.dataclass(frozen=True)
class File:
    """A file that was written for a target, and what it did in its runtime on the test images.

    Attributes:
        artifact: Its path in the run.
        bytes: Its size; of C, which is text, that of its constants in flash.
        accuracy: Of the file, by the metric of the results; None where it was not run.
        images: How many of the test images that is of.
        agreement: Share of the test images on which it has the top-1 class of its model.
        max_difference: Largest absolute difference of an output from its model's.
        milliseconds: Median time of one call at batch 1.
        milliseconds_quartiles: 25 and 75 % of it.
        ratio: That time divided by the time of the parent's float file in the same runtime.
        ratio_quartiles: 25 and 75 % of the ratio over pairs of calls: its noise.
        flash: Bytes that it takes in the flash of a device, where known.
        ram: Bytes of memory that it takes to run, where known.
        kernel_bits: In which it holds kernels.
        error: Why it could not be written or run; empty where it could.
    """

    artifact: str
    bytes: Number = None
    accuracy: Number = None
    images: Number = None
    agreement: Number = None
    max_difference: Number = None
    milliseconds: Number = None
    milliseconds_quartiles: tuple[float, float] | None = None
    ratio: Number = None
    ratio_quartiles: tuple[float, float] | None = None
    flash: Number = None
    ram: Number = None
    kernel_bits: tuple[int, ...] = ()
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """A model of a run, on the test images.

    Attributes:
        name: Its own among the rows.
        role: One of `ROLES`.
        accuracy: Of the model, by the metric of the results; higher is better.
        correct: (n,) of 0 and 1, or a score for each image, higher is better; (runs, n) of several
            runs. None where it is not known.
        parameters_total: Of all that is stored.
        parameters_active: Of what runs for one image.
        macs: Of one image; of a mixture on average.
        macs_worst: Of the dearest image, where that differs.
        bops: MACs × bits of weights × bits of activations.
        memory: Bytes of activations at their peak.
        note: A few words on how it was made.
        files: {target: File}.
        rival: A row that the mixture, or the single network, has to beat; a parent always is.
        equal: In what a control equals the mixture.

    Example:
        >>> row = Row('cut', 'single', 0.97, files={'onnx': File('deploy/cut.onnx', bytes=9000)})
        >>> Row.from_json(row.to_json()) == row
        True
    """

    name: str
    role: str
    accuracy: Number
    correct: Sequence | None = None
    parameters_total: Number = None
    parameters_active: Number = None
    macs: Number = None
    macs_worst: Number = None
    bops: Number = None
    memory: Number = None
    note: str = ""
    files: Mapping[str, File] = dataclasses.field(default_factory=dict)
    rival: bool = False
    equal: Literal["bytes", "bops"] | None = None

    def __post_init__(self):
        """Refuses a role or an equality that there is not."""
        core.check_choice(f"role of row {self.name!r}", self.role, ROLES)
        if self.equal is not None:
            core.check_choice(f"equal of row {self.name!r}", self.equal, ("bytes", "bops"))

    def to_json(self) -> dict[str, Any]:
        """The row as a dictionary that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str = "row") -> "Row":
        """The row of such a dictionary; ValueError, which names `where`, if it is another one."""
        row = _make(cls, where, value)
        files = {
            target: _make(File, f"{where}.files[{target!r}]", file)
            for target, file in row.files.items()
        }
        return dataclasses.replace(row, files=files)


@dataclasses.dataclass(frozen=True)
class Results:
    """What `results.json` of a run holds; everything but the rows may be absent.

    Attributes:
        rows: Every model; names are their own.
        metric: What accuracy is; shown in per cent where it is "accuracy".
        allowed_loss: How much of the parent's accuracy a file may lose and be shipped: a fraction
            of the images for "accuracy", of the parent's own value for another metric.
        limits: {'bytes', 'memory', 'macs', 'bops' or 'latency', as a part of the parent's: the most
            that a file may cost}; {} without a budget.
        confusion: {name of a row: N×N counts of test images, by true class (down) and answer}.
        dataset: `name`, `class_names`, `sizes` {split: images}, `mean` and `std` of the input.
        gate: `usage` (N, E), `share` (E,), and `per_epoch`, its usage entropy in nats.
        disagreement: (E, E) shares of the test images.
        layers: {model, site, width, dense_width, sparsity, weight_bits, activation_bits} each.
        history: {stage: records of `step`, `loss` and `accuracy`, each a number or one an expert}.
        environment: Facts on machine, date and versions.
        config: That of the run.
        certificates: How far each cut network is from the masked parent.
        command: The command line.
        seconds: {stage: seconds}.
    """

    rows: tuple[Row, ...]
    metric: str = "accuracy"
    allowed_loss: float = 0.01
    limits: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    confusion: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dataset: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gate: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    disagreement: Sequence = ()
    layers: Sequence = ()
    history: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    certificates: Sequence = ()
    command: str = ""
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str = "results") -> "Results":
        """The results of what `results.json` holds; ValueError, which names `where`, if not."""
        made = _make(cls, where, value)
        rows = [Row.from_json(row, f"{where}.rows[{i}]") for i, row in enumerate(made.rows)]
        if not rows:
            raise ValueError(f"{where}.rows must hold at least one row, got none")
        names = [row.name for row in rows]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{where}.rows must have names of their own, got {twice[0]!r} twice")
        return dataclasses.replace(made, rows=tuple(rows))

    def of(self, *roles: str) -> list[Row]:
        """The rows of these roles that have an accuracy."""
        return [row for row in self.rows if row.role in roles and row.accuracy is not None]

    def first(self, *roles: str) -> Row | None:
        """The first of them."""
        return next(iter(self.of(*roles)), None)


def save(results: Results, workdir: str | os.PathLike) -> None:
    """Writes results.json, with its own sha256: numbers that are changed later are not believed."""
    core.write_sealed(core.as_path(workdir) / "results.json", dataclasses.asdict(results))


def read(workdir: str | os.PathLike) -> Results:
    """The results of a run.

    Raises:
        FileNotFoundError: If the directory has no results.json.
        ValueError: If it is not as it was written, or its keys are others.
    """
    path = core.as_path(workdir) / "results.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"workdir must hold the results.json of a finished run, got {str(workdir)!r} without"
        )
    try:
        value = json.loads(path.read_bytes())
        # Results of an earlier version have no digest.
        value = core.unseal(value) if "sha256" in value or "rows" not in value else value
    except (ValueError, TypeError, RecursionError) as error:
        raise core.Damaged(
            f"{path} must be as it was written, got: {error}; the command of the run writes it "
            "again"
        ) from None
    return Results.from_json(value, str(path))


def finite(value: Any) -> Number:
    """The value if it is a finite number, otherwise None."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return value if real and math.isfinite(value) else None


def difference(a: Number, b: Number) -> Number:
    """The value a − b, paired run by run where both are means; None where one is missing."""
    if a is None or b is None:
        return None
    if isinstance(a, Mean) and isinstance(b, Mean):
        return Mean([x - y for x, y in zip(a.values, b.values, strict=True)])
    return a - b


def _make(cls, where: str, value: Any):
    """An instance of a dataclass of what JSON holds, which has no other keys than its fields."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be an object, got {type(value).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    absent = dataclasses.MISSING
    needed = {n for n, f in fields.items() if f.default is absent and f.default_factory is absent}
    odd = [f"{key!r}" for key in value if key not in fields]
    odd += [f"no {key!r}" for key in sorted(needed - set(value))]
    if odd:
        raise ValueError(
            f"{where} must have the keys {', '.join(fields)}, got {', '.join(odd)}: "
            "a run of another version of hybrid_jax has to be made anew"
        )
    given = {}
    for name, own in value.items():
        if fields[name].type == Number:
            if own is not None and (isinstance(own, bool) or not isinstance(own, numbers.Real)):
                raise ValueError(f"{where}.{name} must be a number, got {own!r}")
            own = finite(own)
        if own is not None or name in needed:
            given[name] = tuple(own) if isinstance(own, list) else own
    return cls(**given)
