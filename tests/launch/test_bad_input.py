"""Every mistake of a user ends in one line that names it, and nothing of theirs is lost."""

import json

import numpy as np
import pytest

from hybrid_jax import recipes
from launch import command, compress

# ml_collections loads config modules by importlib's old way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

DIGITS = "--config=configs/digits.py"


def fails(capsys, *arguments):
    """Returns the one line that a command line ends with."""
    assert compress.cli(["compress", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").strip()


BAD = {
    "experts.sparsity=1.3": "config.experts.sparsity must be in [0, 1), got 1.3",
    "experts.sparsity=half": "--config.experts.sparsity must be a number, got 'half'",
    "experts.weight_sparsity=-0.1": "config.experts.weight_sparsity must be in [0, 1), got -0.1",
    "experts.weight_bits=0": "config.experts.weight_bits must be an integer in [2, 8], got 0",
    "experts.bits=(4,0)": "config.experts.bits must be an integer in [2, 8], got 0",
    "experts.count=0": "config.experts.count must be an integer of at least 2, got 0",
    "experts.count=many": "--config.experts.count must be an integer, got 'many'",
    "gate.k=5": "config.gate.k must be at most config.experts.count = 4, got 5",
    "gate.k=0": "config.gate.k must be an integer of at least 1, got 0",
    "experts.cout=3": "--config.experts.cout is no key of the configuration; "
    "the nearest valid key is config.experts.count",
    "expert.count=3": "--config.expert.count is no key of the configuration; "
    "the nearest valid key is config.experts.count",
    "experts.diversity=sed": "config.experts.diversity must be one of criterion, seed, bits, "
    "width, cluster, classes, bootstrap, got 'sed'; did you mean seed?",
    "experts.others_weight=1.0": "config.experts.others_weight must not be 1 with diversity "
    "'cluster', which would then make no difference",
    "experts.sparsities=(0.5,1.0)": "config.experts.sparsities must be in [0, 1), got 1.0",
    "joint.refit=maybe": "--config.joint.refit must be true or false, got 'maybe'",
    "collapse.steps=-1": "config.collapse.steps must be an integer of at least 0, got -1",
    "collapse.batch_size=0": "config.collapse.batch_size must be an integer of at least 1, got 0",
    "collapse.learning_rate=0.0": "config.collapse.learning_rate must be a finite number above 0, "
    "got 0.0",
    "collapse.routing=top_2": "config.collapse.routing must be one of soft, top_1, got 'top_2'",
    "controls.same_bops=some": "--config.controls.same_bops must be true or false, got 'some'",
    "experts.criteria=('magnitude_l3',)": "config.experts.criteria must be one of ",
    "experts.learning_rate=-1": "config.experts.learning_rate must be a finite number above 0, "
    "got -1.0",
    "parent.steps=0": "config.parent.steps must be an integer of at least 1, got 0",
    "data.validation=1.5": "config.data.validation must be a fraction below 1, a whole number, or "
    "either after 'test:', got 1.5",
    "data.validation=tset:9": "config.data.validation must be a fraction below 1, ",
    "data.padding=100000": "config.data: padding must be an integer in [0, 7], got 100000",
    "data.resize=(8,8,3)": "config.data.resize must be one side or (height, width), got ",
    "data.augment=('cutuot',)": "config.data.augment must be one of ",
    "data.pattern=x": "config.data: pattern must not be given for 'digits', which takes dir",
    "data.class_names=('a','a')": "config.data: class_names must differ, got 'a' twice",
    "data.mean=(123.7,)": "config.data: mean must be 1 values from 0 to 1, ",
    "model.name=resnet9": "config.model.name must be one of ",
    "deploy.platforms=('gpu',)": "config.deploy.platforms must be one of cpu, cuda, rocm, tpu, "
    "got 'gpu'",
    "parent.restore=/nowhere": "config.parent.restore must be ",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_value(override, tmp_path, capsys):
    workdir = tmp_path / "run"
    line = fails(capsys, DIGITS, f"--workdir={workdir}", f"--config.{override}")
    assert line.startswith(BAD[override])
    assert not workdir.exists()


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
    config, workdir, _ = compress.parse(["compress", "--config=digits", "--workdir=run"])
    assert (config.data.name, workdir) == ("digits", "run")


def test_a_fault_of_ours_is_no_mistake_of_the_user(capsys):
    def broken(argv):
        return lambda: [][1]

    with pytest.raises(IndexError):
        command.run(["compress"], "", broken)
