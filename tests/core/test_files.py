import errno
import os

import pytest

from hybrid_jax import core


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_are_written_with_their_folders_and_nothing_beside_them(tmp_path):
    core.write_atomically({tmp_path / "new" / "a": b"one", tmp_path / "new" / "b": b""})
    core.write_json(tmp_path / "new" / "c", {"x": [1, None]})
    text = b'{\n "x": [\n  1,\n  null\n ]\n}\n'
    assert contents(tmp_path / "new") == {"a": b"one", "b": b"", "c": text}


@pytest.mark.parametrize("full_at", [0, 1])
def test_with_a_full_disk_all_old_files_stay(tmp_path, monkeypatch, full_at):
    core.write_atomically({tmp_path / "a": b"old", tmp_path / "b": b"old"})
    synced = []

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) > full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            core.write_atomically({tmp_path / "a": b"newer", tmp_path / "b": b"newer"})
    assert contents(tmp_path) == {"a": b"old", "b": b"old"}


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    core.write_json(tmp_path / "a", 1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        core.write_json(tmp_path / "a", {1, 2})
    assert contents(tmp_path) == {"a": b"1\n"}
