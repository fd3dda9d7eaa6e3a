"""A budget: what a network may cost at most, and how what is written is brought within it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from hybrid_jax import core, cost
from hybrid_jax import program as p
from hybrid_jax.deploy import TARGETS
from hybrid_jax.quantization import CannotBeMet

_Made = TypeVar("_Made")

NAMES = ("bytes", "memory", "macs", "bops")


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a network may cost at most; None asks nothing.

    An integer is absolute, a float in (0, 1] a fraction of what the parent costs in floats.

    Attributes:
      bytes: Of each file; of a C file its constants.
      memory: Bytes that activations take at a time, each whole; inputs and outputs are the
        caller's. A C file, which computes large ones some rows at a time, takes less.
      macs: Multiply-accumulates for one example.
      bops: Σ MACs · weight bits · activation bits.
      latency: Only a fraction, of the parent's in `runtime`.
      runtime: The target whose file is timed.

    Example:
      >>> Budget(bytes=64_000, macs=0.25).limits({'bytes': 10**6, 'macs': 1000})
      {'bytes': 64000, 'macs': 250}
      >>> Budget(memory=0)
      Traceback (most recent call last):
      ...
      ValueError: memory must be an integer ≥ 1 or a float in (0, 1], got 0
    """

    bytes: int | float | None = None
    memory: int | float | None = None
    macs: int | float | None = None
    bops: int | float | None = None
    latency: float | None = None
    runtime: str | None = None

    def __post_init__(self):
        for name in NAMES:
            _check(name, getattr(self, name), "an integer ≥ 1 or a float in (0, 1]", int, float)
        _check("latency", self.latency, "a float in (0, 1]", float)
        if (self.latency is None) != (self.runtime is None):
            raise ValueError(
                "latency and runtime must be given together, "
                f"got latency {self.latency} and runtime {self.runtime!r}"
            )
        if self.runtime is not None:
            core.check_choice("runtime", self.runtime, TARGETS)

    def limits(self, parent: Mapping[str, int]) -> dict[str, int]:
        """{name of a cost: the most it may be}, of what the parent costs, as `parent_costs` counts.

        Latency is none of these: it is measured, not counted.
        """
        asked = {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}
        return {n: int(v * parent[n]) if isinstance(v, float) else int(v) for n, v in asked.items()}


def _check(name, value, expected, *kinds):
    """Raises ValueError if a value is none of a budget."""
    if value is None:
        return
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    part = isinstance(value, float | np.floating)
    if not ((int in kinds and whole and value >= 1) or (part and 0 < value <= 1)):
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def files(targets: Sequence[str]) -> list[cost.File]:
    """How the files of these targets hold a program."""
    return [TARGETS[core.check_choice("targets", name, TARGETS)].holds for name in targets]


def what_pays(limits: Mapping[str, int], targets: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """{role: the bits that are worth a choice}: those that make something smaller that is limited.

    Bytes are fewer by the bits that files hold kernels in; a byte holds whatever an edge holds, so
    that only BOPs are fewer by fewer bits of an activation. A role whose bits make nothing smaller
    is left out: it keeps the bits that are asked of it.

    Example:
      >>> what_pays({'bytes': 64_000}, ['c', 'tflite'])
      {'weight': (4, 8)}
      >>> what_pays({'macs': 10**6}, ['c'])
      {}
      >>> what_pays({'bops': 10**9}, ['tflite'])
      {'weight': (2, 3, 4, 6, 8), 'activation': (4, 6, 8)}
    """
    if "bops" in limits:
        return {"weight": (2, 3, 4, 6, 8), "activation": (4, 6, 8)}
    held = {bits for file in files(targets) for bits in file.kernel_bits if bits > 1}
    return {"weight": tuple(sorted(held))} if "bytes" in limits else {}


def parent_costs(program: p.Program, targets: Sequence[str] = ("c",)) -> dict[str, int]:
    """{name: what a program in floats costs}, of which a budget may ask a fraction."""
    return cost.of_program(program, files=files(targets)).formula.count()


def measured(manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """What files cost, of {target: manifest}: bytes of the largest, memory where it is said.

    Example:
      >>> measured({'c': {'flash': 70, 'ram': 30, 'bytes': 400}, 'onnx': {'bytes': 90}})
      {'bytes': 90, 'memory': 30}
    """
    found = {"bytes": max(own.get("flash", own["bytes"]) for own in manifests.values())}
    memory = [own["ram"] for own in manifests.values() if "ram" in own]
    return found | ({"memory": max(memory)} if memory else {})


def meet(
    limits: Mapping[str, float],
    make: Callable[[Mapping[str, float]], tuple[_Made, Mapping[str, float]]],
    measure: Callable[[_Made], Mapping[str, float]],
    tries: int = 2,
) -> tuple[_Made, Mapping[str, float]]:
    """Makes what keeps the limits when it is measured, and not only when it is counted.

    Where it does not, it is made again with the limits less what the count was off by. What is
    measured and not counted, as latency, goes as the MACs do, of which as much less is asked.

    Args:
      limits: {name: the most that may be measured}.
      make: From the limits but 'latency' to what is made of them, and its counted costs.
      measure: From what is made to {name: as it is measured}; names left out hold as counted.
      tries: How often it may be made again.

    Returns:
      What was made, and what was measured of it.

    Raises:
      CannotBeMet: If the last one is above a limit still, or `make` raises it.

    Example:
      >>> make = lambda limits: (limits['bytes'], {'bytes': limits['bytes']})  # as much as it may
      >>> meet({'bytes': 100}, make, lambda made: {'bytes': made + 7})
      (93, {'bytes': 100})
    """
    asked, over = {name: most for name, most in limits.items() if name != "latency"}, []
    for _ in range(tries + 1):
        try:
            made, counted = make(asked)
        except CannotBeMet as error:
            raise CannotBeMet("; ".join([*over, str(error)])) from None
        found = measure(made)
        above = [name for name, most in limits.items() if found.get(name, most) > most]
        if not above:
            return made, found
        over = [f"{name} must be at most {limits[name]}, got {found[name]}" for name in above]
        for name in above:
            if name in counted:
                asked[name] = limits[name] - (found[name] - counted[name])
            else:
                fewer = int(counted["macs"] * limits[name] / found[name])
                asked["macs"] = min(asked.get("macs", fewer), fewer)
    raise CannotBeMet("; ".join([*over, f"measured of the last of {tries + 1} that were made"]))
