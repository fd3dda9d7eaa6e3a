"""The configuration of the whole method: its defaults, its keys, and each expert's spec."""

import dataclasses
import difflib
import json
from typing import Any

from ml_collections import ConfigDict, FieldReference

DIVERSITY = ("criterion", "seed", "bits", "width", "cluster", "classes", "bootstrap")
IMAGES = ("cluster", "classes", "bootstrap")  # of these, what tells the images of experts apart
ROUTINGS = ("soft", "top_1", "top_k", "noisy_top_1", "noisy_top_k")


def default_config() -> ConfigDict:
    """Returns the configuration with every key that there is; a config module overrides some."""
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(  # as `hybrid_jax.data.load` and `augmentation` take them
        dict(
            name="digits",  # of `data.SOURCES`, which say what each reads at `dir`
            dir="",
            keys=(),  # npz: those of images and labels of train, test and validation
            labels="",  # folder: a csv of rows file,label
            pattern="",  # folder: a regular expression whose group is the label in a file's name
            classes="",  # a file of class names in the order of their numbers, one a line
            class_names=(),  # the same, given; (): the source's own
            test=0.0,  # fraction or number of train taken for it; 0: the source's own, or a fifth
            # Fraction or number of train held out, or of test as "test:1000"; 0: the source's own.
            validation=FieldReference(0.15, field_type=object),
            seed=0,  # of what is held out, apart from config.seed so that seeds share the split
            train_size=0,  # train images to keep; 0: all
            resize=(),  # (short side,) or (height, width)
            crop=(),  # of the centre: (side,) or (height, width)
            image_shape=(),  # (): as they are
            mean=(),  # one for each channel, of pixels from 0 to 1; (): of the train images
            std=(),
            padding=1,  # augmentation: largest shift, in pixels
            flip=False,  # augmentation: mirrored at random
            augment=(),  # more of it, by name, of `data.AUGMENTATIONS`
        )
    )
    config.checkpoint_every = 500  # steps; a run that is stopped loses no more than these
    # Zero-padded shortcuts would tie the program of an expert to the channels it keeps: experts
    # that keep different ones could not be stacked.
    config.model = ConfigDict(dict(name="resnet8", widths=(16, 32, 64), shortcut="project"))
    config.parent = ConfigDict(
        dict(
            steps=300,
            batch_size=64,
            learning_rate=0.01,
            weight_decay=0.01,
            label_smoothing=0.0,
            restore="",  # a run's checkpoints/parent directory: take the parent from there
        )
    )
    config.experts = ConfigDict(
        dict(
            count=4,
            diversity="criterion+cluster",  # sources joined by +; "" makes identical experts
            # Of `pruning.CRITERIA`: expert e takes criteria[e % len]; the first for all without.
            criteria=("magnitude", "magnitude_l2", "batchnorm_scale", "taylor"),
            jitter=0.3,  # seed: spread of the log-normal factor on channel scores
            others_weight=0.2,  # cluster, classes: weight of images that are not the expert's own
            bits=(4, 8),  # bits: expert e takes bits[e % len] for weights and activations
            sparsities=(0.75, 0.5),  # width: expert e takes sparsities[e % len], cheap and dear
            sparsity=0.5,  # fraction of channels removed
            multiple=1,  # widths kept are rounded to multiples of this
            weight_sparsity=0.0,  # fraction of the left weights of a kernel that are zero
            weight_bits=4,
            activation_bits=8,
            first_last_bits=8,
            calibration="minmax",  # of the ranges that training starts from
            deployed=0.2,  # last part of the steps, on the network as it is deployed
            method="auto",  # how the experts are mapped: auto measures, or vmap, map, unroll
            steps=300,
            batch_size=64,
            learning_rate=0.004,
            weight_decay=0.01,
        )
    )
    config.distillation = ConfigDict(dict(temperature=4.0, alpha=0.5))
    config.gate = ConfigDict(
        dict(
            routing="top_1",  # in training; it is evaluated as top-1, top-k and soft
            k=2,
            noise=1.0,
            features=(8, 16),  # output channels of each convolution
            size=8,  # side in pixels that it averages the image down to
            bits=8,
            balance=0.1,
            supervision=1.0,  # weight of the cross-entropy to the clusters, where experts have such
            steps=200,
            batch_size=128,
            learning_rate=0.01,
        )
    )
    config.joint = ConfigDict(
        dict(
            steps=100,
            batch_size=64,
            learning_rate=0.0005,
            refit=False,  # train the gate alone once more, over the experts that came out
        )
    )
    config.collapse = ConfigDict(  # the mixture distilled into one network of an expert's shape
        dict(steps=0, batch_size=64, learning_rate=0.001, routing="soft")  # steps=0: not made
    )
    config.controls = ConfigDict(dict(same_bytes=True, same_bops=True))
    config.deploy = ConfigDict(dict(platforms=("cpu", "cuda", "tpu")))
    config.evaluation = ConfigDict(dict(batch_size=256, latency_calls=50))
    return config.lock()


@dataclasses.dataclass(frozen=True)
class ExpertSpec:
    """What one expert is made by.

    Attributes:
      criterion: Importance criterion of its channels.
      jitter: Spread of a random log-normal factor on the channel scores; 0 for none.
      images: Index of the training images that it prefers, or None where all are alike to it.
      sparsity: Fraction of channels removed.
      multiple: Widths kept are multiples of this.
      weight_sparsity: Fraction of zeros among the weights that are left.
    """

    criterion: str
    jitter: float
    images: int | None
    sparsity: float
    multiple: int
    weight_sparsity: float
    weight_bits: int
    activation_bits: int
    first_last_bits: int


def expert_specs(config: ConfigDict) -> tuple[ExpertSpec, ...]:
    """Returns one spec per expert, different in what `config.experts.diversity` names.

    Example:
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
                multiple=e.multiple,
                weight_sparsity=e.weight_sparsity,
                weight_bits=bits or e.weight_bits,
                activation_bits=bits or e.activation_bits,
                first_last_bits=e.first_last_bits,
            )
        )
    return tuple(specs)


def diversity_sources(config: ConfigDict) -> tuple[str, ...]:
    """Returns the sources that `config.experts.diversity` joins by `+`."""
    return tuple(s for s in config.experts.diversity.split("+") if s)


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Returns the leaves of `config` by dotted key, as plain JSON values."""
    leaves = {}

    def visit(prefix, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix else key, inner)
        else:
            leaves[prefix] = value

    visit("", json.loads(json.dumps(config.to_dict())))
    return leaves


def nearest_key(key: str) -> str:
    """Returns a hint that names the valid key nearest to `key`, or "" if none is near."""
    close = difflib.get_close_matches(key, flatten(default_config()), n=1, cutoff=0.5)
    return f"; the nearest valid key is config.{close[0]}" if close else ""
