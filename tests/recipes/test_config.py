"""The configuration, its specs, and the work directory."""

import pytest

from hybrid_jax import core, pruning, recipes
from hybrid_jax.recipes import controls, workdir


@pytest.fixture
def config():
    return recipes.default_config()


@pytest.mark.parametrize("name", ["digits", "cifar10", "bloodmnist"])
def test_shipped_configs_are_valid(name):
    module = __import__(f"configs.{name}", fromlist=["get_config"])
    recipes.check_config(module.get_config())


@pytest.mark.parametrize("method", ["minmax", "ema", "percentile", "mse", "entropy"])
def test_calibration_takes_what_finds_ranges_at_all_bits(config, method):
    config.experts.calibration = method
    recipes.check_config(config)


@pytest.mark.parametrize("method", ["mean_abs", "ternary", "entrpy"])
def test_calibration_refuses_what_is_of_few_values_or_unknown(config, method):
    config.experts.calibration = method
    with pytest.raises(ValueError, match=f"config.experts.calibration must .* got '{method}'"):
        recipes.check_config(config)


def test_unknown_and_missing_keys(config):
    with config.unlocked():
        config.gate.featurse = (3,)
    with pytest.raises(
        ValueError, match=r"gate.featurse .* nearest valid key is config.gate.features"
    ):
        recipes.check_config(config)
    with config.unlocked():
        del config.gate.featurse, config.gate.features
    with pytest.raises(ValueError, match=r"config.gate.features must be given"):
        recipes.check_config(config)


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


@pytest.mark.parametrize(
    ("source", "key", "value", "message"),
    [
        ("criterion", "criteria", ("taylor",), "criteria must hold at least two different values"),
        ("bits", "bits", (4, 4), r"bits must hold at least two .* 'bits', got \(4, 4\)"),
        ("width", "sparsities", (0.5,), r"sparsities must hold at least two .* got \(0.5,\)"),
        ("seed", "jitter", 0.0, "jitter must not be 0 with diversity 'seed'"),
        ("cluster", "others_weight", 1.0, "others_weight must not be 1 with diversity 'cluster'"),
        ("classes", "others_weight", 1.0, "others_weight must not be 1 with diversity 'classes'"),
    ],
)
def test_a_source_that_makes_no_difference_is_refused(config, source, key, value, message):
    config.experts.diversity = source
    recipes.check_config(config)
    config.experts[key] = value
    with pytest.raises(ValueError, match=f"config.experts.{message}"):
        recipes.check_config(config)


def test_a_criterion_of_the_users_own_is_one_by_name(config, monkeypatch):
    config.experts.criteria = ("mine", "obs")
    with pytest.raises(ValueError, match=r"config.experts.criteria must be one of .*, got 'mine'"):
        recipes.check_config(config)
    monkeypatch.setitem(pruning.CRITERIA, "mine", lambda given: given.params)
    recipes.check_config(config)


def test_claim_takes_up_the_same_config_only(config, tmp_path):
    path = workdir.claim(tmp_path / "run", config)
    assert workdir.claim(path, config) == path
    config.seed = 1
    with pytest.raises(ValueError, match=r"config.seed=0 where this config has 1"):
        workdir.claim(path, config)


def test_claim_refuses_a_file(config, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="workdir must be a directory"):
        workdir.claim(tmp_path / "file", config)


def test_a_done_stage_keeps_its_time(tmp_path):
    core.write_json(tmp_path / "seconds.json", {"parent": 12.5})
    for name in ("parent", "gate"):
        with workdir.stage(tmp_path, name):
            pass
    assert workdir.seconds(tmp_path)["parent"] == 12.5
    assert workdir.seconds(tmp_path)["gate"] < 1


def test_a_stage_that_fails_is_not_done(tmp_path):
    with pytest.raises(FloatingPointError), workdir.stage(tmp_path, "parent"):
        raise FloatingPointError
    assert workdir.seconds(tmp_path) == {}


def test_single_network_of_a_target(config):
    (first, *_) = recipes.expert_specs(config)  # 4-bit weights

    def price(spec):
        return (1 - spec.sparsity) * spec.weight_bits

    fits = controls.single_spec(first, price, 2.5)
    assert (fits.sparsity, fits.weight_bits) == (0.375, 4)  # 0.625 · 4 = 2.5
    below = controls.single_spec(first, price, 2.49)
    assert below.sparsity == 0.375 + 1 / controls.RESOLUTION
    # The whole width takes 4 of 6: with 6 bits it takes all.
    more_bits = controls.single_spec(first, price, 6.0)
    assert (more_bits.sparsity, more_bits.weight_bits) == (0.0, 6)
    # Nothing is as dear as 100: the dearest there is.
    most = controls.single_spec(first, price, 100.0)
    assert (most.sparsity, most.weight_bits) == (0.0, 8)
