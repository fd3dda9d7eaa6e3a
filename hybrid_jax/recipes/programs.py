"""What a run has made: its models, their answers, and the inference graphs that are deployed."""

from typing import Any, NamedTuple

import jax
import numpy as np

from hybrid_jax import core, data, deploy, experts, quantization
from hybrid_jax import program as p
from hybrid_jax.recipes import deployed
from hybrid_jax.recipes.deployed import Experts
from hybrid_jax.recipes.job import Job, Network
from hybrid_jax.recipes.phase2 import Gate


class Models(NamedTuple):
    """What a run has made.

    `dense` is the parent, `made` the experts of the mixture, `before` as they were before joint
    fine-tuning, and `singles` {name: a single compressed network}, the trained controls.
    """

    dense: Network
    variables: Any
    made: Experts
    before: Experts
    gate: Gate
    singles: dict[str, Experts]


class Programs(NamedTuple):
    """The inference graphs of `Models`; all take images as `Job.normalize` makes them.

    `best` is the best single expert, and `chosen` the experts that it is one of, and its index, see
    `best_expert`.
    """

    dense: p.Program
    experts: tuple[p.Program, ...]
    gate: p.Program
    best: p.Program
    chosen: tuple[Experts, int]
    singles: dict[str, p.Program]

    @property
    def mixture(self) -> p.Mixture:
        """The top-1 mixture, which runs the gate and one expert."""
        return p.Mixture(self.gate, self.experts)


def lower(job: Job, models: Models) -> Programs:
    """Returns the inference graph of everything that can be deployed."""
    experts.check_fitted(models.gate.fitted_to, models.made.params)
    images, gate = deployed.calibration_images(job), models.gate

    def encoded(planned: quantization.Plan, own: Any) -> p.Program:
        return quantization.encode(planned.replace(own["params"]), own["ranges"], images)

    def of(made: Experts, index: int = 0) -> p.Program:
        return encoded(made.each[index].planned, made.params[index])

    each = tuple(of(models.made, e) for e in range(len(models.made.each)))
    source, best = best_expert(job, models)
    return Programs(
        p.lower(models.dense.predict, models.variables, images),
        each,
        encoded(gate.planned, gate.params),
        each[best] if source is models.made else of(source, best),
        (source, best),
        {name: of(single) for name, single in models.singles.items()},
    )


def artifact(model: str, target: str) -> str:
    """Returns where in the work directory the file of a model for a target lies."""
    return f"deploy/{model.replace(' ', '_')}{deploy.TARGETS[target].suffix}"


def dense_integers(job: Job, models: Models) -> tuple[p.Program, np.ndarray]:
    """Returns the parent in integers, without training, and its logits (n, N) on the test images.

    Its kernels have 7 bits: stored in int8 they are no larger than those of 8, for which an ONNX
    file that is right on every x86 needs slower kernels.
    """
    images, predict = deployed.calibration_images(job), models.dense.predict
    graph = core.trace(predict, models.variables, job.images)
    spec = quantization.spec(graph, weight_bits=7, first_last_bits=7)
    planned = quantization.plan(p.lower(predict, models.variables, images), spec)
    ranges = quantization.calibrate_edges(planned, [(images,)])
    own = {"params": planned.program.params, "ranges": ranges}
    expected = job.logits(deployed.as_deployed(planned), own, job.splits.test)
    return quantization.encode(planned, ranges, images), expected


top_class = jax.jit(core.top_class)


def logits(job: Job, made: Experts, arrays: data.Arrays) -> np.ndarray:
    """Returns the logits (E, n, N) of all experts."""
    each = zip(made.fns, made.params, strict=True)
    return np.stack([job.logits(fn, own, arrays) for fn, own in each])


def top_1_logits(job: Job, models: Models) -> np.ndarray:
    """Returns the logits (n, N) of the top-1 mixture for the test images."""
    test = job.splits.test
    gate_logits = job.logits(models.gate.predict, models.gate.params, test)
    return np.asarray(_top_1(gate_logits, logits(job, models.made, test)))


@jax.jit
def _top_1(gate_logits, expert_logits):
    return experts.combine(expert_logits, experts.top_k(1)(gate_logits).weights)


def validation_accuracies(job: Job, made: Experts) -> np.ndarray:
    """Returns the accuracy (E,) of each expert on the validation images."""
    validation = job.splits.validation
    named = np.asarray(top_class(logits(job, made, validation)))
    return (named == validation.labels).mean(-1)


def best_expert(job: Job, models: Models) -> tuple[Experts, int]:
    """Returns the experts, those after joint training or before, and the index of the best.

    On the validation images, of all of both; of equals the first, and one after joint training.
    """
    scores = [
        (accuracy, made, e)
        for made in (models.made, models.before)
        for e, accuracy in enumerate(validation_accuracies(job, made))
    ]
    _, made, best = max(scores, key=lambda score: score[0])
    return made, best
