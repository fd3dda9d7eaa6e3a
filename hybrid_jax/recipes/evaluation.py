"""The table: every model and every control on the test images, which nothing reads before."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core, cost, data, deploy, experts
from hybrid_jax.recipes import controls, deployment, phase1
from hybrid_jax.recipes.job import Job, Network
from hybrid_jax.recipes.phase1 import Experts
from hybrid_jax.recipes.phase2 import Gate


class Models(NamedTuple):
    """What a run has made.

    Attributes:
      dense: The parent.
      variables: The parent's variables.
      made: The experts of the mixture.
      before: The experts as they were before joint fine-tuning.
      gate: The gate.
      singles: {name: a single compressed network}, the trained controls.
    """

    dense: Network
    variables: Any
    made: Experts
    before: Experts
    gate: Gate
    singles: dict[str, Experts]


class Price(NamedTuple):
    """What using a model costs: everything stored, and what runs for one image."""

    parameters_total: float
    bytes: float
    parameters_active: float
    macs: float
    bops: float


def evaluate(job: Job, models: Models) -> dict:
    """Returns the parts of `results.json` that come from the test images: rows, gate, layers.

    Args:
      job: The run.
      models: What it has made.

    Raises:
      ValueError: If the gate was fitted to other experts.
    """
    experts.check_fitted(models.gate.fitted_to, phase1.trained(models.made.stack))
    test, count = job.splits.test, len(models.made.specs)
    labels = jnp.asarray(test.labels)
    expert_logits = jnp.asarray(logits(job, models.made, test))
    gate_logits = jnp.asarray(job.logits(models.gate.predict, models.gate.params, test))
    prices = [_price(c) for c in controls.costs(models.made)]
    gate_price = _price(controls.gate_cost(models.gate))
    nothing = Price(0, 0, 0, 0, 0)
    times = _latencies(job, models)
    rows: list[dict] = []

    def add(name, kind, logits, price, time=None, note=""):
        correct = np.asarray(core.top_class(logits) == labels)
        ratio = None if time is None else times[time]
        rows.append(_row(name, kind, correct, rows, price, ratio, note))

    def add_mixture(name, kind, weights, gate, time=None, note=""):
        used = np.asarray(weights > 0).mean(0)
        price = _mixture_price(prices, gate, used)
        add(name, kind, experts.combine(expert_logits, weights), price, time, note)

    dense_logits = job.logits(models.dense.predict, models.variables, test)
    dense_graph = core.trace(models.dense.predict, models.variables, job.images)
    add("dense parent", "dense", dense_logits, _price(cost.count(dense_graph)), "dense")
    for e, spec in enumerate(models.made.specs):
        note = f"{spec.criterion}, {spec.weight_bits}-bit weights"
        add(f"expert {e}", "expert", expert_logits[e], prices[e], spec.sparsity, note)
    for k in dict.fromkeys((1, job.config.gate.k)):
        weights = experts.top_k(k)(gate_logits).weights
        time, note = ("top-1", "") if k == 1 else ("all", "timed with all experts run")
        add_mixture(f"top-{k} mixture", "mixture", weights, gate_price, time, note)
    add_mixture("soft mixture", "mixture", experts.soft()(gate_logits).weights, gate_price, "all")

    stage, best = _best_expert(job, models)
    source = models.made if stage == "phase 2" else models.before
    best_logits = logits(job, source, test)[best]
    note = (
        f"expert {best} {'after' if stage == 'phase 2' else 'before'} joint training, by validation"
    )
    width = models.made.specs[best].sparsity
    add("best single expert", "control", best_logits, prices[best], width, note)
    even = jnp.full(gate_logits.shape, 1 / count)
    add_mixture(
        "average of all experts", "control", even, nothing, "all", "of logits; timed with the gate"
    )
    drawn = experts.random()(gate_logits, job.key("random gate")).weights
    add_mixture("random gate", "control", drawn, nothing, "random", "not deployable: a bound")
    known = experts.oracle(expert_logits, labels)
    add_mixture("oracle gate", "control", known, nothing, None, "not deployable: reads the label")
    for name, single in models.singles.items():
        (spec,), (price,) = single.specs, [_price(c) for c in controls.costs(single)]
        note = f"{spec.sparsity:.0%} of channels removed, {spec.weight_bits}-bit weights"
        add(name, "control", logits(job, single, test)[0], price, name, note)

    return {
        "rows": rows,
        "gate": gate_use(gate_logits, labels, job.splits.num_classes),
        "disagreement": experts.disagreement(expert_logits).tolist(),
        "layers": _layers(models, dense_graph),
    }


def gate_use(gate_logits: jax.Array, labels: jax.Array, num_classes: int) -> dict:
    """Returns how the top-1 mixture uses its experts, and whether the gate has collapsed.

    Args:
      gate_logits: (n, E).
      labels: (n,) integers.
      num_classes: N.

    Example:
      >>> use = gate_use(jnp.array([[2.0, 0.0], [1.0, 0.0]]), jnp.array([0, 1]), num_classes=2)
      >>> use['share'], use['entropy'], use['collapsed'], use['unused']
      ([1.0, 0.0], 0.0, True, [1])
    """
    chosen = experts.top_k(1)(gate_logits).weights
    share = experts.usage(chosen)
    return {
        "usage": experts.usage_per_class(chosen, labels, num_classes).tolist(),
        "share": share.tolist(),
        "entropy": float(experts.usage_entropy(share)),
        "collapsed": bool(experts.collapsed(share)),
        "unused": np.flatnonzero(experts.unused(share)).tolist(),
    }


def logits(job: Job, made: Experts, arrays: data.Arrays) -> np.ndarray:
    """Returns the logits (E, n, N) of all experts."""
    return np.stack(
        [job.logits(made.predict, expert, arrays) for expert in experts.unstack(made.stack)]
    )


def top_1_logits(job: Job, models: Models) -> np.ndarray:
    """Returns the logits (n, N) of the top-1 mixture for the test images."""
    test = job.splits.test
    gate_logits = jnp.asarray(job.logits(models.gate.predict, models.gate.params, test))
    expert_logits = jnp.asarray(logits(job, models.made, test))
    return np.asarray(experts.combine(expert_logits, experts.top_k(1)(gate_logits).weights))


def validation_accuracies(job: Job, made: Experts) -> np.ndarray:
    """Returns the accuracy (E,) of each expert on the validation images."""
    validation = job.splits.validation
    named = np.asarray(core.top_class(logits(job, made, validation)))
    return (named == validation.labels).mean(-1)


def _best_expert(job, models):
    """(stage, index) of the expert that is best on validation, before or after phase 2."""
    scores = {}
    for stage, made in (("phase 2", models.made), ("phase 1", models.before)):
        scores |= {(stage, e): mean for e, mean in enumerate(validation_accuracies(job, made))}
    return max(scores, key=scores.get)


def _row(name, kind, correct, rows, price, ratio, note):
    accuracy = float(correct.mean())
    return {
        "name": name,
        "kind": kind,
        "accuracy": accuracy,
        "delta": accuracy - (rows[0]["accuracy"] if rows else accuracy),
        "correct": correct.astype(int).tolist(),
        **price._asdict(),
        "latency_ratio": ratio,
        "note": note,
    }


def _price(counted: cost.Cost) -> Price:
    parameters = counted.nonzero
    return Price(parameters, counted.bytes, parameters, counted.macs, counted.bops)


def _mixture_price(prices, gate, used) -> Price:
    """All experts and the gate are stored; `used` (E,) is how often each expert runs."""

    def expected(field):
        return float(sum(u * getattr(p, field) for u, p in zip(used, prices, strict=True)))

    return Price(
        sum(p.parameters_total for p in prices) + gate.parameters_total,
        sum(p.bytes for p in prices) + gate.bytes,
        expected("parameters_active") + gate.parameters_active,
        expected("macs") + gate.macs,
        expected("bops") + gate.bops,
    )


def _latencies(job, models):
    """Time of each model for one image as a ratio to the dense parent's, in this process."""
    image = job.normalize(job.splits.validation.images[:1])

    def runner(fn, params):
        return jax.jit(lambda x: fn(params, x))  # parameters as constants, as in what is deployed

    each = deployment.deployed_experts(job, models.made)
    gate = deployment.deployed_gate(job, models.gate)

    def every(params, x):
        weights = jax.nn.softmax(gate[0](params[0], x))
        outputs = [fn(own, x) for (fn, _), own in zip(each, params[1], strict=True)]
        return experts.combine(jnp.stack(outputs), weights)

    run = {
        "dense": runner(models.dense.predict, models.variables),
        "top-1": runner(*deployment.deployed_mixture(job, models.made, models.gate)),
        "all": runner(every, (gate[1], [params for _, params in each])),
    }
    # One of each width: experts of equal shape take equally long.
    widths = [spec.sparsity for spec in models.made.specs]
    run |= {width: runner(*expert) for width, expert in zip(widths, each, strict=True)}
    for name, single in models.singles.items():
        run[name] = runner(*deployment.deployed_experts(job, single)[0])
    calls = job.config.evaluation.latency_calls
    times = {
        name: deploy.latency(fn, run["dense"], image, pairs=calls).ratio for name, fn in run.items()
    }
    return times | {"random": float(np.mean([times[width] for width in widths]))}


def _layers(models, dense_graph):
    wide = {site.name: site.width for site in cost.count(dense_graph).sites}
    return [
        {
            "model": f"expert {e}",
            "site": site.name,
            "width": site.width,
            "dense_width": wide[site.name],
            "sparsity": site.sparsity,
            "weight_bits": site.weight_bits,
            "activation_bits": site.activation_bits,
        }
        for e, counted in enumerate(controls.costs(models.made))
        for site in counted.sites
    ]
