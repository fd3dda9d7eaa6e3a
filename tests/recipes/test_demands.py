"""What a run could not do is told before anything is trained or written, in one line."""

import sys

import jax
import numpy as np
import pytest

from hybrid_jax import data, models, recipes, report
from hybrid_jax.recipes import files, within
from tests.recipes import strangers
from tests.recipes.strangers import settings

PREDICT, TRAIN, PARAMS = strangers.functions()


def probabilities(params, x):
    return jax.nn.softmax(PREDICT(params, x))


def sigmoids(params, x):
    return jax.nn.sigmoid(PREDICT(params, x))


def values(images):
    return images, np.zeros((len(images), 10), np.float32)


def few(images):
    return images[:40], np.arange(40) % 10


def of_others(params, x):
    return PREDICT(params, x)[:, :9]


def both(params, x):
    return PREDICT(params, x), x


FUNCTIONS, FROZEN = (PREDICT, TRAIN, PARAMS), (PREDICT, PARAMS)
CASES = {
    "no training function": (
        FROZEN,
        {"effort": "finetune"},
        "network must have a training function",
    ),
    "no training function, mixture": (FROZEN, {"effort": "mixture"}, "for effort 'mixture'"),
    "two outputs": (
        (both, PARAMS),
        {},
        r"network must return one array, got tuple of shapes \(2, 10\), \(2, 8, 8, 1\)",
    ),
    "too few outputs": (
        (of_others, PARAMS),
        {},
        "network must have an output for each of 10 classes, got 9",
    ),
    "weights of another": (
        (PREDICT, {**PARAMS, "stem": PARAMS["body"]}),
        {},
        r"network must run as predict\(params, x\), got .*\(for images of shape \(8, 8, 1\)\)",
    ),
    "no statistics": (
        FUNCTIONS,
        {"ptq.reestimate_batchnorm": True},
        "config.ptq.reestimate_batchnorm must be false",
    ),
    "no training at all": (
        strangers.Linen(),
        {"parent.steps": 0, "model.make": "nothing:here"},
        "config.parent.steps must be above 0 for a network without weights, got 0",
    ),
    "softmax": (
        (probabilities, lambda p, x, key: (probabilities(p, x), p), PARAMS),
        {"effort": "finetune"},
        "got probabilities: leave its last softmax out",
    ),
    "sigmoid": (
        (sigmoids, lambda p, x, key: (sigmoids(p, x), p), PARAMS),
        {"effort": "finetune"},
        "got probabilities: leave its last sigmoid out",
    ),
    "no BatchNorm": (
        FUNCTIONS,
        {"effort": "mixture", "experts.count": 3},
        "config.experts.criteria must be of what the network has, got 'batchnorm_scale'",
    ),
    "a mixture of a cascade": (
        FUNCTIONS,
        {"effort": "mixture", "mixture.kind": "cascade", "collapse.steps": 3},
        "config.collapse.steps must not be given for a cascade",
    ),
    "a platform that is not here": (
        FUNCTIONS,
        {"deploy.targets": ("stablehlo",), "deploy.platforms": ("rocm", "tpu")},
        r"config.deploy.platforms must hold '(cpu|cuda)', on which .*, got \('rocm', 'tpu'\)",
    ),
    "too few bytes": (
        FUNCTIONS,
        {"budget.bytes": 300},
        r"budget of bytes must be at least \d+, got 300",
    ),
    "too few MACs for bits": (FUNCTIONS, {"budget.macs": 0.9}, "'finetune' removes channels too"),
    "too few MACs for widths": (
        FUNCTIONS,
        {"effort": "finetune", "budget.macs": 0.01},
        "channels and bits do not meet it",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_done_is_refused_at_the_start(case, tmp_path):
    network, changes, message = CASES[case]
    config = settings(**({"effort": "ptq"} | changes))
    with pytest.raises(ValueError, match=message) as told:
        recipes.compress(network, strangers.digits(), workdir=tmp_path / "run", config=config)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("images", "changes", "message"),
    [
        (lambda x: x[:64, ..., None], {"effort": "finetune"}, "images must have labels for effort"),
        (
            values,
            {"effort": "mixture", "mixture.kind": "cascade"},
            "confidence must be given for a cascade where outputs are no classes",
        ),
        (
            values,
            {"effort": "mixture", "experts.diversity": "classes"},
            "config.experts.diversity must be without 'classes'",
        ),
        (
            few,
            {"effort": "mixture", "experts.diversity": "cluster", "experts.count": 64},
            r"config.experts.count must be at most the \d+ training images .*, got 64",
        ),
    ],
)
def test_images_that_do_not_do_are_refused_at_the_start(images, changes, message, tmp_path):
    config = settings(**changes)
    given = images(strangers.digits()[0])
    with pytest.raises(ValueError, match=message):
        recipes.compress(FUNCTIONS, given, workdir=tmp_path / "run", config=config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [{}, {"loss": lambda outputs, labels: outputs.mean(-1)}])
def test_labels_are_smoothed_for_cross_entropy_alone(given, tmp_path):
    images, labels = strangers.digits()
    config = settings("ptq", **{"parent.label_smoothing": 0.1})
    message = (
        "config.parent.label_smoothing must be 0 where the loss is no cross-entropy .*, got 0.1"
    )
    own = (images, labels) if given else values(images)
    with pytest.raises(ValueError, match=message):
        recipes.compress(strangers.Linen(), own, workdir=tmp_path / "run", config=config, **given)
    assert not (tmp_path / "run").exists()


def test_a_target_that_is_not_installed_is_told(monkeypatch):
    assert files.lacking(["onnx", "tflite", "packed", "stablehlo", "c"]) == []
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert files.lacking(["packed", "onnx"]) == [
        "onnx: onnxruntime is not installed; `pip install 'hybrid_jax[onnx]'` brings it"
    ]


def test_a_file_above_the_budget_is_told():
    config = recipes.read(settings("ptq", **{"budget.bytes": 100}))
    network = models.Network(PREDICT, TRAIN, PARAMS)
    parent = recipes.Task(network, data.take(strangers.digits()), None, None).parent
    made = {
        "onnx": report.File("net.onnx", bytes=101),
        "c": report.File("net.c", bytes=500, flash=100),
    }
    assert within.above(parent, config, made) == [
        "onnx: 101 bytes, above the budget of 100: the run was made for other targets"
    ]
