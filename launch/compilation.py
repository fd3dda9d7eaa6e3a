"""How commands trace and compile: quickly, and into a cache from which the next one loads.

JAX finds a program by its text, its options, its versions and what the processor or accelerator can
do, so that a home directory may be shared by different machines.
"""

import ctypes
import gc
import os
import pathlib
import sys
import tempfile

import jax

from hybrid_jax import core
from hybrid_jax.core import versions

_SETTINGS = {
    "jax_enable_compilation_cache": True,
    # Of a run's hundreds of programs most are small, and together take as long as a large one.
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    # XLA's own caches put the folder into a program's key: elsewhere it would not be found.
    "jax_persistent_cache_enable_xla_caches": "none",
}

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>

_NEW_OBJECTS = 50_000
"""New objects between looks for garbage: tracing makes millions, hardly any of them garbage."""


def set_up(folder: str | None) -> None:
    """Has JAX trace and compile quickly, and keep what it compiles. To be called before it does.

    XLA_FLAGS that are set stay as they are.

    Args:
      folder: As the flag says; '' keeps nothing. None is JAX_COMPILATION_CACHE_DIR where that is
        set, and `compiled` in `core.cache_folder()` otherwise; where that cannot be written to, a
        line on stderr says so and nothing is kept.

    Raises:
      ValueError: If `folder` cannot be made or written to.
    """
    gc.set_threshold(_NEW_OBJECTS)
    _keep_memory()
    os.environ.setdefault("XLA_FLAGS", versions.QUICK_XLA)
    if folder == "":
        jax.config.update("jax_enable_compilation_cache", False)
    if folder == "" or (folder is None and jax.config.jax_compilation_cache_dir):
        return
    try:
        path = pathlib.Path(folder).expanduser() if folder else core.cache_folder() / "compiled"
        path = path.absolute()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home to expand ~ to
        if folder:
            raise ValueError(
                "--compilation_cache must be a folder that can be written to, or empty, "
                f"got {folder!r}: {error}"
            ) from None
        print(f"note: compiled programs are not kept: {error}", file=sys.stderr)
        return
    for name, value in _SETTINGS.items():
        jax.config.update(name, value)
    jax.config.update("jax_compilation_cache_dir", str(path))


def _keep_memory() -> None:
    """Has glibc keep what a step gives back, for which the kernel would clear new pages."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and sys.platform == "linux":
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
