"""What a run would do, told before it is begun."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybrid_jax.recipes import budget
from hybrid_jax.recipes.controls import cost_of
from hybrid_jax.recipes.cut import Model
from hybrid_jax.report.formatting import si


def describe(
    parent: Model,
    stages: Sequence[Any],
    limits: Mapping[str, float],
    targets: Sequence[str],
    planned: Mapping[str, int],
) -> str:
    """Returns the plan of a run: sites, groups of channels, what is frozen and why, costs, stages.

    `limits` are {cost: the most that it may be}, `planned` {cost: what keeps them, by count}; bytes
    are those of the largest file of `targets`.
    """
    return "\n".join(_lines(parent, stages, limits, targets, planned))


def _lines(parent, stages, limits, targets, planned) -> Iterator[str]:
    graph, price = parent.cut.graph, cost_of(parent)
    yield f"{len(graph.sites)} sites, of {si(price.macs)} MACs and {si(price.parameters)} weights:"
    for site in graph.sites:
        shape = "×".join(map(str, site.kernel_shape))
        yield f"  {site.name}  {shape}  {si(site.macs)} MACs"
    yield f"{len(graph.groups)} groups of channels that can be removed:"
    for group in graph.groups:
        coupled = dict.fromkeys(member.path for member in group.members)
        yield f"  {group.name}  {group.size} channels, in {len(coupled)} parameters"
    whole = {}
    for path, axis, reason in graph.frozen:
        whole.setdefault(reason, []).append(f"{path} axis {axis}")
    if whole:
        yield "what cannot be removed, and why:"
    for reason, axes in whole.items():
        more = f" and {len(axes) - 3} more" if len(axes) > 3 else ""
        yield f"  {', '.join(axes[:3])}{more}: {reason}"
    yield "in floats, and the budget:"
    costs = budget.parent_costs(parent.cut.program, targets)
    for name in budget.NAMES:
        asked = f", at most {si(limits[name])}" if name in limits else ""
        found = f", about {si(planned[name])} within the budget" if name in planned else ""
        yield f"  {name} {si(costs[name])}{asked}{found}"
    if "latency" in limits:
        yield f"  latency 1×, at most {limits['latency']}×"
    names = [getattr(stage, "name", None) or stage.__name__ for stage in stages]
    yield f"stages: {', '.join(names)}"
