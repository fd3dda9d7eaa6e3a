"""What was written for devices, in the report: how exact, how small and how fast each file is."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybrid_jax.report.document import Section, Table
from hybrid_jax.report.formatting import MISSING, listing, percent, si, times

AGREEMENT = 0.995
_TEXT = (
    "Each file, in deploy/, was run in its target's runtime, on one thread, on the test images. "
    "Difference and same top-1 compare its outputs with the model that was evaluated. Size is the "
    "file's; of C, which is text, that of its constants in flash. Kernel bits are those in which "
    "the file holds kernels: 8 also for kernels of fewer where the runtime has no integer kernels "
    "of these. Size and times are relative to the dense network in floats, in the same runtime and "
    "the same run: below 1 is smaller or faster. A row in bold is larger or slower."
)
_INPUT = " All files take float32 images, (pixel / 255 − mean) / deviation, with {}."
_HEADER = (
    "target", "model", "same top-1", "largest difference", "kernel bits", "size", "relative size",
    "p50, batch 1", "p95, batch 1", "batch 1", "p50, batch 32", "batch 32", "note",
)  # fmt: skip


def section(records: Sequence[dict], dataset: Mapping[str, Any] | None = None) -> Section | None:
    """The table of what was written for devices, or None if that was nothing.

    `records` are 'exports' of `results.json`; the 'mean' and 'std' in its `dataset` say what the
    files take.
    """
    if not records:
        return None
    rows = [_row(record) for record in records]
    strong = frozenset(i for i, record in enumerate(records) if _drawbacks(record))
    text = _TEXT
    if dataset and "mean" in dataset:
        ends = (
            f"{name} {listing(f'{value:.6g}' for value in dataset[key])}"
            for key, name in (("mean", "mean"), ("std", "deviation"))
        )
        text += _INPUT.format(" and ".join(ends))
    return Section("Exports", text, Table(_HEADER, rows, strong))


def warnings(records: Sequence[dict]) -> Iterator[str]:
    """A sentence for each file that is missing, wrong, or larger or slower than the dense one."""
    for record in records:
        file = f"{record['target']} file of the {record['model']}"
        if "error" in record:
            yield f"There is no {file}: {record['error']}"
            continue
        if record["agreement"] < AGREEMENT:
            yield (
                f"The {file} agrees with the model on only {percent(record['agreement'])} of the "
                "test images"
            )
        if drawbacks := _drawbacks(record):
            yield f"The {file} is {' and '.join(drawbacks)}"


def describe(record: dict) -> str:
    """One line on one file, for the terminal."""
    name = f"{record['target']}, {record['model']}"
    if "error" in record:
        return f"{name}: not written: {record['error']}"
    facts = [
        si(record["bytes"], "B"),
        f"kernels of {_bits(record)} bits",
        f"{percent(record['agreement'])} same top-1",
        f"largest difference {record['max_difference']:.2g}",
        *(f"{t['ratio']:.2f}× at batch {b}" for b, t in record["latency"].items()),
        *(f"{key} {si(value, 'B')}" for key, value in (record.get("memory") or {}).items()),
    ]
    drawbacks = _drawbacks(record)
    warning = f"; **{' and '.join(drawbacks)}**" if drawbacks else ""
    return f"{name}: {', '.join(facts)} (relative to {record['reference']}){warning}"


def _bits(record):
    return ", ".join(map(str, record.get("kernel_bits") or ())) or MISSING


def _drawbacks(record):
    if "error" in record or record["model"] == record.get("reference"):
        return []
    found = [f"larger than {record['reference']}"] if record["larger"] else []
    slower = ", ".join(map(str, record["slower"]))
    return found + ([f"slower than {record['reference']} at batch {slower}"] if slower else [])


def _row(record):
    if "error" in record:
        return (record["target"], record["model"], *[MISSING] * (len(_HEADER) - 3), record["error"])
    one, many = (_times(record["latency"].get(batch)) for batch in ("1", "32"))
    memory = record.get("memory") or {}
    notes = [f"{key} {si(value, 'B')}" for key, value in memory.items()]
    if record["reference"] != "dense":
        notes.append(f"relative to the {record['reference']}")
    return (
        record["target"],
        record["model"],
        percent(record["agreement"]),
        f"{record['max_difference']:.2g}",
        _bits(record),
        si(record["bytes"], "B"),
        times(record["bytes"] / record["reference_bytes"]),
        *one,
        many[0],
        many[2],
        "; ".join(notes),
    )


def _times(latency):
    """p50, p95 and ratio."""
    if latency is None:
        return (MISSING,) * 3
    return (*(f"{1e3 * latency[key]:.3g} ms" for key in ("p50", "p95")), times(latency["ratio"]))
