"""The checks of a configuration: every key and value, before anything is read or written."""

from ml_collections import ConfigDict

from hybrid_jax import core, data, models, pruning
from hybrid_jax.quantization.observers import METHODS_OF_ANY_BITS
from hybrid_jax.recipes import config as configuration


def check_config(config: ConfigDict) -> None:
    """Checks every key and value; reads no file and writes none.

    The error names the key, what it got and what was expected, and the nearest key if the key is
    unknown.

    Example:
      >>> config = configuration.default_config()
      >>> config.experts.sparsity = 1.3
      >>> check_config(config)
      Traceback (most recent call last):
      ...
      ValueError: config.experts.sparsity must be in [0, 1), got 1.3
    """
    _check_keys(config)
    values = configuration.flatten(config)

    def each(check, keys, *args):
        for key in keys.split():
            check(f"config.{key}", values[key], *args)

    each(core.check_integer, "seed data.seed data.train_size data.padding", 0)
    each(
        core.check_integer,
        "checkpoint_every parent.steps experts.steps gate.steps experts.multiple",
        1,
    )
    each(core.check_integer, "joint.steps collapse.steps", 0)
    each(core.check_integer, "gate.size gate.k evaluation.latency_calls", 1)
    for stage in ("parent", "experts", "gate", "joint", "collapse", "evaluation"):
        each(core.check_integer, f"{stage}.batch_size", 1)
    for stage in ("parent", "experts", "gate", "joint", "collapse"):
        each(core.check_positive, f"{stage}.learning_rate")
    each(_check_bool, "data.flip joint.refit controls.same_bytes controls.same_bops")
    each(core.check_positive, "distillation.temperature")
    each(
        core.check_fraction,
        "distillation.alpha parent.label_smoothing experts.others_weight experts.deployed",
    )
    each(_check_below_one, "experts.sparsity experts.weight_sparsity")
    each(
        _check_not_negative,
        "data.test parent.weight_decay experts.weight_decay experts.jitter gate.balance gate.noise "
        "gate.supervision",
    )
    each(core.check_choice, "data.name", data.SOURCES)
    each(data.check_amount, "data.validation")
    each(data.check_size, "data.resize data.crop")
    for name in config.data.augment:
        core.check_choice("config.data.augment", name, data.AUGMENTATIONS)
    each(core.check_integer, "experts.count", 2)
    each(core.check_integer, "experts.first_last_bits gate.bits", 2, 8)
    each(core.check_integer, "experts.weight_bits experts.activation_bits", 2, 8)
    each(
        _check_entries,
        "experts.bits experts.criteria experts.sparsities gate.features deploy.platforms",
    )
    for bits in config.experts.bits:
        core.check_integer("config.experts.bits", bits, 2, 8)
    for sparsity in config.experts.sparsities:
        _check_below_one("config.experts.sparsities", sparsity)
    core.check_choice("config.model.name", config.model.name, models.names())
    for features in config.gate.features:
        core.check_integer("config.gate.features", features, 1)
    for width in config.model.widths:
        core.check_integer("config.model.widths", width, 1)
    for criterion in config.experts.criteria:
        core.check_choice("config.experts.criteria", criterion, pruning.CRITERIA)
    for source in configuration.diversity_sources(config):
        core.check_choice("config.experts.diversity", source, configuration.DIVERSITY)
        _check_source(config, source)
    for platform in config.deploy.platforms:
        core.check_choice("config.deploy.platforms", platform, ("cpu", "cuda", "rocm", "tpu"))
    each(core.check_choice, "gate.routing", configuration.ROUTINGS)
    each(core.check_choice, "collapse.routing", ("soft", "top_1"))
    each(core.check_choice, "experts.method", ("auto", "vmap", "map", "unroll"))
    each(core.check_choice, "experts.calibration", METHODS_OF_ANY_BITS)
    if config.gate.k > config.experts.count:
        raise ValueError(
            f"config.gate.k must be at most config.experts.count = {config.experts.count}, "
            f"got {config.gate.k}"
        )


def _check_keys(config):
    valid, got = (
        configuration.flatten(configuration.default_config()),
        configuration.flatten(config),
    )
    for key in got:
        if key not in valid:
            raise ValueError(
                f"config.{key} is no key of the configuration{configuration.nearest_key(key)}"
            )
    for key in valid:
        if key not in got:
            raise ValueError(f"config.{key} must be given, got no such key")


def _check_source(config, source):
    """A source of diversity that would make no difference is an error, not a silent nothing."""
    lists = {"criterion": "criteria", "bits": "bits", "width": "sparsities"}
    nothing = {"seed": ("jitter", 0), "cluster": ("others_weight", 1)}
    nothing["classes"] = nothing["cluster"]
    if key := lists.get(source):
        if len(set(config.experts[key])) < 2:
            raise ValueError(
                f"config.experts.{key} must hold at least two different values with diversity "
                f"{source!r}, got {config.experts[key]!r}"
            )
    elif source in nothing and config.experts[nothing[source][0]] == nothing[source][1]:
        key, value = nothing[source]
        raise ValueError(
            f"config.experts.{key} must not be {value} with diversity {source!r}, which would "
            "then make no difference"
        )


def _check_below_one(name, value):
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")


def _check_bool(name, value):
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


def _check_not_negative(name, value):
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e30:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def _check_entries(name, value):
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{name} must be a tuple with at least one entry, got {value!r}")
