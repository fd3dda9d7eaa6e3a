"""`compress` on networks that nobody here wrote, for what each of them is for, at every effort."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hybrid_jax import recipes
from tests.recipes import strangers
from tests.recipes.strangers import checks, settings


def test_linen_is_trained_pruned_and_quantized(tmp_path):
    images = strangers.digits()
    config = settings("finetune", **{"parent.steps": 200, "experts.sparsity": 0.25})
    result = recipes.compress(
        strangers.Linen(), images, workdir=tmp_path / "run", config=config, targets=["onnx", "c"]
    )
    own, rows = checks(result, ["onnx", "c"], 0.7)
    assert own.macs < 0.7 * rows["parent"].macs
    assert own.files["onnx"].bytes < rows["parent"].files["onnx"].bytes
    (model,) = result.state.experts
    assert model.facts["difference"] < 1e-4
    # Its own layer's statistic is none that is trained.
    assert any("size" in path for path in model.cut.statistics)


def test_nnx_is_quantized_without_training(tmp_path):
    images, labels = strangers.digits()
    model = strangers.Nnx(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    x = jnp.asarray(images[:, :, :, None] / np.float32(255))

    @nnx.jit
    def step(model, optimizer, x, y):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    with jax.numpy_dtype_promotion("standard"):  # as the user trained it
        for i in range(250):
            index = jax.random.randint(jax.random.key(i), (64,), 0, len(x))
            step(model, optimizer, x[index], jnp.asarray(labels)[index])
    config = settings("ptq", **{"data.mean": (0.0,), "data.std": (1.0,)})
    config.ptq.update(calibration="mse", rounding="gptq")
    result = recipes.compress(
        model, (images, labels), workdir=tmp_path / "run", config=config, targets=["onnx", "tflite"]
    )
    own, rows = checks(result, ["onnx", "tflite"], 0.5)
    assert own.accuracy > rows["parent"].accuracy - 0.03
    assert result.results.dataset["mean"] == [0.0]  # as it was trained


def test_segmentation_by_batches_with_void_pixels(tmp_path):
    """Pixels that do not count are labelled wrongly for the network, and judged by nobody."""
    images, _ = strangers.digits()
    labels = (images > 100).astype(np.int32)
    void = np.arange(8)[None, None] < 2
    marked = np.where(void, 7, labels)
    batches = ((images[i : i + 64, ..., None], marked[i : i + 64]) for i in range(0, 1797, 64))

    def loss(outputs, labels):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

    given = strangers.trained(strangers.Segment(), images, labels, loss)
    config = settings("finetune", **{"data.void": 7, "data.flip": True, "experts.sparsity": 0.25})
    result = recipes.compress(
        given, batches, workdir=tmp_path / "run", config=config, loss="classification"
    )
    own, _ = checks(result, ["onnx"], 0.9)
    # Of an image of 8 × 6 pixels that count the score is a whole number of parts.
    parts = np.array(own.correct) * 48
    np.testing.assert_allclose(parts, np.round(parts), atol=1e-3)


def centres():
    """Images of digits, and where the ink of each is, in pixels (n, 2)."""
    images, _ = strangers.digits()
    weight, rows = images.sum((1, 2)) / 255, np.arange(8)
    ends = [(images.sum(axis) * rows[None]).sum(1) / 255 / weight for axis in (2, 1)]
    return images, np.stack(ends, 1).astype(np.float32)


def squared(outputs, labels):
    return ((outputs - labels) ** 2).mean()


def test_regression(tmp_path):
    images, centre = centres()
    given = strangers.trained(strangers.Regress(), images, centre, squared)
    result = recipes.compress(
        given, (images, centre), workdir=tmp_path / "run", config=settings("ptq")
    )
    own, rows = checks(result, ["onnx"], -0.1)
    assert own.accuracy == pytest.approx(rows["parent"].accuracy, abs=0.02)


def test_regressions_become_a_cascade_by_the_confidence_of_the_user(tmp_path):
    images, centre = centres()
    given = strangers.trained(strangers.Regress(), images, centre, squared, steps=20)
    alone = {"controls.same_bytes": False, "controls.same_bops": False}
    asked = {"mixture.kind": "cascade", "experts.diversity": "width", "experts.deployed": 0.0}

    def in_the_middle(outputs):
        return jnp.exp(-jnp.abs(outputs - 3.5).mean(-1))

    result = recipes.compress(
        given,
        (images, centre),
        workdir=tmp_path / "run",
        config=settings("mixture", **asked, **alone, **{"experts.steps": 4}),
        confidence=in_the_middle,
        targets=["onnx", "c"],
    )
    own, rows = checks(result, ["onnx", "c"], -30.0)  # which hand on what it hands on here
    cheap, dear = (rows[f"expert {e}"].macs for e in (0, 1))
    assert cheap < dear
    assert cheap <= own.macs <= own.macs_worst == cheap + dear
    assert len(result.state.thresholds) == 1


def test_a_budget_of_bytes_is_met_by_bits(tmp_path):
    images, given = strangers.digits(), strangers.functions()
    budget = recipes.Budget(bytes=0.3)
    result = recipes.compress(
        given, images, budget, workdir=tmp_path / "run", config=settings("ptq"), targets=["c"]
    )
    own, rows = checks(result, ["c"], 0.0)
    assert own.files["c"].bytes <= 0.3 * rows["parent"].files["c"].bytes
    (model,) = result.state.experts
    assert {b["weight"] for b in model.cut.bits.values()} >= {4}
    assert model.facts["measured"]["bytes"] == own.files["c"].bytes


def test_a_budget_of_macs_and_memory_is_met_by_widths(tmp_path):
    images, given = strangers.digits(), strangers.functions()
    budget = recipes.Budget(macs=0.4, memory=700)
    result = recipes.compress(
        given, images, budget, workdir=tmp_path / "run", config=settings("finetune"), targets=["c"]
    )
    own, rows = checks(result, ["c"], 0.0)
    assert own.macs <= 0.4 * rows["parent"].macs
    assert own.files["c"].ram <= 700


def test_a_budget_that_cannot_be_met_is_named(tmp_path):
    images, given = strangers.digits(), strangers.functions()
    with pytest.raises(ValueError, match=r"budget of bytes must be at least \d+.*'finetune'"):
        recipes.compress(
            given,
            images,
            recipes.Budget(bytes=0.2, macs=0.9),
            workdir=tmp_path / "run",
            config=settings("ptq"),
            targets=["c"],
        )


def test_batches_without_labels_calibrate(tmp_path):
    images, _ = strangers.digits()
    batches = (images[i : i + 32, :, :, None] for i in range(0, 256, 32))
    result = recipes.compress(
        strangers.functions(), batches, workdir=tmp_path / "run", config=settings("ptq")
    )
    # What is counted is how often the files say what the network says.
    _, rows = checks(result, ["onnx"], 0.8)
    assert rows["parent"].accuracy == 1.0


def test_a_stage_of_ones_own_is_put_in_the_list(tmp_path):
    seen = []

    def mine(state):
        seen.append(len(state.experts))
        return state

    def effort(task, config):
        return [*recipes.EFFORTS["ptq"](task, config), mine]

    images, given = strangers.digits(), strangers.functions()
    first, second = (
        recipes.compress(given, images, workdir=tmp_path, config=settings("ptq"), effort=effort)
        for _ in range(2)
    )
    assert seen == [1]  # the second call found it done
    chex.assert_trees_all_equal(first.state.experts[0].params, second.state.experts[0].params)
    assert first.accuracy == second.accuracy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": lambda outputs, labels: 0.0}, "loss must return a number for each of 2 examples"),
        ({"metric": lambda outputs, labels: "good"}, "metric must return a number for each of 2"),
        ({"loss": "mse"}, "loss must be one of classification, regression, got 'mse'"),
        ({"targets": "onnx"}, "targets must be a sequence of names, got 'onnx'"),
        ({"budget": {"bytes": 9}}, "budget must be a Budget, got {'bytes': 9}"),
        ({"training_mode": "train"}, "training_mode must be None where functions are given"),
        ({"targets": ["onx"]}, "config.deploy.targets.* must be one of .*'onx'"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        recipes.compress(
            strangers.functions(), strangers.digits(), workdir=tmp_path / "run", **changes
        )
    assert not (tmp_path / "run").exists()


def test_a_stopped_run_goes_on_after_each_of_its_stages(tmp_path, capsys):
    images, given = strangers.digits(), strangers.functions()
    whole = recipes.compress(given, images, workdir=tmp_path, config=settings("ptq"))
    files = sorted((tmp_path / "stages").glob("*"))
    for done in (2, 1):
        for file in files[done:]:
            file.unlink()
        capsys.readouterr()
        again = recipes.compress(given, images, workdir=tmp_path, config=settings("ptq"))
        said = capsys.readouterr().err
        assert f"{done} of 3 stages are done" in said
        assert "again" not in said
        chex.assert_trees_all_equal(
            whole.state.experts[0].params,
            again.state.experts[0].params,
        )
