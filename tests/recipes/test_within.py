"""A budget of several networks: the file of them all keeps it, whatever decides which one runs."""

import types

import pytest

from hybrid_jax import data, recipes
from hybrid_jax.recipes import pipeline, within
from hybrid_jax.recipes.config import expert_specs
from hybrid_jax.report.formatting import si
from tests.recipes import strangers
from tests.recipes.strangers import checks, settings

BYTES = {"gate": 9600, "cascade": 6000, "auto": 9600}
"""For each kind of mixture fewer than its networks take whole."""
TARGETS = ("c", "onnx")


def asked(**changes):
    own = {"experts.diversity": "criterion", "experts.criteria": ("magnitude", "taylor")}
    alone = {"controls.same_bytes": False, "controls.same_bops": False}
    return settings("mixture", **(own | alone | {"deploy.targets": TARGETS} | changes))


@pytest.fixture
def prepared(tmp_path):
    """prepared(**changes) -> the run of a mixture of two networks, which is not run."""

    def make(**changes):
        images, labels = strangers.digits()
        splits = data.take((images[:200], labels[:200]))
        config = recipes.read(asked(**changes))
        given = strangers.functions(), splits, config, tmp_path / "run"
        return pipeline.prepare(*given, recipes.EFFORTS["mixture"])

    return make


@pytest.mark.parametrize("kind", ["gate", "cascade"])
def test_all_files_of_a_mixture_keep_its_bytes(prepared, kind):
    limits = {"bytes": BYTES[kind], "memory": 700, "macs": 14_000}
    changes = {f"budget.{name}": most for name, most in limits.items()}
    run = prepared(**{"mixture.kind": kind}, **changes)
    task, config = run.task, run.config
    # What a dry run tells, before any damage is known.
    planned = within.planned(task, config, expert_specs(config))
    assert f"at most 700, about {si(planned['memory'])}" in run.describe()
    assert all(planned[name] <= limits[name] for name in ("bytes", "memory"))
    made = within.pruned(task, task.parent, config, expert_specs(config))
    measured = made[0].facts["measured"]
    assert 0.8 * limits["bytes"] < measured["bytes"] <= limits["bytes"]
    assert measured["memory"] <= limits["memory"]
    together = within._together(task, config, [own.encoded() for own in map(deployed(task), made)])
    assert within._written(together, config) == measured
    # Behind a gate each network keeps the MACs by itself, in a cascade all do on average.
    beside = within._beside(task, config, 2).get("macs", 0)
    for model in made:
        assert model.facts["macs"][1] < model.facts["macs"][0]
        kept = sum(model.cut.variables[name].shape[-1] for name in ("stem", "body"))
        assert model.facts["removed"] == pytest.approx(1 - kept / 20)
        assert kind == "cascade" or model.facts["predicted"]["macs"] + beside <= limits["macs"]


def deployed(task):
    """A network as it is written before it is trained."""

    def make(model):
        plain = within.ptq.quantized(model, model.cut.bits)
        return within.ptq.calibrate(task, plain, within.ptq.BATCH, "minmax")

    return make


def test_bytes_are_divided_by_the_squares_of_what_is_kept():
    specs = [types.SimpleNamespace(sparsity=sparsity) for sparsity in (0.75, 0.5)]
    beside = {"bytes": 1000, "macs": 10}
    each = within._of_each({"bytes": 6000, "memory": 500, "macs": 90}, specs, beside)
    # 0.25² : 0.5² = 1 : 4 of 5000.
    assert [own["bytes"] for own in each] == [1000, 4000]
    assert all((own["memory"], own["macs"]) == (500, 80) for own in each)


def test_a_mixture_is_written_within_its_bytes(tmp_path):
    config = asked(**{"mixture.kind": "auto", "budget.bytes": BYTES["auto"]})
    result = recipes.compress(
        strangers.functions(), strangers.digits(), workdir=tmp_path / "run", config=config
    )
    own, _ = checks(result, ["c", "onnx"], 0.05)
    assert own.role == "mixture"
    assert all(file.bytes <= BYTES["auto"] for file in own.files.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"budget.bytes": 4000},
            r"of 2 experts must keep its part: budget of bytes must be at least \d+, got \d+: ",
        ),
        ({"budget.latency": 0.5}, "budget.latency must not be given for effort 'mixture'"),
    ],
)
def test_what_a_mixture_cannot_keep_is_told_at_the_start(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as told:
        recipes.compress(
            strangers.functions(),
            strangers.digits(),
            workdir=tmp_path / "run",
            config=asked(**changes),
        )
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()
