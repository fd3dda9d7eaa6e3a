"""Choices that are a matter of speed alone: made by measurement, kept for the run and the machine.

What a choice changes is rounding, so a choice is part of a run: the first one made holds in its
directory, also on another machine. A cache on disk only proposes, so that no machine measures the
same question twice.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.core import processes, sealed, versions
from hybrid_jax.core.files import as_path, cache_folder, write_json

_ROUNDS = 3


class Choices:
    """What was measured, by the question it answers.

    `file`, a JSON file of a run, says what is chosen, and on what machine the run was begun: where
    it goes on on another one, a UserWarning says so. None keeps the choices of this process alone.
    `cache`, a JSON file shared by all runs, proposes; None is `choices.json` in `cache_folder()`.
    """

    def __init__(self, file: str | os.PathLike | None = None, cache: os.PathLike | None = None):
        self._file = None if file is None else as_path(file)
        self._cache = cache
        self.answers: dict[str, str] = {}
        """{question: what was chosen}."""
        self.moved: str | None = None
        """Where the run was begun, if that was another kind of machine."""
        stored = None if self._file is None else processes.of_first(self._begun)
        if stored is not None:
            if set(stored) != {"machine", "choices"}:
                raise ValueError(f"file must hold the choices of a run, got {self._file}")
            self.answers = stored["choices"]
            if stored["machine"] != machine():
                self.moved = stored["machine"]
                warnings.warn(
                    f"the run was begun on [{self.moved}] and goes on on [{machine()}]: "
                    "what follows is not bit-equal to what it would have been there",
                    stacklevel=2,
                )

    def choose(
        self, question: str, forms: Mapping[str, Callable[..., Any]], *args: jax.ShapeDtypeStruct
    ) -> str:
        """Returns the name of the form that runs fastest, or that was chosen before.

        Works in the midst of tracing. Of several processes the first one's choice is all theirs.

        `question` holds all that the answer depends on but the machine, `forms` {name: function of
        `args`, shapes and dtypes}, which agree up to rounding; one alone is chosen without a run.
        """
        if self.answers.get(question) not in forms:
            proposed = functools.partial(self._proposed, question, dict(forms), args)
            self.answers[question] = processes.of_first(proposed)
            self._keep()
        return self.answers[question]

    def _begun(self):
        if self._file.exists():
            return sealed.read_sealed(self._file)
        return self._keep()

    def _keep(self):
        if self._file is not None:
            made = {"machine": self.moved or machine(), "choices": self.answers}
            sealed.write_sealed(self._file, made)

    def _proposed(self, question, forms, args):
        if len(forms) == 1:
            return next(iter(forms))
        file = pathlib.Path(self._cache) if self._cache else cache_folder() / "choices.json"
        known = _read(file) if file.exists() else {}
        question = f"{question} of {', '.join(sorted(forms))}"  # another version may know others
        proposed = known.get(machine(), {}).get(question)
        if proposed in forms:
            return proposed
        measured = fastest(forms, *args)
        known.setdefault(machine(), {})[question] = measured
        with contextlib.suppress(OSError):  # a cache that cannot be written is no reason to stop
            write_json(file, known)
        return measured


CHOICES = Choices()
"""Those of this process, where no run has its own."""


def fastest(forms: Mapping[str, Callable[..., Any]], *args: jax.ShapeDtypeStruct) -> str:
    """Compiles each form and runs them by turns on drawn floats; names the fastest."""
    options = versions.run_often()
    run = {name: jax.jit(form).lower(*args).compile(options) for name, form in forms.items()}
    with jax.ensure_compile_time_eval():
        arrays = jax.tree.map(_drawn, args)
    for compiled in run.values():  # the first call warms up
        seconds(compiled, *arrays)
    times = {name: seconds(compiled, *arrays) for name, compiled in run.items()}
    close = [name for name in times if times[name] < 2 * min(times.values())]
    for name in close * _ROUNDS if len(close) > 1 else ():
        times[name] = min(times[name], seconds(run[name], *arrays))
    return min(times, key=times.get)


def seconds(fn: Callable[..., Any], *inputs: Any) -> float:
    """Times one call of `fn(*inputs)`, until its outputs are ready."""
    start = time.perf_counter()
    jax.block_until_ready(fn(*inputs))
    return time.perf_counter() - start


@functools.cache
def machine() -> str:
    """What the speed of a program depends on beside itself: processor, cores, devices, versions."""
    facts = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        pairs = (line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        said = {key.strip(): value.strip() for key, value in pairs}
        features = hashlib.sha256(said.get("flags", said.get("Features", "")).encode())
        facts = f"{said.get('model name', facts)} {features.hexdigest()[:8]}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    flags = os.environ.get("XLA_FLAGS", "")
    return f"{facts}, {cores} cores, {devices}, jax {jax.__version__}{flags and f', {flags}'}"


def _drawn(spec):
    if not jnp.issubdtype(spec.dtype, jnp.floating):
        return jnp.zeros(spec.shape, spec.dtype)
    drawn = np.random.default_rng(0).normal(size=min(math.prod(spec.shape), 4096))
    return jnp.asarray(np.resize(drawn, spec.shape), spec.dtype)


def _read(file):
    try:
        stored = json.loads(file.read_text())
    except ValueError:
        stored = None
    return stored if isinstance(stored, dict) else {}
