"""Every mistake of a user ends in one line that names it, and nothing of theirs is lost."""

import json
import subprocess
import sys

import numpy as np
import pytest

from hybrid_jax import pruning, recipes
from launch import command, compress

DIGITS = "--config=configs/digits.py"


def fails(capsys, *arguments):
    """Returns the one line that a command line ends with."""
    assert compress.cli(["compress", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").strip()


# Every key just outside its bound is in tests/recipes/test_schema.py.
BAD = {
    "experts.sparsity=half": "config.experts.sparsity must be a number in [0, 1), got 'half'",
    "budget.macs=1.5": "config.budget.macs must be an integer in [2, 1_000_000_000_000_000] or a "
    "number in [0, 1], got 1.5",
    "experts.cout=3": "--config.experts.cout is no key of the configuration; "
    "the nearest valid key is config.experts.count",
    "ptq.images=3": "config.ptq.images must not be given with effort 'mixture', which",
    "joint.refit": "--config.joint.refit must be followed by =VALUE, got nothing",
    "experts.diversity=sed": "config.experts.diversity must be one of criterion, seed, bits, "
    "width, cluster, classes, bootstrap, got 'sed'; did you mean seed?",
    "data.padding=9": "config.data: padding must be an integer in [0, 7], got 9",
    "data.pattern=x": "config.data: pattern must not be given for 'digits', which takes dir",
    "data.class_names=a,b": "config.data: train labels must be ",
    "data.mean=0.1,0.2": "config.data: mean must be 1 values from 0 to 1, ",
    "model.name=resnet9": "config.model.name must be one of ",
    "model.name=vgg16_bn": "config.model: override of vgg16_bn must be one of ",
    "model.widths=4,8 --config.model.make=x.py:make": "config.model.widths must not be ",
    "model.weights=/nowhere": "config.model.weights: ",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_value(override, tmp_path, capsys):
    workdir = tmp_path / "run"
    line = fails(capsys, DIGITS, f"--workdir={workdir}", *f"--config.{override}".split())
    assert line.startswith(BAD[override])
    assert not workdir.exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--config=nowhere.py", "--workdir=run", "--config.experts.cout=3"],
        [DIGITS, "--workdir=run", "--config.experts.count=1"],
        [DIGITS, "--wrkdir=run"],
    ],
)
def test_a_mistake_is_told_before_jax_is_imported(flags):
    code = (
        "import sys; from launch import compress; status = compress.cli(sys.argv); "
        "print([name for name in ('jax', 'flax', 'sklearn') if name in sys.modules]); "
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(", "SyntaxError: "),
        ("x = 1", "KeyError: 'get_config'"),
        ("def get_config(): return 3", "TypeError: it returns int"),
        ("def get_config(): return 1 / 0", "ZeroDivisionError: "),
    ],
)
def test_a_config_module_that_is_none(text, message, tmp_path, capsys):
    (tmp_path / "own.py").write_text(text)
    line = fails(capsys, f"--config={tmp_path}/own.py", f"--workdir={tmp_path}/run")
    expected = "--config must be a file whose get_config() returns the configuration, got "
    assert line.startswith(f"{expected}{tmp_path}/own.py: {message}")


def test_a_config_module_with_an_unknown_key(tmp_path, capsys):
    lines = ["config = recipes.default_config()", "config.gate.fetures = (8,)", "return config"]
    text = "from hybrid_jax import recipes\ndef get_config():\n    " + "\n    ".join(lines)
    (tmp_path / "own.py").write_text(text)
    assert fails(capsys, f"--config={tmp_path}/own.py", f"--workdir={tmp_path}/run") == (
        "config.gate.fetures is no key of the configuration; "
        "the nearest valid key is config.gate.features"
    )


def test_bad_flags(tmp_path, capsys):
    assert fails(capsys, DIGITS) == "--workdir must be given, got nothing"
    assert fails(capsys, f"--workdir={tmp_path}") == "--config must be given, got nothing"
    assert "got 'configs/digit.py'" in fails(
        capsys, "--config=configs/digit.py", f"--workdir={tmp_path}"
    )
    assert "'wrkdir'" in fails(capsys, DIGITS, f"--wrkdir={tmp_path}")
    assert "got 'count=3'" in fails(capsys, DIGITS, f"--workdir={tmp_path}", "count=3")
    assert list(tmp_path.iterdir()) == []


def test_another_run_is_left_alone(tmp_path, capsys):
    theirs = recipes.default_config()
    theirs.seed = 7
    stored = json.dumps(recipes.flatten(theirs))
    (tmp_path / "config.json").write_text(stored)
    (tmp_path / "weights").write_text("precious")
    line = fails(capsys, DIGITS, f"--workdir={tmp_path}")
    assert line.startswith("workdir must be empty or hold a run of the same config, got ")
    assert (tmp_path / "config.json").read_text() == stored
    assert (tmp_path / "weights").read_text() == "precious"


def test_files_that_are_no_run_are_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert "with thesis.tex" in fails(capsys, DIGITS, f"--workdir={tmp_path}")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def bloodmnist(path, **changes):
    n = 12
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = np.zeros((n, 28, 28, 3), np.uint8)
        arrays[f"{split}_labels"] = np.arange(n)[:, None] % 8
    np.savez(path, **(arrays | changes))
    return f"--config.data.dir={path}"


BLOOD = "--config=configs/bloodmnist.py"


def test_missing_data(tmp_path, capsys):
    workdir = tmp_path / "run"
    to = f"--workdir={workdir}"
    assert "/none.npz" in fails(capsys, BLOOD, to, f"--config.data.dir={tmp_path}/none.npz")
    assert "/none" in fails(
        capsys, "--config=configs/cifar10.py", to, f"--config.data.dir={tmp_path}/none"
    )
    assert not workdir.exists()


def test_labels_outside_the_classes(tmp_path, capsys):
    path = bloodmnist(tmp_path / "blood.npz", train_labels=np.full((12, 1), 8))
    line = fails(capsys, BLOOD, f"--workdir={tmp_path / 'run'}", path)
    assert "labels" in line
    assert "8" in line
    assert not (tmp_path / "run").exists()


def test_images_of_another_shape(tmp_path, capsys):
    path = bloodmnist(tmp_path / "blood.npz", test_images=np.zeros((12, 32, 32, 3), np.uint8))
    line = fails(capsys, BLOOD, f"--workdir={tmp_path / 'run'}", path)
    assert "(28, 28, 3)" in line
    assert "(32, 32, 3)" in line
    assert not (tmp_path / "run").exists()


def test_one_command_for_all(tmp_path, capsys, monkeypatch):
    assert command.main(["hybrid-jax", "squash"]) == 2
    assert capsys.readouterr().err == (
        "error: command must be one of compress, export, report, benchmark, got 'squash'\n"
    )
    for name in command.COMMANDS:
        assert command.main(["hybrid-jax", name, "--help"]) == 0
        assert "python -m launch." + name in capsys.readouterr().out
    assert command.main(["hybrid-jax"]) == 0


def test_a_config_goes_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, workdir, *_ = compress.parse(["compress", "--config=digits", "--workdir=run"])
    assert (config.data.name, workdir) == ("digits", "run")


def test_help_knows_the_names_that_a_config_adds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pruning, "CRITERIA", dict(pruning.CRITERIA))
    file = tmp_path / "own.py"
    file.write_text(
        "from hybrid_jax import pruning, recipes\n"
        "pruning.CRITERIA['my_own'] = lambda given: given.params\n"
        "get_config = recipes.default_config\n"
    )
    assert compress.cli(["compress", f"--config={file}", "--help"]) == 0
    assert "my_own" in capsys.readouterr().out
    assert compress.cli(["compress", "--config=nothing", "--help"]) == 2
    assert "--config must be a file, or one of" in capsys.readouterr().err


def test_what_could_not_be_known_is_told_in_a_line(capsys):
    def late(argv):
        def act():
            raise command.Told("nothing fits")

        return act

    assert command.run(["compress"], "", late) == 2
    assert capsys.readouterr().err == "error: nothing fits\n"


def test_a_fault_of_ours_is_no_mistake_of_the_user(capsys):
    def broken(argv):
        return lambda: [][1]

    with pytest.raises(IndexError):
        command.run(["compress"], "", broken)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("yes", "--distributed must be auto or HOST:PORT,PROCESSES,NUMBER, got 'yes'"),
        ("host:1,2", "--distributed must be auto or HOST:PORT,PROCESSES,NUMBER, got 'host:1,2'"),
        ("host:1,2,2", "--distributed must have a NUMBER below 2, got 2"),
    ],
)
def test_processes_that_cannot_be(told, message, tmp_path, capsys):
    assert fails(capsys, DIGITS, f"--workdir={tmp_path}/run", f"--distributed={told}") == message
