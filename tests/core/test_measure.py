import json
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from hybrid_jax import core
from hybrid_jax.core import measure, processes

SHAPE = jax.ShapeDtypeStruct((3,), jnp.float32)


def forms(best):
    """Three of the same, of which one does not wait."""

    def form(name):
        def run(x):
            if name != best:
                jax.debug.callback(lambda: time.sleep(0.03))
            return x + 1

        return run

    return {name: form(name) for name in "abc"}


def never(x):
    raise AssertionError


def test_the_fastest_is_chosen_and_kept_for_run_and_machine(tmp_path):
    run, cache = tmp_path / "run.json", tmp_path / "deep" / "cache.json"
    assert core.Choices(run, cache).choose("q", forms("b"), SHAPE) == "b"
    unmeasured = dict.fromkeys("abc", never)
    assert core.Choices(run, tmp_path / "other.json").choose("q", unmeasured, SHAPE) == "b"
    assert core.Choices(None, cache).choose("q", unmeasured, SHAPE) == "b"
    assert core.read_sealed(run) == {"machine": core.machine(), "choices": {"q": "b"}}


def test_a_run_holds_against_the_cache(tmp_path):
    run, cache = tmp_path / "run.json", tmp_path / "cache.json"
    core.Choices(run, cache).choose("q", forms("a"), SHAPE)
    cache.write_text(json.dumps({core.machine(): {"q of a, b, c": "c"}}))
    assert core.Choices(run, cache).choose("q", dict.fromkeys("abc", never), SHAPE) == "a"


def test_one_form_is_not_run_and_an_unknown_answer_is_asked_again(tmp_path):
    cache = tmp_path / "cache.json"
    assert core.Choices(cache=cache).choose("q", {"only": never}, SHAPE) == "only"
    cache.write_text(json.dumps({core.machine(): {"q of a, b, c": "gone"}}))
    assert core.Choices(cache=cache).choose("q", forms("c"), SHAPE) == "c"


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_spoilt_cache_is_measured_anew_and_a_spoilt_run_is_refused(tmp_path, text):
    file = tmp_path / "file.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"file\.json must be as it was written"):
        core.Choices(file)
    assert core.Choices(cache=file).choose("q", forms("a"), SHAPE) == "a"
    assert json.loads(file.read_text()) == {core.machine(): {"q of a, b, c": "a"}}


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(tmp_path):
    (tmp_path / "file").write_text("")
    choices = core.Choices(cache=tmp_path / "file" / "cache.json")
    assert choices.choose("q", forms("a"), SHAPE) == "a"


def test_a_run_that_goes_on_elsewhere_says_so_and_keeps_its_choices(tmp_path, monkeypatch):
    run = tmp_path / "run.json"
    core.Choices(run, tmp_path / "cache.json").choose("q", forms("b"), SHAPE)
    here = core.machine()
    monkeypatch.setattr(measure, "machine", lambda: "a pocket calculator")
    with pytest.warns(UserWarning, match="goes on on .a pocket calculator.: .* not bit-equal"):
        choices = core.Choices(run, tmp_path / "cache.json")
    assert choices.moved == here
    assert choices.choose("q", dict.fromkeys("abc", never), SHAPE) == "b"
    choices.choose("other", forms("a"), SHAPE)
    assert core.read_sealed(run)["machine"] == here


def test_a_run_says_where_it_was_begun_before_anything_is_measured(tmp_path):
    core.Choices(tmp_path / "run.json")
    stored = core.read_sealed(tmp_path / "run.json")
    assert stored == {"machine": core.machine(), "choices": {}}


def test_all_processes_take_the_first_ones_choice(tmp_path, monkeypatch):
    """A process that is not the first measures nothing, and writes nothing."""
    run = tmp_path / "run.json"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    told = iter(['{"value": null}', '{"value": "c"}'])
    monkeypatch.setattr(processes.versions, "from_first_process", lambda name, own: next(told))
    choices = core.Choices(run, tmp_path / "cache.json")
    assert choices.choose("q", dict.fromkeys("abc", never), SHAPE) == "c"
    assert not run.exists()


def test_measured_in_the_midst_of_tracing(tmp_path):
    choices = core.Choices(cache=tmp_path / "cache.json")

    @jax.jit
    def fn(x):
        asked = choices.choose("q", forms("a"), jax.ShapeDtypeStruct(x.shape, x.dtype))
        return x + 1 if asked == "a" else x

    assert fn(jnp.zeros(3)).tolist() == [1, 1, 1]


def test_two_processes_in_the_midst_of_tracing(tmp_path):
    """For the second the other form would be the fastest; both take what the first measured."""
    program = """
import sys, time
import jax, jax.numpy as jnp
from hybrid_jax import core
process, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, process)

def waits(x):
    jax.debug.callback(lambda: time.sleep(0.1))
    return x

forms = {"a": waits, "b": lambda x: x} if process else {"a": lambda x: x, "b": waits}
choices = core.Choices(cache=f"{folder}/{process}.json")

@jax.jit
def fn(x):
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    return x + 1.0 if choices.choose("q", forms, shape) == "a" else x

print(fn(jnp.zeros(3)).tolist(), choices.answers)
"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    run = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(process), port, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in (0, 1)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in run]
    assert said == ["[1.0, 1.0, 1.0] {'q': 'a'}"] * 2
    assert not (tmp_path / "1.json").exists()
