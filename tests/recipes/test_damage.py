"""Work directories that were damaged or left: the right continuation, or one line that names it.

One tiny run goes on in one directory, whose files are laid out anew before each damage.
"""

import itertools
import os
import pathlib
import shutil
import signal
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from hybrid_jax import data, deploy, recipes, report
from hybrid_jax.recipes import pipeline
from launch import compress
from tests.recipes import killed
from tests.recipes.short import go_on, prepared, records_of, same, trained, weights

STAGES = {"parent": "parent", "experts": "train", "experts_deployed": "train"}
"""{folder of checkpoints: the stage that trains with them}."""


class Made(NamedTuple):
    run: pipeline.Run
    path: pathlib.Path
    whole: pathlib.Path  # what it left
    other: pathlib.Path  # what a run of another seed left
    expected: Any
    results: report.Results
    records: list


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("damage")
    run, other = prepared(root / "run"), prepared(root / "other", seed=1)
    result = run()
    with other.claim():
        trained(other)
    shutil.copytree(root / "run", root / "whole")
    records = records_of(root / "run")
    expected = jax.device_get(weights(result.state))
    read = report.read(root / "run")
    return Made(run, root / "run", root / "whole", root / "other", expected, read, records)


def lay_out(made, without=None):
    """The directory as the run left it, or as it was before the stage `without` was done."""
    shutil.rmtree(made.path)
    shutil.copytree(made.whole, made.path)
    files = sorted(made.path.glob("stages/*"))
    first = next((i for i, p in enumerate(files) if p.stem[3:] == without), len(files))
    for file in files[first:]:
        file.unlink()


def damage(rng, path, other):
    """Damages one file, and says how."""
    kinds = ("bit", "bit", "block", "cut", "empty", "list", "binary", "gone", "folder", "swap")
    kind, content = str(rng.choice(kinds)), path.read_bytes()
    at, noise = int(rng.integers(max(len(content), 1))), rng.bytes(64)
    flipped = bytearray(content or b"\0")
    flipped[at] ^= 1 << int(rng.integers(8))
    block = content[:at] + noise + content[at + 64 :]
    path.unlink()
    if kind == "swap" and (not other.is_file() or path.name == "records.jsonl"):
        kind = "gone"  # records name no run
    if kind == "folder":
        path.mkdir()
    elif kind == "swap":
        shutil.copy(other, path)
    elif kind != "gone":
        new = {"bit": flipped, "block": block, "cut": content[:at], "empty": b""}
        path.write_bytes(new.get(kind, b"[1]\n" if kind == "list" else noise))
    return kind


def attempt(made, what, act):
    """What `act()` returns, or None where it refuses in one line that names a path."""
    try:
        return act()
    except (ValueError, OSError) as error:
        line = str(error)
    assert "\n" not in line, (what, line)
    assert str(made.path) in line, (what, line)
    return None


def check(made, what, capsys):
    """The run goes on to what it was, or says in one line why not; so does whatever reads it."""
    kind, name = what
    found = attempt(made, what, lambda: report.read(made.path))
    assert found in (None, made.results) or what == ("swap", pathlib.Path("results.json")), what
    for file in made.path.glob("deploy/*.safetensors"):
        if attempt(made, what, lambda: deploy.load_program(file)):  # noqa: B023
            assert file.read_bytes() == (made.whole / "deploy" / file.name).read_bytes(), what
    capsys.readouterr()
    done = attempt(made, what, lambda: go_on(made.run))
    if done is None:
        return False
    state, records = done
    same(weights(state), made.expected)
    told = "records.jsonl must hold records as they were written" in capsys.readouterr().err
    lost = name == pathlib.Path("records.jsonl") and kind in ("cut", "empty", "gone")
    assert told or lost or records == made.records, what
    return True


@pytest.mark.parametrize("count", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_a_damaged_directory_goes_on_rightly_or_says_so(made, capsys, count):
    rng = np.random.default_rng(count)
    files = [p.relative_to(made.whole) for p in sorted(made.whole.rglob("*")) if p.is_file()]
    files = [p for p in files if p.suffix != ".png" and p.name != ".lock"]
    folders = sorted({p.parts[0] for p in files})  # as often as another, however many files
    went_on = 0
    for _ in range(count):
        within = rng.choice(folders)
        path = files[rng.choice([i for i, p in enumerate(files) if p.parts[0] == within])]
        # Checkpoints are read where their stage was not done.
        lay_out(made, STAGES[path.parts[1]] if within == "checkpoints" else None)
        kind = damage(rng, made.path / path, made.other / path)
        went_on += check(made, (kind, path), capsys)
    assert went_on > count / 4


@pytest.mark.parametrize("name", ["stages", "checkpoints", "deploy", "checkpoints/experts"])
def test_a_file_where_a_folder_should_be(made, capsys, name):
    lay_out(made, "train")
    shutil.rmtree(made.path / name)
    (made.path / name).write_text("")
    assert not check(made, ("file", pathlib.Path(name)), capsys)


def test_a_stray_folder_among_checkpoints(made, capsys):
    lay_out(made, "train")
    for name in ("9", "notes"):
        (made.path / "checkpoints" / "experts" / name).mkdir()
    assert check(made, ("stray", pathlib.Path()), capsys)


@pytest.mark.slow
def test_what_is_damaged_of_a_finished_run_is_written_again(made):
    lay_out(made)
    for name in ("results.json", "report.html", "deploy/compressed.safetensors"):
        (made.path / name).write_bytes(b"nothing")
    again = made.run()
    same(weights(again.state), made.expected)
    names = ("accuracy", "macs", "bops", "correct")
    ours, theirs = (
        [[getattr(row, name) for name in names] for row in results.rows]
        for results in (report.read(made.path), made.results)
    )
    assert ours == theirs
    for file in made.whole.glob("deploy/*.safetensors"):
        assert (made.path / "deploy" / file.name).read_bytes() == file.read_bytes()


def test_a_draft_of_the_first_file_blocks_nothing(tmp_path):
    """It is all that a kill leaves while run.json is written."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".run.json.12.draft").write_text("{")
    with prepared(folder).claim():
        assert not list(folder.rglob("*.draft"))


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 40])
def test_killed_at_any_change_on_disk_it_goes_on_to_the_bit(made, count):
    """At the first, the last and those between: in each stage, within each kind of write."""
    shutil.rmtree(made.path)
    whole = killed.at(made.path, 0)
    assert whole.returncode == 0, whole.stderr
    changes = int(whole.stdout.splitlines()[-1])
    for number in np.linspace(1, changes, count).astype(int):
        shutil.rmtree(made.path)
        ended = killed.at(made.path, number)
        assert ended.returncode == -signal.SIGKILL, (number, ended.stderr)
        state, records = go_on(made.run)
        same(weights(state), made.expected)
        assert records == made.records, number
        assert not list(made.path.rglob("*.draft")), number


SLOW = (2, *range(0, 19, 4))
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.mark.parametrize("at", [9, *(pytest.param(i, marks=pytest.mark.slow) for i in SLOW)])
def test_a_signal_in_any_stage_stops_the_command_in_a_line(made, monkeypatch, capfd, at):
    """Before the batch `at`; the same command then goes on to the same weights."""

    class Exited(BaseException):
        pass

    def leave(code):
        raise Exited(code)

    shutil.rmtree(made.path)
    given, number = data.batches, SIGNALS[at % 3]
    asked = itertools.count()

    def batches(*args, **options):
        for batch in given(*args, **options):
            if next(asked) == at:
                signal.raise_signal(number)
            yield batch

    monkeypatch.setattr(data, "batches", batches)
    monkeypatch.setattr(recipes, "of_config", lambda *_: made.run)
    argv = ["compress", "--config=digits", f"--workdir={made.path}", "--compilation_cache="]
    monkeypatch.setattr(os, "_exit", leave)
    before = signal.signal(number, signal.SIG_DFL)  # a shell may have it ignored
    try:
        with pytest.raises(Exited) as exited:
            compress.cli(argv)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert exited.value.args == (128 + number,)
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == f"stopped by {number.name}: to go on, run the same command again"
    with made.run.claim():
        state = trained(made.run)
    same(weights(state), made.expected)
    assert records_of(made.path) == made.records
