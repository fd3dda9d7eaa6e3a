"""What one expert is made by, from the configuration."""

import dataclasses
from collections.abc import Iterable

from ml_collections import ConfigDict

from hybrid_jax.recipes.schema import diversity_sources as diversity_sources
from hybrid_jax.recipes.schema import flatten as flatten
from hybrid_jax.recipes.schema import nearest_key as nearest_key
from hybrid_jax.recipes.sections import Config

_OF_MIXTURES = ("mixture", "gate", "joint", "collapse", "controls")
SECTIONS = {
    "ptq": ("ptq",),
    "finetune": ("experts", "distillation", "teacher"),
    "mixture": ("experts", "distillation", "teacher", *_OF_MIXTURES),
}
"""{effort: the sections of the configuration that it alone, or with some others, reads}."""

ALIKE = (
    *("allocation", "recovery", "multiple", "weight_sparsity", "weight_allocation"),
    *("weight_granularity", "schedule"),
    *("first_last_bits", "weight_learning", "activation_learning"),
)
"""Keys of config.experts that are attributes of every spec as they are."""

IMAGES = ("cluster", "classes", "bootstrap")  # what tells the images of experts apart


@dataclasses.dataclass(frozen=True)
class ExpertSpec:
    """What one expert is made by.

    Attributes:
      criterion: Importance criterion of its channels.
      jitter: Spread of a random log-normal factor on the channel scores; 0 for none.
      images: Index of the training images that it prefers, or None where all are alike to it.
      sparsity: Fraction of channels removed.
      allocation: How that is spread over groups of channels.
      recovery: How weights that stay answer for those that are removed; '' for not at all.
      multiple: Widths kept are multiples of this.
      weight_sparsity: Fraction of zeros among the weights that are left.
      weight_allocation: How that is spread over kernels.
      weight_granularity: What becomes zero as a whole.
      schedule: How zeros come in while it trains; '' where they are there from the start.
      weight_learning: The gradient by which the ranges of weights are learned.
      activation_learning: That of what sites take.
    """

    criterion: str
    jitter: float
    images: int | None
    sparsity: float
    allocation: str
    recovery: str
    multiple: int
    weight_sparsity: float
    weight_allocation: str
    weight_granularity: str
    schedule: str
    weight_bits: int
    activation_bits: int
    first_last_bits: int
    weight_learning: str
    activation_learning: str


def check_read(effort: str, keys: Iterable[str]) -> None:
    """Raises ValueError if one of the dotted keys is of a section that the effort does not read.

    What an effort of a user's own reads is not known.

    Example:
      >>> check_read('ptq', ['seed', 'gate.k'])
      Traceback (most recent call last):
      ...
      ValueError: config.gate.k must not be given with effort 'ptq', which does not read it
    """
    for key in keys:
        if not is_read(effort, key.partition(".")[0]):
            raise ValueError(
                f"config.{key} must not be given with effort {effort!r}, which does not read it"
            )


def is_read(effort: str, section: str) -> bool:
    """Returns whether the effort reads a section; one of a user's own may read any."""
    readers = [name for name, read in SECTIONS.items() if section in read]
    return effort not in SECTIONS or not readers or effort in readers


def expert_specs(config: ConfigDict | Config) -> tuple[ExpertSpec, ...]:
    """Returns one spec per expert, different in what `config.experts.diversity` names.

    Example:
      >>> from hybrid_jax.recipes import default_config
      >>> config = default_config()
      >>> config.experts.diversity = "bits"
      >>> [(s.criterion, s.weight_bits) for s in expert_specs(config)][:2]
      [('magnitude', 4), ('magnitude', 8)]
    """
    e = config.experts
    sources = diversity_sources(config)
    specs = []
    for i in range(e.count):
        bits = e.bits[i % len(e.bits)] if "bits" in sources else None
        width = e.sparsities[i % len(e.sparsities)] if "width" in sources else e.sparsity
        specs.append(
            ExpertSpec(
                criterion=e.criteria[i % len(e.criteria) if "criterion" in sources else 0],
                jitter=e.jitter if "seed" in sources else 0.0,
                images=i if set(IMAGES) & set(sources) else None,
                sparsity=width,
                weight_bits=bits or e.weight_bits,
                activation_bits=bits or e.activation_bits,
                **{name: getattr(e, name) for name in ALIKE},
            )
        )
    return tuple(specs)


def single_spec(config: ConfigDict | Config) -> ExpertSpec:
    """Returns what a network is made by that is no expert."""
    e = config.experts
    return dataclasses.replace(
        expert_specs(config)[0],
        jitter=0.0,
        images=None,
        sparsity=e.sparsity,
        weight_bits=e.weight_bits,
        activation_bits=e.activation_bits,
    )
