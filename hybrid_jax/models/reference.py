"""A network that is named by the function that makes it, in a file or in a package."""

import contextlib
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from hybrid_jax.models.given import kind, one_line


def make(reference: str) -> Any:
    """Calls the function that 'FILE.py:FUNCTION' or 'package.module:function' names.

    It takes no arguments and returns what `take` takes. A file finds the modules beside it, as a
    script does, and a package may be in the working directory. What fails is a one-line ValueError.
    """
    place, _, name = reference.rpartition(":")

    def fault(expected: str, got: str) -> ValueError:
        return ValueError(f"model.make {reference!r} must {expected}, got {got}")

    if not place or not name:
        raise fault("be FILE.py:FUNCTION or package.module:function", "no function")
    file = pathlib.Path(place) if place.endswith(".py") else None
    if file and not file.is_file():
        raise fault("name a file", "none of that name")
    with _importing_from(file.parent if file else pathlib.Path()):
        try:
            module = _loaded(file) if file else importlib.import_module(place)
        except Exception as error:
            raise fault("name what can be imported", one_line(error)) from error
        if not callable(getattr(module, name, None)):
            raise fault(f"name a function of {place}", f"none called {name!r}")
        try:
            given = getattr(module, name)()
        except Exception as error:
            raise fault("name a function that runs without arguments", one_line(error)) from error
    try:
        kind(given)
    except TypeError as error:
        raise fault("return a network", str(error).partition(", got ")[2]) from error
    return given


def _loaded(file: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{file.stem} in {file.parent.resolve()}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses, as Linen modules are, look for it
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _importing_from(folder: pathlib.Path) -> Iterator[None]:
    path = str(folder.resolve())
    sys.path.insert(0, path)
    try:
        yield
    finally:
        sys.path.remove(path)
