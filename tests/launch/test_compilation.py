"""Commands keep what they compile where they are told to, and say what is wrong with a folder."""

import gc
import os
import pathlib

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from jax.experimental.compilation_cache import compilation_cache

from hybrid_jax import core
from hybrid_jax.core import versions
from launch import compilation, compress, export
from launch.command import define_cache


@pytest.fixture
def settings(monkeypatch):
    """JAX as it is without a cache, Python as it is; what a test sets is undone."""
    threshold = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    monkeypatch.setenv("XLA_FLAGS", "")
    names = [*compilation._SETTINGS, "jax_compilation_cache_dir"]
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    gc.set_threshold(*threshold)


def kept(folder):
    return len(list(folder.glob("*-cache")))


def test_a_program_is_kept_and_found_again(settings, tmp_path):
    compilation.set_up(str(tmp_path / "new" / "cache"))
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    for _ in range(2):
        jax.clear_caches()
        assert jax.jit(lambda x: x * 17 + 3)(jnp.int32(2)) == 37
    assert kept(tmp_path / "new" / "cache") > 0
    assert "/jax/compilation_cache/cache_hits" in events


def test_tracing_does_not_wait_for_garbage(settings):
    """Python's own threshold would interrupt it some sixty times."""
    compilation.set_up("")
    looks = []
    look = lambda phase, info: looks.append(phase)  # noqa: E731
    gc.callbacks.append(look)
    jax.make_jaxpr(lambda x: [jnp.exp(x * i) for i in range(2000)])(1.0)
    gc.callbacks.remove(look)
    assert looks.count("start") < 20


def test_the_default_is_the_users_cache_folder(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_JAX_CACHE", str(tmp_path))
    compilation.set_up(None)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
    # What the user has told JAX stands.
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    compilation.set_up(None)
    assert jax.config.jax_compilation_cache_dir == "/elsewhere"


def test_empty_keeps_nothing(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_JAX_CACHE", str(tmp_path))
    compilation.set_up("")
    assert jax.jit(lambda x: x * 19 + 3)(jnp.int32(2)) == 41
    assert list(tmp_path.iterdir()) == []


def test_a_bad_folder(settings, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    bad = str(tmp_path / "file" / "cache")
    for command in (compress, export):
        given = ["--config=configs/digits.py"] if command is compress else ["--target=c"]
        given += [f"--workdir={tmp_path}/run", f"--compilation_cache={bad}"]
        assert command.cli([command.__name__, *given]) == 2
        line = capsys.readouterr().err
        expected = "error: --compilation_cache must be a folder that can be written to, or empty, "
        assert line.startswith(f"{expected}got '{bad}': ")
        assert not (tmp_path / "run").exists()
    # By default it is no error, and the run goes on.
    monkeypatch.setenv("HYBRID_JAX_CACHE", bad)
    compilation.set_up(None)
    assert capsys.readouterr().err.startswith("note: compiled programs are not kept: ")
    assert jax.config.jax_compilation_cache_dir is None


def test_xla_flags_of_the_user_stand(settings, monkeypatch):
    compilation.set_up("")
    assert os.environ["XLA_FLAGS"] == ""
    monkeypatch.delenv("XLA_FLAGS")
    compilation.set_up("")
    assert os.environ["XLA_FLAGS"] == versions.QUICK_XLA


def test_the_flag():
    values = flags.FlagValues()
    define_cache(values)
    values(["command"])
    assert values.compilation_cache is None
    values(["command", "--compilation_cache="])
    assert values.compilation_cache == ""


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"HYBRID_JAX_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"HYBRID_JAX_CACHE": "~/a"}, "/home/me/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/hybrid_jax"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/hybrid_jax"),
        ({}, "/home/me/.cache/hybrid_jax"),
    ],
)
def test_the_cache_folder(variables, folder, monkeypatch):
    for name in ("HYBRID_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert core.cache_folder() == pathlib.Path(folder)
