"""The report of a run: what to ship and why, what could be shipped, then what a specialist asks."""

import json
import sys
from collections.abc import Mapping

import rich.console

from hybrid_jax import core
from hybrid_jax.report import choice, details, shipping, warnings
from hybrid_jax.report.document import Document, Section, Table, for_terminal, publish
from hybrid_jax.report.formatting import duration
from hybrid_jax.report.rows import Results

WORDS = {
    "parent": "the trained network that was given, in floats; in int8 it is not trained again",
    "expert": "one of the small networks of a mixture",
    "mixture": "several experts: a gate, or how sure the first is, decides what runs for an image",
    "control": "a model to compare with: a mixture that does not beat it buys nothing",
    "bound": "no model: a gate that chooses blindly, and the oracle, which reads the label",
    "covers": "the gate's place between the two bounds: 0 % is blind, 100 % always right",
    "Δ": "difference to the parent; of an accuracy in percentage points",
    "× parent": "time divided by the parent's in the same runtime; its quartiles are the noise",
    "RAM": "bytes of activations at their peak, or what the file says that it takes",
    "MACs": "multiply-accumulates of one image; of a mixture on average over the images",
    "worst": "MACs of the image that takes most",
    "BOPs": "MACs × bits of weights × bits of activations",
    "within chance": "McNemar's exact test on the same test images finds p of 0.05 or more",
    "nats": "unit of entropy; even use of E experts is ln E, use of one expert is 0",
    "same top-1": "share of the test images on which file and model name the same class",
    "kB": "1000 bytes",
}


def write(results: Results | Mapping, directory) -> core.Path:
    """Write the report of one run: report.md, report.html and the plots as PNG.

    What is missing in `results` is shown as a dash, and a section with nothing in it is left out.
    The directory is made where it does not exist; files are replaced atomically.

    Returns:
        The path of report.html, one file with everything inside.

    Example:
        >>> import tempfile
        >>> rows = [{'name': 'net', 'role': 'parent', 'accuracy': 0.9}]
        >>> write({'rows': rows}, tempfile.mkdtemp()).name
        'report.html'
    """
    return publish(describe(_typed(results)), directory)


def show(results: Results | Mapping, console: rich.console.Console | None = None) -> None:
    """Print what to ship, and the table of what could be shipped, to the terminal."""
    results = _typed(results)
    console = console or rich.console.Console(width=None if sys.stdout.isatty() else 160)
    for sentence in shipping.headline(results):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    table = shipping.table(results)
    if table:
        console.print(for_terminal(table))


def describe(results: Results) -> Document:
    """The report of one run, or of the average of several, as a Document."""
    sections = [
        _shipping(results),
        details.confusion(results),
        details.models(results),
        details.rivals(results),
        details.files(results),
        details.gate(results),
        details.layers(results),
        details.training(results),
        Section("Words", (), Table(("word", "meaning"), list(WORDS.items()))),
        _run(results),
    ]
    name = results.dataset.get("name")
    return Document(
        title=f"Compression report: {name}" if name else "Compression report",
        subtitle=_subtitle(results),
        summary=shipping.headline(results),
        warnings=warnings.of(results),
        sections=[own for own in sections if own.table or own.plots or own.code],
    )


def _typed(results):
    return results if isinstance(results, Results) else Results.from_json(results)


def _subtitle(results):
    """Test images, machine, date and versions in a line."""
    sizes = results.dataset.get("sizes") or {}
    facts = [f"{sizes['test']:,} test images"] if "test" in sizes else []
    return " · ".join(facts + [f"{k} {v}" for k, v in results.environment.items()])


def _shipping(results) -> Section:
    found = choice.candidates(results)
    target = next(iter(choice.choose(results)), found[0].target if found else "")
    shown = [
        (c.row, c.file, c.file.accuracy or c.row.accuracy) for c in found if c.target == target
    ]
    text = (
        "Each line is a file as it ran in its target's runtime, on one thread, on the test images: "
        "accuracy and time are the file's. Time is that of one image; below 1 × parent is faster "
        "than the parent's float file in the same runtime, with quartiles in brackets. In bold is "
        "what to ship."
    )
    costs = {
        "bytes": (f"size of the {target} file", "B", lambda file: file.bytes),
        "time": (f"time of the {target} file", "s", lambda file: (file.milliseconds or 0) / 1e3),
    }
    plotted = [
        details.tradeoff(name, label, unit, results.metric, [(r, cost(f), a) for r, f, a in shown])
        for name, (label, unit, cost) in costs.items()
    ]
    return Section("What can be shipped", (text,), shipping.table(results), details.drawn(*plotted))


def _run(results) -> Section:
    sizes = results.dataset.get("sizes") or {}
    facts = [(f"images, {split}", f"{size:,}") for split, size in sizes.items()]
    facts += [(f"time, {stage}", duration(own)) for stage, own in results.seconds.items()]
    config = json.dumps(results.config, indent=2, default=str) if results.config else ""
    code = f"{results.command}\n\n{config}".strip()
    return Section("This run", (), Table(("fact", "value"), facts), code=code, folded=True)
