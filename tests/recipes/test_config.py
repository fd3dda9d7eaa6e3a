"""The specs of a configuration, and the work directory."""

import dataclasses

import numpy as np
import pytest

from hybrid_jax import core, data, recipes
from hybrid_jax.recipes import controls, workdir


@pytest.fixture
def config():
    return recipes.default_config()


def test_identical_experts_without_a_source(config):
    config.experts.diversity = ""
    assert len(set(recipes.expert_specs(config))) == 1


def test_each_source_tells_experts_apart(config):
    config.experts.diversity = "criterion"
    assert [s.criterion for s in recipes.expert_specs(config)] == list(config.experts.criteria)
    config.experts.diversity = "bits"
    assert [s.weight_bits for s in recipes.expert_specs(config)] == [4, 8, 4, 8]
    config.experts.diversity = "seed"
    assert {s.jitter for s in recipes.expert_specs(config)} == {config.experts.jitter}
    config.experts.diversity = "width"
    assert [s.sparsity for s in recipes.expert_specs(config)] == [0.75, 0.5, 0.75, 0.5]


@pytest.mark.parametrize("source", ["cluster", "classes", "bootstrap"])
def test_each_source_of_images_tells_experts_apart(config, source):
    config.experts.diversity = source
    assert [s.images for s in recipes.expert_specs(config)] == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def splits():
    images = np.arange(20 * 4, dtype=np.uint8).reshape(20, 2, 2)
    return data.from_arrays((images, np.arange(20) % 2), 4, 4)


def claim(path, config, splits, params):
    workdir.claim(path, config, splits, params).close()


def test_one_process_alone_works_in_a_directory(splits, tmp_path):
    """A lock holds for whoever opened it, as if in another process."""
    lock = workdir.claim(tmp_path, {}, splits, None)
    own = workdir.whose(tmp_path)
    with pytest.raises(ValueError, match=r"workdir must be of no run that goes on, got .*locked"):
        workdir.claim(tmp_path, {}, splits, None)
    lock.close()
    claim(tmp_path, {}, splits, None)
    assert workdir.whose(tmp_path) == own


def test_claim_removes_what_a_killed_process_left(splits, tmp_path):
    claim(tmp_path, {}, splits, None)
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / f".one.onnx.77{core.DRAFT}").write_text("half")
    claim(tmp_path, {}, splits, None)
    assert not list((tmp_path / "deploy").iterdir())


@pytest.mark.parametrize("name", ["stages", "results.json"])
def test_claim_refuses_a_file_for_a_folder_and_a_folder_for_a_file(splits, tmp_path, name):
    claim(tmp_path, {}, splits, None)
    if name == "stages":
        (tmp_path / name).write_text("")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"{name} must be a (file|folder), got a .*move it away"):
        claim(tmp_path, {}, splits, None)


def test_claim_takes_up_the_same_run_only(splits, tmp_path):
    path, params = tmp_path / "run", {"w": np.zeros(2)}
    claim(path, {"seed": 0, "deploy.targets": ["c"]}, splits, params)
    # What is written for devices may change.
    claim(path, {"seed": 0, "deploy.targets": ["onnx"]}, splits, params)
    for config, images, given, message in (
        ({"seed": 1}, splits, params, "config.seed=0 where this config has 1"),
        ({"seed": 0}, _brighter(splits), params, "of other images and labels"),
        ({"seed": 0}, splits, {"w": np.ones(2)}, "of other given weights"),
        ({"seed": 0}, splits, None, "of other given weights"),
    ):
        with pytest.raises(ValueError, match=message):
            claim(path, config, images, given)


def _brighter(splits):
    train = splits.train._replace(images=splits.train.images + 1)
    return dataclasses.replace(splits, train=train)


def test_claim_refuses_what_is_no_run(splits, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="workdir must be a directory"):
        claim(tmp_path / "file", {}, splits, None)
    with pytest.raises(ValueError, match=r"workdir must be empty or hold a run .* with file"):
        claim(tmp_path, {}, splits, None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("[1")
    with pytest.raises(ValueError, match=r"run\.json must be as it was written, .* in another"):
        claim(tmp_path / "run", {}, splits, None)


def test_single_network_of_a_target(config):
    (first, *_) = recipes.expert_specs(config)  # 4-bit weights

    def price(spec):
        return (1 - spec.sparsity) * spec.weight_bits

    fits = controls.within(first, price, 2.5)
    assert (fits.sparsity, fits.weight_bits) == (0.375, 4)  # 0.625 · 4 = 2.5
    below = controls.within(first, price, 2.49)
    assert below.sparsity == 0.375 + 1 / controls.RESOLUTION
    # The whole width takes 4 of 6: with 6 bits it takes all.
    more_bits = controls.within(first, price, 6.0)
    assert (more_bits.sparsity, more_bits.weight_bits) == (0.0, 6)
    # Nothing is as dear as 100: the dearest there is.
    most = controls.within(first, price, 100.0)
    assert (most.sparsity, most.weight_bits) == (0.0, 8)
