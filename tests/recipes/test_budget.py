"""Budgets: what is chosen keeps them in the files that are written."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import public
import pytest

from hybrid_jax import core, deploy, models, pruning, quantization
from hybrid_jax import program as p
from hybrid_jax.recipes import budget, choices

BITS = {"weight": (4, 8), "activation": (8,)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bytes": 0}, r"bytes must be an integer ≥ 1 or a float in \(0, 1\], got 0"),
        ({"memory": 1.5}, r"memory must be an integer ≥ 1 or a float in \(0, 1\], got 1.5"),
        ({"macs": True}, "macs must be an integer"),
        ({"bops": "1e9"}, "bops must be an integer"),
        ({"latency": 1, "runtime": "onnx"}, r"latency must be a float in \(0, 1\], got 1"),
        ({"latency": 0.5}, "latency and runtime must be given together, got latency 0.5 and"),
        ({"latency": 0.5, "runtime": "onix"}, "runtime must be one of .* did you mean onnx"),
    ],
)
def test_bad_budgets(fields, message):
    with pytest.raises(ValueError, match=message):
        budget.Budget(**fields)


def test_limits_by_hand():
    asked = budget.Budget(bytes=64_000, macs=0.25, memory=1.0, latency=0.5, runtime="c")
    parent = {"bytes": 10**6, "macs": 1001, "memory": 77, "bops": 5}
    assert asked.limits(parent) == {"bytes": 64_000, "macs": 250, "memory": 77}


class Tailor:
    """Makes as many bytes as it may; they weigh more than counted, and run as slow as the MACs."""

    def __init__(self, beside):
        self.beside, self.asked = beside, []

    def make(self, limits):
        self.asked.append(dict(limits))
        if limits["bytes"] < 10:
            raise quantization.CannotBeMet("budget of bytes must be at least 10")
        made = limits["bytes"], limits.get("macs", 1000)
        return made, dict(zip(("bytes", "macs"), made, strict=True))

    def measure(self, made):
        return {"bytes": made[0] + self.beside(made[0]), "latency": made[1] / 800}


def test_meet_asks_for_less_by_what_was_off():
    tailor = Tailor(lambda n: 10 + n // 10)
    made, found = budget.meet({"bytes": 100}, tailor.make, tailor.measure)
    assert [asked["bytes"] for asked in tailor.asked] == [100, 80]
    assert (made[0], found["bytes"]) == (80, 98)


def test_meet_takes_latency_as_the_macs():
    tailor = Tailor(lambda n: 0)
    made, found = budget.meet({"bytes": 50, "latency": 0.5}, tailor.make, tailor.measure)
    assert tailor.asked == [{"bytes": 50}, {"bytes": 50, "macs": 400}]
    assert (made, found["latency"]) == ((50, 400), 0.5)


def test_meet_says_what_was_measured():
    with pytest.raises(quantization.CannotBeMet, match="at most 40, got 100; budget of bytes must"):
        budget.meet({"bytes": 40}, *(lambda t: (t.make, t.measure))(Tailor(lambda n: 60)))
    grows = Tailor(lambda n: 200 - n)
    with pytest.raises(quantization.CannotBeMet, match="got 200; measured of the last of 2 that"):
        budget.meet({"bytes": 150}, grows.make, grows.measure, tries=1)
    assert len(grows.asked) == 2


@pytest.fixture(scope="module")
def traced(digits):
    graph = core.trace(digits.fn, digits.params, digits.images[:1])
    return graph, quantization.spec(graph), p.lower(digits.fn, digits.params, digits.images[:4])


@pytest.fixture(scope="module")
def measured(digits, traced):
    _, spec, net = traced
    return choices.measure_bits(choices.offer(net, spec, BITS), [(digits.images[:64],)])


def written(path, fn, params, x, stated, targets):
    """{target: manifest} of the files of a network."""
    planned = quantization.plan(p.lower(fn, params, x), stated)
    program = quantization.encode(
        planned, quantization.calibrate_edges(planned, [(x,)]), x, check=False
    )
    return {t: deploy.TARGETS[t].export(path / f"net{deploy.TARGETS[t].suffix}", program)
            for t in targets}  # fmt: skip


def test_bits_that_keep_a_budget(digits, traced, measured, tmp_path):
    _, spec, _ = traced
    whole = choices.choose(measured, {})
    assert {own["weight"] for own in whole.bits.values()} == {8}  # where nothing asks for fewer
    ends = [whole.costs["bytes"]]
    with pytest.raises(ValueError, match="effort 'ptq' chooses bits only, 'finetune' removes") as e:
        choices.choose(measured, {"bytes": ends[0] // 2})
    ends.append(int(str(e.value).split("at least ")[1].split(",")[0]))
    limits = {"bytes": sum(ends) // 2}
    found = choices.choose(measured, limits)
    weights = [roles["weight"] for roles in found.bits.values()]
    assert set(weights) == {4, 8}
    assert all(roles["activation"] == 8 for roles in found.bits.values())
    stated = quantization.with_bits(spec, found.bits)
    files = written(tmp_path, digits.fn, digits.params, digits.images[:8], stated, ["c"])
    assert_counted(files["c"], found.costs)
    chosen = zip(measured.bits.values(), weights, strict=True)
    assert found.damage == pytest.approx(sum(own["weight"][b] for own, b in chosen))


def test_fewer_bits_are_no_better_than_more_whatever_was_measured():
    alike = {8: 0.0, 6: 1e-3, 4: 4e-3}
    got = choices._rising({4: 0.02, 6: -0.01, 8: 0.0}, alike)
    assert got == {8: 0.0, 6: pytest.approx(1e-9), 4: pytest.approx(0.02)}
    assert got[8] < got[6] < got[4]
    assert choices._rising({4: -0.02, 8: 0.0}, alike)[4] == pytest.approx(4e-9)


def test_no_effort_meets_what_no_width_does(measured):
    with pytest.raises(ValueError, match="got 100: no effort meets it, a smaller network could"):
        choices.choose(measured, {"bytes": 100})


def test_widths_and_bits_keep_a_budget_on_the_narrowed_network(digits, traced, measured, tmp_path):
    graph, spec, _ = traced
    scores = pruning.magnitude(graph.kernels, digits.params)
    widths = choices.measure_widths(
        digits.fn, digits.params, graph, scores, digits.images[:64], parts=(0.5,)
    )
    assert {name: (min(own), max(own)) for name, own in widths.items()} == {
        group.name: (group.size // 2, group.size) for group in graph.groups
    }
    made = choices.with_widths(measured, graph, widths)
    assert sorted(made.groups.values()) == sorted(group.name for group in graph.groups)
    whole = choices.choose(made, {})
    assert whole.damage == pytest.approx(0, abs=1e-6)
    asked = {"bytes": 2, "memory": 3, "macs": 2}
    limits = {name: whole.costs[name] * part // 4 for name, part in asked.items()}
    found = choices.choose(made, limits)
    assert all(found.costs[name] <= most for name, most in limits.items())
    small, params = narrowed(digits.fn, digits.params, graph, scores, digits.images, found.widths)
    assert core.trace(small, params, digits.images[:1]).macs == found.costs["macs"]
    stated = quantization.with_bits(spec, found.bits)
    files = written(tmp_path, small, params, digits.images[:8], stated, ["c"])
    assert_counted(files["c"], found.costs)
    with pytest.raises(ValueError, match="channels and bits do not meet it, a smaller network"):
        choices.choose(made, {"macs": 100})
    with pytest.raises(ValueError, match=r"group of widths must be one of .*, got 'stem'"):
        choices.with_widths(measured, graph, {"stem": {1: 0.0}})


def assert_counted(manifest, costs):
    """Bands of rows take less memory than is counted, and windows of their own."""
    assert manifest["flash"] == pytest.approx(costs["bytes"], rel=0.05)
    assert manifest["ram"] <= costs["memory"]


def narrowed(fn, params, graph, scores, x, widths):
    """The network with so many channels of each group, the best ones."""
    each = pruning.group_scores(scores, graph.groups)
    keep = {name: jnp.ones(len(own), bool) for name, own in each.items()}
    keep = pruning.to_widths(keep, each, {name: (n,) for name, n in widths.items()})
    return core.shrink(fn, params, core.expand(keep, graph.groups, params), x[:2])[:2]


@pytest.mark.parametrize("bits", [8, 3])
def test_every_target_holds_kernels_as_is_said(digits, traced, bits, tmp_path):
    _, spec, _ = traced
    stated = quantization.with_bits(spec, {s.name: {"weight": bits} for s in spec.sites})
    modules = {"onnx": "onnx", "openvino": "onnx", "tflite": "ai_edge_litert"}
    targets = [
        t for t in deploy.TARGETS if t not in modules or importlib.util.find_spec(modules[t])
    ]
    files = written(tmp_path, digits.fn, digits.params, digits.images[:8], stated, targets)
    for target, manifest in files.items():
        held = deploy.TARGETS[target].holds.kernel_bits
        assert min(manifest["kernel_bits"]) == min(b for b in held if b >= bits), target


@pytest.mark.parametrize("shortcut", ["pad", "project"])
def test_every_group_of_a_residual_network_has_its_own(shortcut):
    model = models.create("resnet8", 5, blocks=(1, 2), widths=(4, 6), shortcut=shortcut)
    x = jnp.zeros((1, 8, 8, 3))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    graph = core.trace(model.apply, variables, x)
    net = p.lower(model.apply, variables, x, check=False)
    none = {group.name: {1: 0.0, group.size: 0.0} for group in graph.groups}
    made = choices.with_widths(choices.offer(net, quantization.spec(graph), BITS), graph, none)
    assert sorted(made.groups.values()) == sorted(none)
    found = choices.choose(made, {"macs": graph.macs // 3})
    keep = {g.name: np.arange(g.size) < found.widths[g.name] for g in graph.groups}
    assert core.narrow_graph(graph, keep).macs == found.costs["macs"] <= graph.macs // 3


def test_bits_that_nothing_limited_pays_stay_as_asked(digits, traced):
    """A budget of MACs cuts channels alone: the first fault of the study of CIFAR-10."""
    graph, _, net = traced
    asked = quantization.spec(graph, weight_bits=4, activation_bits=6, first_last_bits=8)
    scores = pruning.magnitude(graph.kernels, digits.params)
    widths = choices.measure_widths(
        digits.fn, digits.params, graph, scores, digits.images[:16], parts=(0.5,)
    )
    for limits in ({"macs": graph.macs // 2}, {"memory": 4000}):
        offered = choices.offer(net, asked, budget.what_pays(limits, ["c", "onnx"]))
        offered = choices.measure_bits(offered, [(digits.images[:16],)], "minmax")
        found = choices.choose(choices.with_widths(offered, graph, widths), limits)
        assert min(found.widths.values()) < 16
        assert found.bits == {
            s.name: {"weight": s.weight.bits, "activation": s.activation.bits} for s in asked.sites
        }
    weights = budget.what_pays({"bytes": 1}, ["c"])
    offered = choices.measure_bits(
        choices.offer(net, asked, weights), [(digits.images[:16],)], "minmax"
    )
    assert {b for own in offered.bits.values() for b in own["weight"]} == {4, 8}
    activations = [own["activation"] for own in choices.choose(offered, {}).bits.values()]
    assert activations == [s.activation.bits for s in asked.sites]


def test_a_kernel_keeps_the_bits_that_it_has_at_least(digits, traced):
    graph, spec, net = traced
    site = graph.sites[1].name
    for least, of_site in ((8, {8}), (5, {8}), (4, {4, 8}), (9, {8})):
        made = choices.offer(net, spec, {"weight": (4, 8)}, {site: least})
        made = choices.measure_bits(made, [(digits.images[:16],)], "minmax")
        offered = {net.sources[op].site: set(own["weight"]) for op, own in made.bits.items()}
        assert offered == {s.name: {4, 8} for s in graph.sites} | {site: of_site}
    most = choices.choose(made, {}).costs["bytes"]
    found = choices.choose(made, {"bytes": most * 9 // 10}).bits
    assert found[site]["weight"] == 8
    assert min(own["weight"] for own in found.values()) == 4


def test_bops_are_fewer_by_fewer_bits_of_activations(digits, traced):
    _, spec, net = traced
    bits = {"weight": (4, 8), "activation": (4, 8)}
    made = choices.offer(net, spec, bits)
    whole = choices.choose(made, {}).costs["bops"]
    assert whole == traced[0].macs * 64
    made = choices.measure_bits(made, [(digits.images[:16],)], "minmax")
    found = choices.choose(made, {"bops": whole * 2 // 5})
    assert found.costs["bops"] <= whole * 2 // 5
    assert any(roles["activation"] == 4 for roles in found.bits.values())
    stated = quantization.with_bits(spec, found.bits)
    macs = {site.name: site.macs for site in traced[0].sites}
    assert found.costs["bops"] == sum(
        macs[own.name] * own.weight.bits * own.activation.bits for own in stated.sites
    )


# Measured: 63,968 bytes of constants and 30,776 of memory in C, 63,916 bytes of the ONNX file.
@pytest.mark.slow
def test_a_public_network_in_64_kb_and_32_kb(tmp_path):
    fn, params = public.network("resnet20", "resnet20_cifar10_jpeg")
    images = jnp.asarray(public.cifar10("train", 50)[0])
    graph = core.trace(fn, params, images[:1])
    limits = budget.Budget(bytes=64_000, memory=32_000).limits({})
    bits = budget.what_pays(limits, ["c", "onnx"])
    offered = choices.offer(p.lower(fn, params, images[:4]), quantization.spec(graph), bits)
    with pytest.raises(ValueError, match=r"must be at least .* 'finetune' removes channels too"):
        choices.choose(offered, limits)
    scores = pruning.magnitude(graph.kernels, params)
    widths = choices.measure_widths(fn, params, graph, scores, images)
    offered = choices.with_widths(choices.measure_bits(offered, [(images,)]), graph, widths)
    for targets in (["c"], ["c", "onnx"]):

        def make(limits, targets=targets):
            found = choices.choose(offered, limits, targets)
            return (*narrowed(fn, params, graph, scores, images, found.widths), found), found.costs

        def measure(made, targets=targets):
            small, params, found = made
            stated = quantization.with_bits(offered.spec, found.bits)
            return budget.measured(written(tmp_path, small, params, images, stated, targets))

        (_, _, found), real = budget.meet(limits, make, measure)
        assert 0.97 * 64_000 <= real["bytes"] <= 64_000  # none of it lies idle
        assert real["memory"] <= 32_000
        assert real["bytes"] == pytest.approx(found.costs["bytes"], rel=0.05)
        assert 0 <= found.costs["memory"] - real["memory"] <= 576  # a row of a kernel
