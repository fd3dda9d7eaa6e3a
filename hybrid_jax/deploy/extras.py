"""Modules that only one target needs, and that an extra of the package brings."""

import importlib
from typing import Any


def require(name: str, extra: str) -> Any:
    """Imports an optional module.

    Raises:
      ImportError: If it is not there, with the extra that it comes with.

    Example:
      >>> require('no_such_module', 'onnx')
      Traceback (most recent call last):
      ...
      ImportError: no_such_module is not installed; `pip install 'hybrid_jax[onnx]'` brings it
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is not installed; `pip install 'hybrid_jax[{extra}]'` brings it"
        ) from error
