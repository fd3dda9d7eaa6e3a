"""What a reader of a report should not overlook."""

from collections.abc import Iterator

import numpy as np

from hybrid_jax import experts
from hybrid_jax.report.comparison import SIGNIFICANCE, paired, subject, usage_share
from hybrid_jax.report.formatting import listing, percent, si, times
from hybrid_jax.report.rows import File, Results

# Four independent networks gain 0.6 to 1.0 points over one on CIFAR-10 (WRN-28-10, ResNet-32x4),
# so a routed mixture that gains more should be checked.
SUSPICIOUS_GAIN = 0.01
ALIKE = 0.005
UNEQUAL = 0.05
AGREEMENT = 0.995


def of(results: Results) -> list[str]:
    """Everything that a reader should not overlook; empty where nothing looks wrong."""
    return [
        *_files(results),
        *_unequal_controls(results),
        *of_gate(results),
        *_suspicious_gain(results),
    ]


def of_gate(results: Results) -> Iterator[str]:
    """What is wrong with the gate of one run, or with the experts that it chooses from."""
    share = usage_share(results.gate)
    if share is not None:
        idle = [str(e) for e in np.flatnonzero(experts.unused(share))]
        if experts.collapsed(share):
            yield (
                f"The gate collapsed: expert {share.argmax()} gets "
                f"{percent(share.max())} of the images"
            )
        elif idle:
            yield (
                f"The gate hardly ever uses expert {listing(idle)} "
                "(less than a tenth of an even share)"
            )
    disagreement = np.asarray(results.disagreement, float)
    if disagreement.size > 1 and np.nanmax(disagreement) < ALIKE:
        yield (
            "The experts are alike: no two disagree on more than "
            f"{percent(np.nanmax(disagreement))} of the images, "
            "so the gate has nothing to choose from"
        )


def _files(results):
    """Files that are missing, that differ from their model, or are dearer than the parent's."""
    parent = results.first("parent")
    for row in results.rows:
        for target, file in row.files.items():
            name = f"{target} file of the {row.name}"
            if file.error:
                yield f"There is no {name}: {file.error}"
                continue
            if results.metric == "accuracy" and (file.agreement or 1) < AGREEMENT:
                yield (
                    f"The {name} agrees with the model on only {percent(file.agreement)} of the "
                    "test images"
                )
            if row.role not in ("parent", "control"):
                own = parent.files.get(target, File("")) if parent else File("")
                yield from (f"The {name} is {text}" for text in _drawbacks(file, own))


def _drawbacks(file, parent):
    if file.bytes and parent.bytes and file.bytes > parent.bytes:
        yield f"larger than the parent's: {times(file.bytes / parent.bytes)} its bytes"
    # Slower is what is so beyond the noise.
    low = file.ratio_quartiles[0] if file.ratio_quartiles else file.ratio
    if low is not None and low > 1:
        yield f"slower than the parent's: {times(file.ratio, file.ratio_quartiles)} its time"


def _unequal_controls(results):
    own = subject(results)
    for row in results.rows if own else ():
        if row.equal == "bops":
            pair = row.bops, own.bops
        elif common := [target for target in row.files if target in own.files and row.equal]:
            pair = row.files[common[0]].bytes, own.files[common[0]].bytes
        else:
            continue
        if None not in pair and abs(pair[0] / pair[1] - 1) > UNEQUAL:
            unit = "B" if row.equal == "bytes" else "BOPs"
            yield (
                f"{row.name} is not equal: {times(pair[0] / pair[1])} the {own.role}'s "
                f"{si(pair[1], unit)}"
            )


def _suspicious_gain(results):
    own, single = results.first("mixture"), results.of("expert")
    if own is None or not single or results.metric != "accuracy":
        return
    best = max(single, key=lambda row: row.accuracy)
    gain, test = own.accuracy - best.accuracy, paired(own, best)
    if gain > SUSPICIOUS_GAIN and (test is None or test.p_value < SIGNIFICANCE):
        yield (
            f"The gain of {100 * gain:.2f} points over the best expert is more than ensembles "
            "of independent networks usually reach: check it"
        )
