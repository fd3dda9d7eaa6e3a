"""A report as data, and its two renderings: Markdown with PNG files, one self-contained HTML."""

import base64
import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

import jinja2
import rich.box
import rich.table
import rich.text
from matplotlib.figure import Figure

from hybrid_jax import core
from hybrid_jax.report.formatting import MISSING

_DPI = 190
_PIXELS = 97  # of an inch on the page


@dataclasses.dataclass(frozen=True)
class Table:
    """Text cells; the first column and those in `words` align left, `strong` rows stand out."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    strong: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        """Whether there is a line."""
        return bool(self.rows)

    words: ClassVar = {
        "model",
        "role",
        "target",
        "note",
        "verdict",
        "value",
        "taken for",
        "meaning",
    }

    @classmethod
    def of(cls, items: Iterable, columns: Mapping[str, Callable], strong=lambda item: False):
        """A line for each item, a column for each function of it that says anything.

        Example:
            >>> Table.of([3, 4], {'n': str, 'square': lambda n: str(n * n), 'note': lambda n: ''})
            Table(header=('n', 'square'), rows=[('3', '9'), ('4', '16')], strong=frozenset())
        """
        items = list(items)
        cells = {name: [write(item) for item in items] for name, write in columns.items()}
        shown = {name: own for name, own in cells.items() if set(own) - {"", MISSING}}
        marked = frozenset(i for i, item in enumerate(items) if strong(item))
        return cls(tuple(shown), list(zip(*shown.values(), strict=True)), marked)


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure and the file name (without suffix) it is saved under."""

    name: str
    caption: str
    figure: Figure

    @property
    def width(self) -> int:
        """Pixels on the page, at which the text of all plots has one size."""
        return round(_PIXELS * self.figure.get_figwidth())


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading with what follows it, in this order; a folded one is closed in HTML.

    `text` are its paragraphs.
    """

    title: str
    text: tuple[str, ...] = ()
    table: Table | None = None
    plots: tuple[Plot, ...] = ()
    code: str = ""
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    subtitle: str
    summary: list[str]
    warnings: list[str]
    sections: list[Section]


def publish(document: Document, directory) -> core.Path:
    """Write report.md, report.html and a PNG per plot into a directory, all of them or none.

    Other files in the directory are left alone. Returns the path of report.html.
    """
    directory = core.as_path(directory)
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


def for_terminal(table: Table) -> rich.table.Table:
    """The table as rich prints it."""
    made = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for column, name in enumerate(table.header):
        left = column == 0 or name in table.words
        made.add_column(name, justify="left" if left else "right", overflow="fold")
    for i, row in enumerate(table.rows):
        # As text: a name in brackets is no markup.
        made.add_row(*map(rich.text.Text, row), style="bold" if i in table.strong else None)
    return made


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
