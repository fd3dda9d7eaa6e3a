"""Several processes that run one program: what the first does, or decides, for all of them.

Between two steps of training each process computes the same; what writes a file, or measures a
time, is the first one's. The others see the same files.
"""

import itertools
import json
import sys
from collections.abc import Callable
from typing import TypeVar

import jax

from hybrid_jax.core import versions

T = TypeVar("T")

_ASKED = itertools.count()
_ALONE: list[bool] = []
"""Not empty while the first process does what the others only wait for."""


def is_first() -> bool:
    """Whether this process is the one that writes files: the only one, or number 0 of several."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line on stderr at once; of several processes the first one does."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def of_first(act: Callable[[], T]) -> T:
    """What `act()`, which the first process alone calls, returns; the others wait, and get it too.

    It is plain JSON. Works in the midst of tracing. Processes run one program, and so ask in one
    order.

    Raises:
      ValueError, OSError: In all processes what `act` raised in the first.

    Example:
      >>> of_first(lambda: 'the fastest')
      'the fastest'
    """
    if jax.process_count() == 1 or _ALONE:
        return act()
    name = f"hybrid_jax {next(_ASKED)}"
    if not is_first():
        told = json.loads(versions.from_first_process(name, None))
        if "error" in told:
            raise ValueError(told["error"])
        return told["value"]
    _ALONE.append(True)
    try:
        value = act()
    except (ValueError, OSError) as error:
        versions.from_first_process(name, json.dumps({"error": str(error)}))
        raise
    finally:
        _ALONE.pop()
    versions.from_first_process(name, json.dumps({"value": value}, default=float))
    return value
