"""What the report says first: what to ship, in a line, why, in another, and what could be."""

from collections import defaultdict

from hybrid_jax.report import choice, comparison
from hybrid_jax.report.document import Table
from hybrid_jax.report.formatting import (
    change,
    listing,
    milliseconds,
    p_value,
    score,
    si,
    times,
)
from hybrid_jax.report.rows import File, Results, difference


def headline(results: Results) -> list[str]:
    """What to ship and why: a line for each model that is shipped, and for each reason.

    Targets for which they are the same share them.
    """
    chosen = choice.choose(results)
    if not chosen:
        return ["Nothing to ship: no file of this run was run on the test images."]
    ship, files, why = defaultdict(list), defaultdict(list), defaultdict(list)
    for target, own in chosen.items():
        others = [c for c in choice.that_ran(results)[target] if c.row is not own.row]
        model = _model(results, own, others)
        ship[model].append(target)
        files[model].append(_file(own, others))
        why[" ".join([*_why(results, own, others), *_mixture(results, own, others)])].append(target)
    return [
        (f"For {listing(targets)} ship" if len(ship) > 1 else "Ship")
        + f" {model}: {'; '.join(files[model])}."
        for model, targets in ship.items()
    ] + [
        (f"{listing(targets)}: " if len(why) > 1 else "") + reason
        for reason, targets in why.items()
    ]


def table(results: Results) -> Table:
    """Every file that could be shipped and was run, a line each; the one to ship stands out."""
    chosen, found = choice.choose(results), choice.candidates(results)
    found = [c for c in found if c.was_run] or found
    parents = {c.target: c.file for c in found if c.row.role == "parent"}
    columns = {
        "model": lambda c: c.row.name,
        "target": lambda c: c.target,
        results.metric: lambda c: score(results.metric, c.file.accuracy),
        "Δ": lambda c: change(
            results.metric, difference(c.file.accuracy, parents.get(c.target, File("")).accuracy)
        ),
        "size": lambda c: si(c.file.bytes, "B"),
        "RAM": lambda c: si(c.row.memory if c.file.ram is None else c.file.ram, "B"),
        "MACs": lambda c: si(c.row.macs),
        "time": lambda c: milliseconds(c.file.milliseconds),
        "× parent": lambda c: times(c.file.ratio, c.file.ratio_quartiles),
    }
    return Table.of(found, columns, lambda c: c == chosen.get(c.target))


def _loss(results) -> str:
    share = 100 * results.allowed_loss
    if results.metric != "accuracy":
        return f"{share:g} % of the parent's {results.metric}"
    return f"{share:g} point{'' if share == 1 else 's'}"


def _model(results, own, others):
    """What is shipped, and its accuracy against the parent's."""
    parent = choice.parent_of(others)
    against = f" ({_against(results, own, parent)})" if parent else ""
    return f"{own.row.name}, {results.metric} {score(results.metric, own.file.accuracy)}{against}"


def _file(own, others):
    """The file, its size, and its time against the parent."""
    parent = choice.parent_of(others)
    text = f"{own.file.artifact} has {si(own.file.bytes, 'B')}"
    text += f" ({_size(own, parent)} than the parent)" if parent else ""
    if own.file.milliseconds is not None:
        text += f" and takes {milliseconds(own.file.milliseconds)} an image"
        text += f" ({_time(own.file)})" if parent and own.file.ratio is not None else ""
    return text


def _against(results, a, b):
    """The difference in accuracy between two files, and whether it is one."""
    delta = difference(a.file.accuracy, b.file.accuracy)
    unit = " points" if results.metric == "accuracy" else ""
    text = f"{change(results.metric, delta)}{unit} against {_the(b.row)}"
    test = comparison.paired(a.row, b.row)
    if test is None:
        return text
    chance = test.p_value >= comparison.SIGNIFICANCE
    return f"{text}, {'within chance' if chance else p_value(test.p_value)}"


def _the(row):
    return "the parent" if row.role == "parent" else row.name


def _size(a, b):
    ratio = a.file.bytes / b.file.bytes
    return f"{times(max(ratio, 1 / ratio))} {'larger' if ratio > 1 else 'smaller'}"


def _time(file):
    low, high = file.ratio_quartiles or (file.ratio, file.ratio)
    if low <= 1 <= high and low < high:
        return "the parent's time, within the noise"
    return f"{times(file.ratio)} the parent's time"


def _why(results, own, others):
    """The reason for the choice."""
    within = choice.within(results, [own, *others])
    rest = [c for c in others if c.row.role != "parent"]
    kept = choice.kept_limits(results, [own, *others])
    if results.limits and not kept:
        yield f"No file keeps the budget of {_limits(results)}."
    if kept:
        best = (
            f"the most accurate of {len(kept)} that keep" if len(kept) > 1 else "the one that keeps"
        )
        yield f"It is {best} the budget of {_limits(results)}."
    elif own not in within:
        yield f"No file loses at most {_loss(results)}; this one loses least."
    elif own.row.role == "parent":
        yield "Nothing that was made beats the float parent:"
        if within != [own]:
            yield f"what loses at most {_loss(results)} is no smaller."
        elif rest:
            nearest = max(rest, key=lambda c: c.file.accuracy)
            yield f"the nearest is “{nearest.row.name}” ({_against(results, nearest, own)})."
        else:
            yield "there is no other file."
    elif own.row.role == "parent_int8" and rest:
        yield "It is the parent in int8, without training:"
        if all(choice.dominates(results, own, c) for c in rest):
            yield "no other file is better in anything beyond the noise."
        else:
            yield f"no other file that loses at most {_loss(results)} is smaller."
    else:
        made = [c for c in within if c.row.role != "parent"]
        count = len(made)
        yield "It alone loses" if count == 1 else f"It is the smallest of {count} files that lose"
        yield f"at most {_loss(results)}."


def _limits(results) -> str:
    """The budget in words."""
    units = {"bytes": "B", "memory": "B of memory", "macs": " MACs", "bops": " BOPs"}
    return listing(
        f"{times(most)} the parent's time" if name == "latency" else si(most, units[name])
        for name, most in results.limits.items()
    )


def _mixture(results, own, others):
    """What is to be said of the mixture, so that it is not praised where a simpler choice is."""
    if own.row is comparison.subject(results):
        parents = [row.name for row in results.of("parent", "parent_int8")]
        unbeaten = [
            c.rival
            for c in comparison.compare(results)
            if c.rival not in parents and not (c.significant and c.difference > 0)
        ]
        if unbeaten:
            yield f"In accuracy it does not beat {listing(unbeaten)}."
    for mixture in [c for c in others if c.row.role == "mixture"]:
        better = [c for c in (own, *others) if choice.dominates(results, c, mixture)]
        name = f"“{mixture.row.name}”"
        if better:
            merits = _merits(results, better[0], mixture)
            yield f"{name} buys nothing: “{better[0].row.name}” is {merits}."
        else:
            yield f"{name} ({_against(results, mixture, own)}) is {_size(mixture, own)} than it."


def _merits(results, a, b):
    """In what a, which dominates b, is as good as b, and in what better."""
    signs = choice.axes(results, a, b)
    words = {"bytes": "smaller", "time": "faster", "MACs": "cheaper", "memory": "needs less memory"}
    accuracy = "more accurate" if signs["accuracy"] else "as accurate"
    if a.file.accuracy != b.file.accuracy and not signs["accuracy"]:
        accuracy += " within chance"
    return listing([accuracy, *(word for axis, word in words.items() if signs.get(axis, 0) > 0)])
