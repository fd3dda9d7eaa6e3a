"""The keys of the configuration as text: for `--help`, and as a table of the README."""

import dataclasses
import textwrap
from typing import Any

from hybrid_jax.recipes.schema import KEYS, Key
from hybrid_jax.recipes.sections import Config

WIDTH = 100


def help_text() -> str:
    """Returns each key's default, meaning and bound, section by section, `WIDTH` columns wide.

    What a registry holds is looked up now, which imports the library.

    Example:
      >>> print(help_text()[-105:])
        --config.evaluation.latency_calls=50
            Pairs of calls for each latency. An integer in [1, 100_000].
    """
    return "\n\n".join(_section(*part) for part in _sections())


def table() -> str:
    """Returns each key's default, meaning and bound, as the rows of a table in Markdown.

    Example:
      >>> table().splitlines()[3][:16]
      '| `seed` | `0` |'
    """
    rows = [
        f"| `{key}` | {f'`{as_flag(known.default)}`'.replace('``', '')} | {_meaning(known)} |"
        for key, known in KEYS.items()
    ]
    return "\n".join(["| key | default | meaning |", "|:--|:--|:--|", *rows])


def as_flag(value: Any) -> str:
    """Returns a value of the configuration as it is written after `--config.KEY=`.

    Example:
      >>> as_flag((0.75, 0.5)), as_flag(True)
      ('0.75,0.5', 'true')
    """
    if isinstance(value, tuple):
        return ",".join(map(as_flag, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _sections():
    """What each section is for, and its keys; first those of none."""
    yield Config.__doc__, [key for key in KEYS if "." not in key]
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type):
            yield field.type.__doc__, [key for key in KEYS if key.startswith(f"{field.name}.")]


def _section(doc, keys):
    lines = [doc]
    for key in keys:
        lines.append(f"  --config.{key}={as_flag(KEYS[key].default)}")
        lines.append(textwrap.indent(textwrap.fill(_meaning(KEYS[key]), WIDTH - 6), " " * 6))
    return "\n".join(lines)


def _meaning(key: Key) -> str:
    bound = str(key.bound)
    return f"{key.doc} {bound[0].upper()}{bound[1:]}."
