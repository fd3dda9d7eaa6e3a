"""Modules that only one target needs, and that an extra of the package brings."""

import importlib
from typing import Any


def require(name: str, extra: str) -> Any:
    """Imports an optional module, or raises ImportError with the extra that it comes with."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is not installed; `pip install 'hybrid_jax[{extra}]'` brings it"
        ) from error
