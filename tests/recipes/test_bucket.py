"""A run whose directory is in a bucket: stopped, damaged and gone on with, as on a disk.

The bucket is a folder that does no more than a bucket does.
"""

import io
import itertools
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
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


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    own = Bucket(tmp_path / "buckets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", own)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    # Of Orbax: what deletes folders of some buckets otherwise, and where TensorStore writes.
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    monkeypatch.setattr(
        gcs_utils,
        "get_kvstore_for_gcs",
        lambda path: {"driver": "file", "path": f"{own.here(path)}/"},
    )
    yield core.as_path("gs://bucket")
    assert not (tmp_path / "gs:").exists()  # what takes it for a path of this machine makes that


def flip(checkpoint):
    """A bit of each of its files of arrays."""
    for file in (checkpoint / "arrays" / "d").iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


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


@pytest.mark.slow
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
    flip(checkpoints / "4")
    made = prepared(path)()
    assert "it is now 4.damaged, and training goes on from step 2" in capsys.readouterr().err
    same(weights(made.state), expected)
    assert records_of(path) == records_of(tmp_path / "run")
    assert report.read(path) == made.results
    assert made.report.read_bytes().startswith(b"<!doctype html>")
    assert json.loads((path / "deploy" / "input.json").read_bytes())["shape"] == [4, 4, 1]
    assert made.files["packed"].read_bytes()
    assert (path / "parent.safetensors").exists()

    last = sorted((path / "stages").iterdir())[-1]
    last.write_bytes(last.read_bytes()[:-1])
    same(weights(go_on(prepared(path))[0]), expected)
    with pytest.raises(ValueError, match="workdir must be empty or hold a run of the same config"):
        prepared(path, seed=1).claim()


def test_a_damaged_checkpoint_in_a_bucket(bucket, capsys):
    like = {"w": np.zeros(3, np.float32)}
    checkpoints = training.Checkpoints(bucket / "own", keep=2, whose="a")
    for step in (1, 2, 3):
        checkpoints.save(step, {"w": np.full(3, step, np.float32)}, note=[step])
    assert sorted(own.name for own in checkpoints.directory.iterdir()) == ["2", "3"]
    flip(checkpoints.directory / "3")
    tree, note = training.Checkpoints(bucket / "own", whose="a").newest(like)
    assert (tree["w"].tolist(), note) == ([2, 2, 2], [2])
    assert "it is now 3.damaged, and training goes on from step 2" in capsys.readouterr().err


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
    run = prepared(bucket / "run")
    with pytest.raises(ValueError, match=r"workdir must be empty or hold a run of .* with notes"):
        run.claim()

    def refused(self):
        raise RuntimeError("no access")

    monkeypatch.setattr(type(bucket), "exists", refused)  # as where gcsfs is absent
    with pytest.raises(
        ValueError, match=r"workdir must be one that can be read, got .*: no access"
    ):
        run.claim()
