"""Strict set-up for every test: four CPU devices, no silent promotion, shared compilations."""

import pathlib
import tempfile

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling is most of a run: what is tested is the program, not how hard XLA works on it.
jax.config.update("jax_disable_most_optimizations", True)
# Workers and later runs share what was compiled once; keyed by jax version through XLA itself.
cache = pathlib.Path(tempfile.gettempdir()) / "hybrid_jax_test_cache"
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


@pytest.fixture
def key():
    return jax.random.key(0)
