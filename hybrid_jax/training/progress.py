"""One progress bar for every long step; plain lines, seconds apart, where there is no terminal."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import rich.console
import rich.progress

from hybrid_jax import core

Item = TypeVar("Item")
_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress(name: str, total: int, start: int = 0) -> Iterator[Callable[..., None]]:
    """Shows on stderr how far a long step is: a bar, or at most a line each ten seconds.

    It yields show(done, note=''), to be called after each unit of `total`, of which `start` were
    done before; `note` is shown behind the bar. Of several processes the first one shows it.
    """
    if not core.is_first():
        yield lambda done, note="": None
        return
    console = rich.console.Console(file=sys.stderr)
    live = console.is_terminal and not console.is_dumb_terminal
    with _bar(console, name, total, start) if live else _lines(name, total, start) as show:
        yield show


def track(items: Iterable[Item], name: str, total: int | None = None) -> Iterator[Item]:
    """Passes `items` on, and shows progress while they are used; `total` may be left to `len`."""
    with progress(name, len(items) if total is None else total) as show:
        for done, item in enumerate(items, 1):
            yield item
            show(done)


@contextlib.contextmanager
def _bar(
    console: rich.console.Console, name: str, total: int, start: int
) -> Iterator[Callable[..., None]]:
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
        rich.progress.TextColumn("{task.fields[note]}"),
    )
    with rich.progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=total, completed=start, note="")

        def show(done: int, note: str = "") -> None:
            bar.update(task, completed=done, **({"note": note} if note else {}))

        yield show


@contextlib.contextmanager
def _lines(name: str, total: int, start: int) -> Iterator[Callable[..., None]]:
    began = time.monotonic()
    printed = began
    latest = ""

    def show(done: int, note: str = "") -> None:
        nonlocal printed, latest
        latest = note or latest
        now = time.monotonic()
        if done >= total or now - printed >= _SECONDS_BETWEEN_LINES:
            printed = now
            line = f"{name}: {done}/{total}, {now - began:.0f} s  {latest}"
            core.say(line.rstrip())

    yield show
