"""A report as data, and its two renderings: Markdown with PNG files, one self-contained HTML."""

import base64
import dataclasses
import io
import pathlib

import jinja2
from matplotlib.figure import Figure

from hybrid_jax import core

_DPI = 180


@dataclasses.dataclass(frozen=True)
class Table:
    """Text cells; the first column and those in `words` align left, `strong` rows stand out."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    strong: frozenset[int] = frozenset()
    words: frozenset[str] = frozenset({"kind", "note", "verdict", "platforms", "value"})


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure and the file name (without suffix) it is saved under."""

    name: str
    caption: str
    figure: Figure


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading with what follows it, in this order; a folded one is closed in HTML."""

    title: str
    text: str = ""
    table: Table | None = None
    plots: tuple[Plot, ...] = ()
    code: str = ""
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    summary: list[str]
    warnings: list[str]
    sections: list[Section]


def publish(document: Document, directory) -> pathlib.Path:
    """Write report.md, report.html and a PNG per plot into a directory, all of them or none.

    Other files in the directory are left alone. Returns the path of report.html.
    """
    directory = pathlib.Path(directory)
    images = {
        plot.name: _png(plot.figure) for section in document.sections for plot in section.plots
    }
    contents = {directory / f"{name}.png": image for name, image in images.items()}
    encoded = {name: base64.b64encode(image).decode() for name, image in images.items()}
    for name in ("report.md", "report.html"):
        template = _environment().get_template(f"{name}.jinja")
        text = template.render(document=document, images=encoded)
        contents[directory / name] = text.encode()
    core.write_atomically(contents)
    return directory / "report.html"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # No version stamp: the same results give the same bytes.
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hybrid_jax.report", ""),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = lambda text: text.replace("|", "\\|").replace("\n", " ")
    return environment
