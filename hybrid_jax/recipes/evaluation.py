"""The table: every model and every control on the test images, which nothing reads before."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core, cost, deploy, experts
from hybrid_jax import program as p
from hybrid_jax.recipes import controls
from hybrid_jax.recipes.job import Job
from hybrid_jax.recipes.programs import Models, Programs, artifact, logits, top_class


class Price(NamedTuple):
    """What using a model costs: everything stored, and what runs for one image."""

    parameters_total: float
    parameters_active: float
    macs: float
    bops: float


def evaluate(job: Job, models: Models, programs: Programs) -> dict:
    """Returns the parts of `results.json` that come from the test images: rows, gate, layers.

    Writes every model that can be shipped to a packed file in deploy/; a row's size is its file's.
    """
    test, combine = job.splits.test, jax.jit(experts.combine)
    expert_logits = logits(job, models.made, test)
    gate_logits = job.logits(models.gate.predict, models.gate.params, test)
    prices = [_price(c) for c in controls.costs(models.made)]
    gate_price = _price(controls.gate_cost(models.gate))
    nothing = Price(0, 0, 0, 0)
    times, files = _latencies(job, models, programs), _files(job, programs)
    weights = _weights(
        gate_logits, expert_logits, test.labels, job.key("random gate"), job.config.gate.k
    )
    rows: list[dict] = []

    def add(name, kind, logits, price, file=None, time=None, note=""):
        correct = np.asarray(top_class(logits)) == test.labels
        ratio = None if time is None else times[time]
        rows.append(_row(name, kind, correct, rows, price, files.get(file, {}), ratio, note))

    def add_mixture(name, kind, gate, file=None, time=None, note=""):
        own = weights[name]
        price = _mixture_price(prices, gate, (np.asarray(own) > 0).mean(0))
        add(name, kind, combine(expert_logits, own), price, file, time, note)

    dense_logits = job.logits(models.dense.predict, models.variables, test)
    dense_graph = core.trace(models.dense.predict, models.variables, job.images)
    add("dense parent", "dense", dense_logits, _price(cost.count(dense_graph)), "dense", "dense")
    for e, spec in enumerate(models.made.specs):
        note = f"{spec.criterion}, {spec.weight_bits}-bit weights"
        name = f"expert {e}"
        add(name, "expert", expert_logits[e], prices[e], name, spec.sparsity, note)
    for k in dict.fromkeys((1, job.config.gate.k)):
        time, note = ("top-1", "") if k == 1 else ("all", "timed with all experts run")
        add_mixture(f"top-{k} mixture", "mixture", gate_price, "mixture", time, note)
    add_mixture("soft mixture", "mixture", gate_price, "mixture", "all")

    source, best = programs.chosen
    best_logits = logits(job, source, test)[best]
    when = "after" if source is models.made else "before"
    note = f"expert {best} {when} joint training, by validation"
    width = models.made.specs[best].sparsity
    add("best single expert", "control", best_logits, prices[best], "expert", width, note)
    note = "of logits; timed with the gate"
    add_mixture("average of all experts", "control", nothing, time="all", note=note)
    note = "not deployable: a bound"
    add_mixture("random gate", "control", nothing, time="random", note=note)
    add_mixture("oracle gate", "control", nothing, note="not deployable: reads the label")
    for name, single in models.singles.items():
        (spec,), (price,) = single.specs, [_price(c) for c in controls.costs(single)]
        note = f"{spec.sparsity:.0%} of channels removed, {spec.weight_bits}-bit weights"
        add(name, "control", logits(job, single, test)[0], price, name, name, note)

    return {
        "rows": rows,
        "gate": gate_use(gate_logits, test.labels, job.splits.num_classes),
        "disagreement": jax.jit(experts.disagreement)(expert_logits).tolist(),
        "layers": _layers(models, dense_graph),
    }


def gate_use(gate_logits: jax.Array, labels: jax.Array, num_classes: int) -> dict:
    """Returns how the top-1 mixture uses its experts, and whether the gate has collapsed.

    Gate logits are (n, E), N is `num_classes`.

    Example:
      >>> use = gate_use(jnp.array([[2.0, 0.0], [1.0, 0.0]]), jnp.array([0, 1]), num_classes=2)
      >>> use['share'], use['entropy'], use['collapsed'], use['unused']
      ([1.0, 0.0], 0.0, True, [1])
    """
    use = _use(gate_logits, labels, num_classes)
    found = {name: value.tolist() for name, value in use.items()}
    return found | {"unused": np.flatnonzero(use["unused"]).tolist()}


@functools.partial(jax.jit, static_argnums=2)
def _use(gate_logits, labels, num_classes):
    chosen = experts.top_k(1)(gate_logits).weights
    share = experts.usage(chosen)
    return {
        "usage": experts.usage_per_class(chosen, labels, num_classes),
        "share": share,
        "entropy": experts.usage_entropy(share),
        "collapsed": experts.collapsed(share),
        "unused": experts.unused(share),
    }


@functools.partial(jax.jit, static_argnums=4)
def _weights(gate_logits, expert_logits, labels, key, k):
    """{mixture: weight (n, E) of each expert}."""
    return {
        **{f"top-{k} mixture": experts.top_k(k)(gate_logits).weights for k in (1, k)},
        "soft mixture": experts.soft()(gate_logits).weights,
        "average of all experts": jnp.full(gate_logits.shape, 1 / gate_logits.shape[-1]),
        "random gate": experts.random()(gate_logits, key).weights,
        "oracle gate": experts.oracle(expert_logits, labels),
    }


def _files(job, programs) -> dict[str, dict]:
    """{model: where its packed file lies in the run, and its bytes}."""
    own = {
        "dense": programs.dense,
        **{f"expert {e}": program for e, program in enumerate(programs.experts)},
        "mixture": programs.mixture,
        "expert": programs.best,
        **programs.singles,
    }
    files = {}
    for name, program in own.items():
        file = artifact(name, "packed")
        written = deploy.export_to("packed", job.workdir / file, program)
        files[name] = {"artifact": file, "bytes": written["bytes"]}
    return files


def _row(name, kind, correct, rows, price, file, ratio, note):
    accuracy = float(correct.mean())
    return {
        "name": name,
        "kind": kind,
        "accuracy": accuracy,
        "delta": accuracy - (rows[0]["accuracy"] if rows else accuracy),
        "correct": correct.astype(int).tolist(),
        **price._asdict(),
        "artifact": None,
        "bytes": None,
        **file,
        "latency_ratio": ratio,
        "note": note,
    }


def _price(counted: cost.Cost) -> Price:
    parameters = counted.nonzero
    return Price(parameters, parameters, counted.macs, counted.bops)


def _mixture_price(prices, gate, used) -> Price:
    """All experts and the gate are stored; `used` (E,) is how often each expert runs."""

    def expected(field):
        return float(sum(u * getattr(p, field) for u, p in zip(used, prices, strict=True)))

    return Price(
        sum(p.parameters_total for p in prices) + gate.parameters_total,
        expected("parameters_active") + gate.parameters_active,
        expected("macs") + gate.macs,
        expected("bops") + gate.bops,
    )


def _latencies(job, models, programs):
    """Ratio of each model's time for one image to the dense parent's; fake-quantized, in floats."""
    image = job.normalize(job.splits.validation.images[:1])
    gate, *each = map(p.simulate, programs.mixture.parts)

    def every(x):
        weights = jax.nn.softmax(gate(x))
        return experts.combine(jnp.stack([expert(x) for expert in each]), weights)

    run = {
        "dense": p.simulate(programs.dense),
        "top-1": p.simulate(programs.mixture),
        "all": every,
    }
    # One of each width: experts of equal shape take equally long.
    widths = [spec.sparsity for spec in models.made.specs]
    run |= dict(zip(widths, each, strict=True))
    run |= {name: p.simulate(program) for name, program in programs.singles.items()}
    run = {name: jax.jit(fn) for name, fn in run.items()}
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
