"""A run whose directory is in a bucket: stopped, damaged and gone on with, as on a disk.

Once with a folder that does no more than a bucket does, and where gcsfs and gcp-storage-emulator
are installed once more with what a user has: gcsfs, and TensorStore's own client.
"""

import contextlib
import importlib.util
import io
import itertools
import json
import logging
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import jax
import pytest
from etils import epath
from etils.epath import backend, gpath
from orbax.checkpoint._src.path import gcs_utils

from hybrid_jax import core, data, report, training
from tests.recipes.short import go_on, prepared, records_of, same, trained, weights


class Bucket(type(backend.os_backend)):
    """Files of gs:// in a folder: each appears when it is closed; none is moved or appended to.

    A folder is there as long as something is in it. Many are renamed file by file.
    """

    def __init__(self, root):
        self.root = root

    def here(self, path):
        return self.root / os.fspath(path).removeprefix("gs://")

    def __getattribute__(self, name):
        own = super().__getattribute__(name)
        if name not in ("exists", "isdir", "listdir", "rmtree", "remove", "stat"):
            return own
        return lambda path, *args, **options: own(self.here(path), *args, **options)

    def open(self, path, mode):
        file = self.binary(path, mode)
        return file if "b" in mode else io.TextIOWrapper(file)

    def binary(self, path, mode):
        file = self.here(path)
        if "r" in mode:
            return file.open("rb")
        assert "w" in mode, f"a bucket cannot open {path} as {mode}"

        class Written(io.BytesIO):
            def close(self):
                if not self.closed:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(self.getvalue())
                super().close()

        return Written()

    def makedirs(self, path, **options):
        pass

    mkdir = makedirs

    def there(self, file):
        return f"gs://{pathlib.Path(file).relative_to(self.root)}"

    def walk(self, top, **options):
        return ((self.there(root), *rest) for root, *rest in os.walk(self.here(top)))

    def glob(self, path):
        return list(map(self.there, super().glob(str(self.here(path)))))

    def rename(self, path, dst):
        assert self.isdir(path), f"a bucket cannot move {path}"
        shutil.copytree(self.here(path), self.here(dst))
        self.rmtree(path)

    def replace(self, path, dst):
        raise AssertionError(f"a bucket cannot move {path}")

    copy = replace


@contextlib.contextmanager
def emulated(monkeypatch):
    """Google's storage as gcp-storage-emulator speaks it, in a process of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, f"http://localhost:{port}")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "test")
    logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it asks whose bucket it is
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", f"--port={port}"]
    command += ["--in-memory", "--default-bucket=bucket"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ) as server:
        try:
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("localhost", port)):
                    break
                time.sleep(0.1)
            yield
        finally:
            server.terminate()


needed = all(map(importlib.util.find_spec, ("gcsfs", "gcp_storage_emulator")))
EMULATED = pytest.param(
    "emulator",
    marks=[pytest.mark.slow, pytest.mark.skipif(not needed, reason="no gcsfs, or no emulator")],
)


@pytest.fixture(params=["folder", EMULATED])
def bucket(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if request.param == "emulator":
        with emulated(monkeypatch):
            yield core.as_path("gs://bucket")
    else:
        own = Bucket(tmp_path / "buckets")
        monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", own)
        monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
        monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
        monkeypatch.setattr(
            gcs_utils,
            "get_kvstore_for_gcs",
            lambda path: {"driver": "file", "path": f"{own.here(path)}/"},
        )
        yield core.as_path("gs://bucket")
    assert not (tmp_path / "gs:").exists()  # what takes it for a path of this machine makes that


def stopped(run, monkeypatch, at):
    """Runs it up to the batch `at`."""
    given, asked = data.batches, itertools.count()

    def batches(*args, **options):
        for batch in given(*args, **options):
            if next(asked) == at:
                raise InterruptedError
            yield batch

    with monkeypatch.context() as patched:
        patched.setattr(data, "batches", batches)
        with pytest.raises(InterruptedError):
            run()


def test_a_run_in_a_bucket(bucket, tmp_path, monkeypatch, capsys):
    """It is stopped after step 4 of its second stage, whose checkpoint is then damaged.

    Batches are 6 of the parent, 8 of calibration, and those of the stage.
    """
    here = prepared(tmp_path / "run")
    with here.claim():
        expected = jax.device_get(weights(trained(here)))
    path = bucket / "runs" / "first"
    stopped(prepared(path), monkeypatch, at=18)
    said = capsys.readouterr().err
    assert f"a bucket has no lock: that no other run works in {path} is yours to see to" in said
    checkpoints = path / "checkpoints" / "experts"
    assert sorted(own.name for own in checkpoints.iterdir()) == ["2", "4"]
    for file in (checkpoints / "4" / "arrays" / "d").iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    made = prepared(path)()
    assert "it is now 4.damaged, and training goes on from step 2" in capsys.readouterr().err
    same(weights(made.state), expected)
    assert records_of(path) == records_of(tmp_path / "run")
    assert report.read(path) == made.results
    assert made.report.read_bytes().startswith(b"<!DOCTYPE html>")
    assert json.loads((path / "deploy" / "input.json").read_bytes())["shape"] == [4, 4, 1]
    assert made.files["packed"].read_bytes()
    assert (path / "parent.safetensors").exists()

    last = sorted((path / "stages").iterdir())[-1]
    last.write_bytes(last.read_bytes()[:-1])
    same(weights(go_on(prepared(path))[0]), expected)
    with pytest.raises(ValueError, match="workdir must be empty or hold a run of the same config"):
        prepared(path, seed=1).claim()


def test_records_in_a_bucket(bucket):
    path = bucket / "records.jsonl"
    for step in (1, 2, 3):
        training.write_record(path, {"name": "a", "step": step})
    training.records.drop_records(path, "a", after=2)
    assert [own["step"] for own in training.read_records(path)] == [1, 2]


def test_a_directory_that_no_run_can_lie_in(bucket, monkeypatch):
    with pytest.raises(ValueError, match=r"workdir must be on this machine or in a gs:// bucket"):
        prepared("s3://bucket/run")
    (bucket / "run" / "notes").write_bytes(b"")
    with pytest.raises(ValueError, match=r"workdir must be empty or hold a run of .* with notes"):
        prepared(bucket / "run").claim()

    def refused(self):
        raise RuntimeError("no access")

    monkeypatch.setattr(epath.Path("gs://x").__class__, "exists", refused)
    with pytest.raises(
        ValueError, match=r"workdir must be one that can be read, got .*: no access"
    ):
        prepared(bucket / "run").claim()
