"""Where on a machine is kept what later runs need not find out again."""

import os
import pathlib


def cache_folder() -> pathlib.Path:
    """Returns the folder of compiled programs and measured choices; it need not exist yet.

    It is what the environment variable HYBRID_JAX_CACHE says, otherwise hybrid_jax in the user's
    own cache: in XDG_CACHE_HOME, or in ~/.cache. Nothing is lost but time when it is deleted.

    Source: XDG Base Directory Specification, which has relative paths passed over.

    Example:
      >>> import unittest.mock
      >>> with unittest.mock.patch.dict(os.environ, HYBRID_JAX_CACHE='/scratch/mine'):
      ...     cache_folder().as_posix()
      '/scratch/mine'
    """
    if own := os.environ.get("HYBRID_JAX_CACHE"):
        return pathlib.Path(own).expanduser()
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (
        caches if caches.is_absolute() else pathlib.Path("~/.cache").expanduser()
    ) / "hybrid_jax"
