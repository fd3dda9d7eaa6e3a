"""The configuration: read and checked as a whole, before anything is read, written or imported.

config = default_config()  # what a config module overrides: an `ml_collections.ConfigDict`
config.experts.count = 3
config = read(config)  # a frozen `Config`, every key and value of which was checked

The keys stand in `sections`. Nothing here imports JAX, so that a mistake is told at once.
"""

import ast
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

from hybrid_jax.recipes.bounds import Bound
from hybrid_jax.recipes.sections import Config


class Key(NamedTuple):
    """What is known of one key.

    Attributes:
      kind: Its type.
      bound: What it may be.
      doc: What it means, as one sentence.
      default: Its default.
    """

    kind: Any
    bound: Bound
    doc: str
    default: Any


def _keys(section: type, prefix: str = "") -> Iterator[tuple[str, Key]]:
    for name, hint in typing.get_type_hints(section, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from _keys(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, Key(*typing.get_args(hint), getattr(section, name))


KEYS: dict[str, Key] = dict(_keys(Config))
"""All keys, such as 'experts.count'."""

MEANS = ("macs", "bops")
"""Costs whose mean over images a cascade keeps; its experts are in the order of the first."""


def default_config() -> ConfigDict:
    """Returns the configuration with every key that there is; a config module overrides some.

    Example:
      >>> default_config().experts.count
      4
    """
    config = ConfigDict()
    for key, (kind, _, _, default) in KEYS.items():
        mixed = isinstance(kind, types.UnionType)
        _set(config, key, FieldReference(default, field_type=object) if mixed else default)
    return config  # not locked: of an unknown key `read` says more


def read(config: ConfigDict | Config | Mapping[str, Any]) -> Config:
    """Checks every key and value, and what keys must agree on; reads no file and writes none.

    `config` may also be a mapping of dotted keys, as `flatten` returns it and JSON holds it.

    Raises:
      ValueError: Names the key, what it got and what was expected, and the nearest key if the key
        is unknown.

    Example:
      >>> config = default_config()
      >>> config.experts.sparsity = 1.3
      >>> read(config)
      Traceback (most recent call last):
      ...
      ValueError: config.experts.sparsity must be a number in [0, 1), got 1.3
    """
    given = dict(_leaves(config))
    for key in given:
        _check_key("", key)
    for key in KEYS:
        if key not in given:
            raise ValueError(f"config.{key} must be given, got no such key")
    # First what does not import the library.
    keys = sorted(KEYS, key=lambda key: KEYS[key].bound.late)
    values = {key: KEYS[key].bound.check(f"config.{key}", given[key]) for key in keys}
    made = _built(Config, values)
    _check_agreement(made)
    return made


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a run stored, by dotted key, with the keys that its version did not know.

    These have their defaults, which do what that version did.

    Example:
      >>> completed({'seed': 3})['mixture.members']
      []
    """
    defaults = {key: known.default for key, known in KEYS.items()}
    return {**json.loads(json.dumps(defaults)), **values}


def override(config: ConfigDict, values: Mapping[str, Any]) -> None:
    """Sets the values of dotted keys, of whatever type; `read` checks them.

    Example:
      >>> config = default_config()
      >>> override(config, {'experts.count': 3})
      >>> config.experts.count
      3
    """
    for key in values:
        _check_key("", key)
    with config.unlocked():
        for key, value in values.items():
            _set(config, key, value)


def flag_values(flags: Iterable[str]) -> dict[str, Any]:
    """Returns the keys and values of flags `--config.KEY=VALUE`; `read` checks the values.

    Tuples are written as in Python, or as their entries separated by commas.

    Raises:
      ValueError: Names a flag whose key there is not, and the nearest key.

    Example:
      >>> flag_values(['--config.deploy.targets=onnx,c', '--config.experts.bits=(4, 8)'])
      {'deploy.targets': ('onnx', 'c'), 'experts.bits': (4, 8)}
    """
    parts = [flag.removeprefix("--config.").partition("=") for flag in flags]
    for key, equals, _ in parts:
        _check_key("--", key)
        if not equals:
            raise ValueError(f"--config.{key} must be followed by =VALUE, got nothing")
    return {key: _value(KEYS[key].kind, text) for key, _, text in parts}


def flatten(config: ConfigDict | Config) -> dict[str, Any]:
    """Returns the leaves of `config` by dotted key, as plain JSON values."""
    return json.loads(json.dumps(dict(_leaves(config))))


def nearest_key(key: str) -> str:
    """Returns a hint that names the valid key nearest to `key`, or "" if none is near."""
    close = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.5)
    return f"; the nearest valid key is config.{close[0]}" if close else ""


def diversity_sources(config: ConfigDict | Config) -> tuple[str, ...]:
    """Returns the sources that `config.experts.diversity` joins by `+`."""
    return tuple(source for source in config.experts.diversity.split("+") if source)


def limited(config: Config) -> list[str]:
    """Returns what the budget limits of every network by itself, whose widths and bits keep it.

    A cascade keeps the rest as a mean over images, by when it hands on.

    Example:
      >>> config = default_config()
      >>> config.budget.bytes, config.budget.macs = 9000, 0.5
      >>> limited(read(config))
      ['bytes', 'macs']
      >>> config.mixture.kind = 'cascade'
      >>> limited(read(config))
      ['bytes']
    """
    asked = dataclasses.asdict(config.budget).items()
    means = MEANS if config.effort == "mixture" and config.mixture.kind != "gate" else ()
    return [k for k, value in asked if value and not isinstance(value, str) and k not in means]


def _check_agreement(config: Config) -> None:
    """Raises ValueError unless the values of different keys agree."""
    experts = config.experts
    if config.gate.k > experts.count:
        raise ValueError(
            f"config.gate.k must be at most config.experts.count = {experts.count}, "
            f"got {config.gate.k}"
        )
    for key in ("schedule", "weight_allocation", "weight_granularity"):
        if getattr(experts, key) != KEYS[f"experts.{key}"].default and not experts.weight_sparsity:
            raise ValueError(
                f"config.experts.weight_sparsity must be above 0 with config.experts.{key} = "
                f"{getattr(experts, key)!r}, which would then make no difference, got 0"
            )
    costs = [] if config.effort == "ptq" else limited(config)
    for key in ("sparsity", "allocation", "multiple"):
        default = KEYS[f"experts.{key}"].default
        if costs and getattr(experts, key) != default:
            raise ValueError(
                f"config.experts.{key} must be {default!r} with config.budget.{costs[0]}, which "
                f"chooses widths, got {getattr(experts, key)!r}"
            )
    # Of bytes alone has each expert its own part.
    lost = {"bits"} if "bytes" in costs else {"bits", "width"}
    for source in lost & set(diversity_sources(config)):
        if config.effort == "mixture" and costs:
            raise ValueError(
                f"config.experts.diversity must be without {source!r} with "
                f"config.budget.{costs[0]}, which chooses it, got {experts.diversity!r}"
            )
    not_deployed = experts.steps - round(experts.deployed * experts.steps)
    at_sites = not_deployed - round(experts.floats * not_deployed)
    if experts.schedule and at_sites < 2:
        raise ValueError(
            "config.experts.floats and deployed must leave 2 of the steps or more to "
            f"experts.schedule, got {experts.floats} and {experts.deployed}, which leave "
            f"{at_sites} of {experts.steps}"
        )
    # A source of diversity that would make no difference is an error, not a silent nothing.
    lists = {"criterion": "criteria", "bits": "bits", "width": "sparsities"}
    nothing = {"seed": ("jitter", 0), "cluster": ("others_weight", 1)}
    nothing["classes"] = nothing["cluster"]
    for source in diversity_sources(config):
        if source in lists:
            entries = getattr(experts, lists[source])
            if len(set(entries[: experts.count])) < 2:
                raise ValueError(
                    f"config.experts.{lists[source]} must hold at least two different values for "
                    f"{experts.count} experts with diversity {source!r}, got {entries!r}"
                )
        elif source in nothing:
            key, value = nothing[source]
            if getattr(experts, key) == value:
                raise ValueError(
                    f"config.experts.{key} must not be {value} with diversity {source!r}, which "
                    "would then make no difference"
                )


def _check_key(dashes, key):
    if key not in KEYS:
        raise ValueError(f"{dashes}config.{key} is no key of the configuration{nearest_key(key)}")


def _leaves(config, prefix=""):
    """Dotted keys and values; of a section that is none, the value itself."""
    if isinstance(config, ConfigDict):
        config = config.to_dict()
    if isinstance(config, Config):
        config = dataclasses.asdict(config)
    if not isinstance(config, Mapping):
        raise ValueError(f"config must be one of default_config(), got {type(config).__name__}")
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _built(section, values, prefix=""):
    """The dataclass of the values whose keys begin with `prefix`."""
    return section(
        **{
            name: _built(hint, values, f"{prefix}{name}.")
            if dataclasses.is_dataclass(hint)
            else values[prefix + name]
            for name, hint in typing.get_type_hints(section).items()
        }
    )


def _set(config, key, value):
    *sections, name = key.split(".")
    for section in sections:
        if section not in config:
            config[section] = ConfigDict()
        config = config[section]
    if name in config:
        del config[name]  # which would convert the value to its own type, true to 1.0
    config[name] = value


def _value(kind, text):
    """What a flag's text stands for; where it is nothing of that type, the text itself."""
    if kind is str:
        return text
    value = _literal(text)
    if typing.get_origin(kind) is not tuple:
        return text if value is None else value
    entries = value if isinstance(value, tuple | list) else (value,)
    strings = all(isinstance(entry, str) for entry in entries)
    if value is not None and (strings or kind != tuple[str, ...]):
        return tuple(entries)
    return tuple(part.strip() for part in text.split(",")) if text else ()


def _literal(text):
    """The value that is written so in Python, but true and false in any case; else None."""
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
