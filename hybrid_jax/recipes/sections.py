"""The keys of the configuration, each once: its type, its bound, its meaning and its default.

`Config` holds the sections. Adding a key is adding a line here: defaults, checks, `--help`, flags
and the table of the README are made of these by `schema` and `usage`.
"""

import dataclasses
from typing import Annotated

from hybrid_jax.recipes.bounds import (
    Checked,
    Choice,
    Each,
    Either,
    Integer,
    Joined,
    Real,
    Text,
    Truth,
)

Flag = Annotated[bool, Truth()]
String = Annotated[str, Text()]
Seed = Annotated[int, Integer(0, 2**32 - 1)]  # what NumPy, scikit-learn and JAX all take
Steps = Annotated[int, Integer(0, 10**7)]  # schedules count in float32, exactly up to 2^24
SomeSteps = Annotated[int, Integer(1, 10**7)]
Batch = Annotated[int, Integer(1, 2**16)]
Rate = Annotated[float, Real(0, 10, "(]")]
Decay = Annotated[float, Real(0, 10)]
Weight = Annotated[float, Real(0, 1000)]  # of a term of a loss
Bits = Annotated[int, Integer(2, 8)]
Fraction = Annotated[float, Real(0, 1)]
BelowOne = Annotated[float, Real(0, 1, "[)")]
Side = Annotated[int, Integer(1, 2**14)]
Size = Annotated[tuple[int, ...], Each(Integer(1, 2**14), range(3))]
Cost = Annotated[int | float, Either(Integer(2, 10**15), Real(0, 1))]
Ranges = Annotated[str, Choice("hybrid_jax.quantization.observers:of_any_bits")]
Optimizer = Annotated[
    str, Choice("hybrid_jax.recipes.optimizer:DIRECTIONS"), "What turns gradients into directions."
]
Allocation = Annotated[str, Choice("hybrid_jax.pruning:ALLOCATIONS")]

CHANNELS = Integer(1, 2**16)
TARGETS = Choice("hybrid_jax.deploy:TARGETS")
SOME = range(1, 65)


@dataclasses.dataclass(frozen=True)
class Data:
    """Which images there are, what is held out of them, and how they become a network's input."""

    name: Annotated[str, Choice("hybrid_jax.data:SOURCES"), "What reads the images."] = "digits"
    dir: Annotated[String, "The file or directory that the source reads."] = ""
    keys: Annotated[
        tuple[str, ...],
        Each(Text(), (0, 2, 4, 6), distinct=True),
        "With npz, the arrays of images and labels of train, then test, then validation.",
    ] = ()
    labels: Annotated[String, "With folder, a csv of rows file,label."] = ""
    pattern: Annotated[
        String, "With folder, a regular expression whose group is the label in a name."
    ] = ""
    masks: Annotated[
        String, "With folder, a directory of label images, a .png by the name of each image."
    ] = ""
    void: Annotated[
        int, Integer(-1, 2**31 - 1), "The label of pixels that do not count, beside -1."
    ] = -1
    classes: Annotated[String, "A file of class names in the order of their numbers."] = ""
    class_names: Annotated[
        tuple[str, ...],
        Each(Text(r"(?s).+", "a name"), range(100_001), distinct=True),
        "The class names themselves; none takes those of the source.",
    ] = ()
    test: Annotated[
        float | int,
        Checked("hybrid_jax.data:check_amount", "a fraction below 1 or a whole number"),
        "How much of train is taken for test; 0 takes the source's own, or a fifth.",
    ] = 0.0
    validation: Annotated[
        float | int | str,
        Checked(
            "hybrid_jax.data:check_amount",
            "a fraction below 1, a whole number, or either after 'test:'",
        ),
        "How much of train, or of test as 'test:1000', is held out; 0 takes the source's own.",
    ] = 0.15
    seed: Annotated[Seed, "Decides what is held out, so that runs of different seeds share it."] = 0
    train_size: Annotated[int, Integer(0, 10**9), "Training images to keep; 0 keeps all."] = 0
    resize: Annotated[Size, "The short side, or height and width, to resize to."] = ()
    crop: Annotated[Size, "The side, or height and width, of the centre that is cut out."] = ()
    image_shape: Annotated[
        tuple[int, ...],
        Each(Integer(1, 2**14), (0, 3)),
        "Height, width and channels that images must have; none takes them as they are.",
    ] = ()
    mean: Annotated[
        tuple[float, ...],
        Each(Real(0, 1), range(65)),
        "Of each channel, of pixels from 0 to 1; none takes that of the training images.",
    ] = ()
    std: Annotated[
        tuple[float, ...],
        Each(Real(0, 1, "(]"), range(65)),
        "Of each channel the standard deviation, as for `mean`.",
    ] = ()
    padding: Annotated[int, Integer(0, 256), "Augmentation: the largest shift in pixels."] = 1
    flip: Annotated[Flag, "Augmentation: images are mirrored at random."] = False
    augment: Annotated[
        tuple[str, ...],
        Each(Choice("hybrid_jax.data:AUGMENTATIONS"), range(17)),
        "Augmentation: what follows, in this order.",
    ] = ()


@dataclasses.dataclass(frozen=True)
class Model:
    """The network that is compressed: one by name, or your own."""

    name: Annotated[str, Choice("hybrid_jax.models:names"), "A network by its name."] = "resnet8"
    widths: Annotated[
        tuple[int | tuple[int, ...], ...],
        Each(Either(CHANNELS, Each(CHANNELS, SOME)), range(65)),
        "Its channels, stage by stage; none takes the published.",
    ] = ()
    shortcut: Annotated[
        str, Choice(("", "pad", "project")), "Its shortcuts where shapes change; '' as published."
    ] = ""
    make: Annotated[
        str,
        Text(r"|.+:[^\W\d]\w*|[\w.]+\.(?!py$)\w+", "FILE.py:FUNCTION or an import path"),
        "A function without arguments that returns your network, in place of `name`.",
    ] = ""
    weights: Annotated[String, "Trained weights: a file, or a run's parent.safetensors."] = ""
    training: Annotated[
        str,
        Text(r"|[^\W\d]\w*", "the name of an argument"),
        "The argument that puts your network in training mode; '' finds it by the usual names.",
    ] = ""


@dataclasses.dataclass(frozen=True)
class Teacher(Model):
    """The network that compressed ones learn from; without a name or a function, the parent."""

    name: Annotated[str, Choice("hybrid_jax.models:names", none=True), "A network by its name."] = (
        ""
    )
    views: Annotated[
        int,
        Integer(0, 64),
        "Augmentations of an image, of which it answers once; 0 answers each step.",
    ] = 0
    answers: Annotated[
        String, "Directory of these answers, for runs to share; '' is the run's."
    ] = ""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What the compressed network may cost: absolute or a fraction of the parent's; 0 is any."""

    bytes: Annotated[Cost, "Size of every target's file; of C, of its constants."] = 0
    memory: Annotated[Cost, "Bytes of activations that are alive at once."] = 0
    macs: Annotated[Cost, "Multiply-accumulates of an image."] = 0
    bops: Annotated[Cost, "MACs × weight bits × activation bits of an image."] = 0
    latency: Annotated[Fraction, "Time of an image as a fraction of the parent's."] = 0.0
    runtime: Annotated[str, TARGETS, "The runtime in which latency is measured."] = "onnx"
    damage: Annotated[
        str,
        Choice("hybrid_jax.quantization:DAMAGES", none=True),
        "What chooses bits and widths: their effect on outputs; '' is kl where these are classes.",
    ] = ""


@dataclasses.dataclass(frozen=True)
class Ptq:
    """Quantization without training, of the effort `ptq`."""

    weight_bits: Annotated[Bits, "Bits of weights, where no budget of bytes or BOPs is."] = 8
    activation_bits: Annotated[Bits, "Bits of activations, where no budget of BOPs is."] = 8
    first_last_bits: Annotated[Bits, "Bits of the first and the last site."] = 8
    depthwise_bits: Annotated[Bits, "Bits that grouped and depthwise kernels have at least."] = 2
    calibration: Annotated[Ranges, "How ranges are found."] = "mse"
    images: Annotated[int, Integer(1, 1_000_000), "Training images to calibrate on."] = 512
    equalize: Annotated[Flag, "Scales of channels are evened out between layers."] = True
    rounding: Annotated[
        str, Choice("hybrid_jax.quantization:ROUNDINGS"), "How weights are rounded."
    ] = "gptq"
    correct_biases: Annotated[Flag, "The mean error of each channel is taken into its bias."] = True
    reestimate_batchnorm: Annotated[Flag, "BatchNorm's statistics are taken anew."] = False


@dataclasses.dataclass(frozen=True)
class Parent:
    """The training of the dense network, where its weights are not given."""

    steps: Annotated[Steps, "Steps; 0 takes given weights as they are."] = 300
    batch_size: Annotated[Batch, "Images in each step."] = 64
    optimizer: Optimizer = "adam"
    learning_rate: Annotated[Rate, "Learning rate at its peak."] = 0.01
    weight_decay: Annotated[Decay, "Decay of kernels, per step and unit of the rate."] = 0.01
    label_smoothing: Annotated[BelowOne, "Part of a label that is spread over all classes."] = 0.0


@dataclasses.dataclass(frozen=True)
class Experts:
    """Phase 1: compressed networks cut from the parent, and what tells them apart."""

    count: Annotated[int, Integer(2, 64), "How many experts."] = 4
    diversity: Annotated[
        str,
        Joined(Choice(("criterion", "seed", "bits", "width", "cluster", "classes", "bootstrap"))),
        "What tells experts apart; without any they are identical.",
    ] = "criterion+cluster"
    criteria: Annotated[
        tuple[str, ...],
        Each(Choice("hybrid_jax.pruning:CRITERIA"), SOME),
        "How channels are ranked; with criterion, those of expert e by criteria[e % len].",
    ] = ("magnitude", "magnitude_l2", "batchnorm_scale", "taylor")
    jitter: Annotated[float, Real(0, 10), "With seed, the noise on channel scores."] = 0.3
    others_weight: Annotated[Fraction, "With cluster or classes, the weight of others' images."] = (
        0.2
    )
    bits: Annotated[
        tuple[int, ...],
        Each(Integer(2, 8), SOME),
        "With bits, those of expert e are bits[e % len].",
    ] = (4, 8)
    sparsities: Annotated[
        tuple[float, ...],
        Each(Real(0, 1, "[)"), SOME),
        "With width, the sparsity of expert e is sparsities[e % len]; its part of a budget too.",
    ] = (0.75, 0.5)
    sparsity: Annotated[BelowOne, "Fraction of channels removed, where no budget is."] = 0.5
    allocation: Annotated[
        Allocation, "How removed channels are spread over layers, where no budget is."
    ] = "uniform"
    recovery: Annotated[
        str,
        Choice("hybrid_jax.pruning:RECOVERIES", none=True),
        "How weights that stay make up for those removed, before they are trained.",
    ] = ""
    multiple: Annotated[
        int, Integer(1, 256), "Widths kept are multiples of it, where no budget is."
    ] = 1
    weight_sparsity: Annotated[BelowOne, "Fraction of zeros among the weights that stay."] = 0.0
    weight_allocation: Annotated[Allocation, "How zeros are spread over kernels."] = "uniform"
    weight_granularity: Annotated[
        str,
        Choice("hybrid_jax.pruning:GRANULARITIES"),
        "What becomes zero as a whole; files hold the zeros.",
    ] = "unstructured"
    schedule: Annotated[
        str,
        Choice("hybrid_jax.pruning:SCHEDULES", none=True),
        "How zeros come in over the first half of training at sites; '' has them from the start.",
    ] = ""
    weight_bits: Annotated[Bits, "Bits of weights, where no budget of bytes or BOPs is."] = 4
    activation_bits: Annotated[Bits, "Bits of activations, where no budget of BOPs is."] = 8
    first_last_bits: Annotated[Bits, "Bits of the first and the last site."] = 8
    calibration: Annotated[Ranges, "How the ranges that training starts from are found."] = "minmax"
    weight_learning: Annotated[
        str,
        Choice("hybrid_jax.quantization.learning:of_weights"),
        "The gradient by which ranges of weights are learned; fixed leaves them.",
    ] = "lsq"
    activation_learning: Annotated[
        str,
        Choice("hybrid_jax.quantization.learning:of_activations"),
        "The gradient by which ranges of inputs of sites are learned; fixed leaves them.",
    ] = "lsq"
    deployed: Annotated[Fraction, "Last part of the steps, on the network as it is deployed."] = 0.2
    floats: Annotated[BelowOne, "First part of the other steps, in floats."] = 0.0
    method: Annotated[
        str, Choice(("auto", "vmap", "map", "unroll")), "How they are mapped; auto measures."
    ] = "auto"
    steps: Annotated[SomeSteps, "Steps of each expert."] = 300
    batch_size: Annotated[Batch, "Images in each step."] = 64
    optimizer: Optimizer = "adam"
    learning_rate: Annotated[Rate, "Learning rate at its peak."] = 0.004
    weight_decay: Annotated[Decay, "Decay of kernels, per step and unit of the rate."] = 0.01


@dataclasses.dataclass(frozen=True)
class Distillation:
    """How compressed networks learn from the teacher, which is the parent if none is given."""

    temperature: Annotated[float, Real(0, 100, "(]"), "By which logits are divided."] = 4.0
    alpha: Annotated[Fraction, "Share of the teacher in the loss; the rest is labels."] = 0.5


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What decides which expert runs."""

    kind: Annotated[
        str,
        Choice(("gate", "cascade", "auto")),
        "A learned gate, the cheap one first, or what validation images prefer of both.",
    ] = "gate"
    members: Annotated[
        tuple[str, ...],
        Each(Text(r"(?s).+", "a directory"), range(65), distinct=True),
        "Finished runs of one compressed network each, which are the experts; none cuts them.",
    ] = ()
    shares: Annotated[
        tuple[float, ...],
        Each(Real(0, 1), range(1, 17)),
        "Of a cascade, how much of the answer before a later one may keep; the best is chosen.",
    ] = (0.0, 0.25, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class Gate:
    """Phase 2: the network that picks an expert for an image."""

    network: Annotated[str, Choice("hybrid_jax.experts:GATES"), "Which network it is."] = "cnn"
    routing: Annotated[
        str,
        Choice("hybrid_jax.experts:ROUTINGS"),
        "Routing in training; it is evaluated as top-1, top-k and soft.",
    ] = "top_1"
    k: Annotated[int, Integer(1, 64), "Experts that run in top-k; at most experts.count."] = 2
    noise: Annotated[float, Real(0, 100, "(]"), "Of noisy routings, the noise on logits."] = 1.0
    features: Annotated[
        tuple[int, ...],
        Each(CHANNELS, range(1, 17)),
        "Of a network of layers, the output channels of each but the last.",
    ] = (8, 16)
    size: Annotated[Side, "Side in pixels that the image is averaged down to."] = 8
    bits: Annotated[Bits, "Bits of its weights and activations."] = 8
    balance: Annotated[Weight, "Weight of the loss that keeps all experts in use."] = 0.1
    supervision: Annotated[
        Weight, "Weight of the loss that sends images to their cluster's expert."
    ] = 1.0
    steps: Annotated[SomeSteps, "How many steps."] = 200
    batch_size: Annotated[Batch, "Images in each step."] = 128
    learning_rate: Annotated[Rate, "Learning rate at its peak."] = 0.01


@dataclasses.dataclass(frozen=True)
class Joint:
    """The gate and the experts trained together."""

    steps: Annotated[Steps, "Steps; 0 leaves both as they are."] = 100
    batch_size: Annotated[Batch, "Images in each step."] = 64
    learning_rate: Annotated[Rate, "Learning rate at its peak."] = 0.0005
    refit: Annotated[Flag, "The gate is trained alone once more at the end."] = False


@dataclasses.dataclass(frozen=True)
class Collapse:
    """The mixture distilled into one network of an expert's shape."""

    steps: Annotated[Steps, "Steps; 0 makes none."] = 0
    batch_size: Annotated[Batch, "Images in each step."] = 64
    learning_rate: Annotated[Rate, "Learning rate at its peak."] = 0.001
    routing: Annotated[str, Choice(("soft", "top_1")), "How the teacher routes."] = "soft"


@dataclasses.dataclass(frozen=True)
class Controls:
    """Single compressed networks that the mixture is compared with."""

    same_bytes: Annotated[Flag, "One of the bytes of the whole mixture."] = True
    same_bops: Annotated[Flag, "One of the BOPs of the mixture, on average."] = True


@dataclasses.dataclass(frozen=True)
class Deploy:
    """What is written for devices."""

    targets: Annotated[
        tuple[str, ...], Each(TARGETS, SOME, distinct=True), "Runtimes that files are written for."
    ] = ("onnx",)
    platforms: Annotated[
        tuple[str, ...],
        Each(Choice(("cpu", "cuda", "rocm", "tpu")), range(1, 5), distinct=True),
        "Where a StableHLO file runs.",
    ] = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How what was made is evaluated, and latencies taken."""

    part: Annotated[
        str,
        Choice(("test", "validation")),
        "The images that judge it; those of test are to be read once, at the end.",
    ] = "test"
    batch_size: Annotated[Batch, "Images in each batch."] = 256
    latency_calls: Annotated[int, Integer(1, 100_000), "Pairs of calls for each latency."] = 50


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole configuration: what a run does, and from which seed."""

    effort: Annotated[
        str,
        Choice("hybrid_jax.recipes:EFFORTS"),
        "Quantization alone, one network pruned and trained, or the whole method.",
    ] = "mixture"
    seed: Annotated[Seed, "Of all that is random, but for what is held out of the data."] = 0
    loss: Annotated[
        str,
        Choice("hybrid_jax.training:OBJECTIVES", none=True),
        "What is learned and judged by; '' is classification where labels are classes.",
    ] = ""
    checkpoint_every: Annotated[SomeSteps, "Steps between checkpoints."] = 500
    precision: Annotated[
        str,
        Choice(("float32", "bfloat16")),
        "What networks are trained in until they are as deployed; weights stay in float32.",
    ] = "float32"
    devices: Annotated[
        int,
        Integer(0, 2**20),
        "Devices that divide stacks by expert and batches by image; 0 is all.",
    ] = 0
    data: Data = Data()
    model: Model = Model()
    budget: Budget = Budget()
    ptq: Ptq = Ptq()
    parent: Parent = Parent()
    experts: Experts = Experts()
    distillation: Distillation = Distillation()
    teacher: Teacher = Teacher()
    mixture: Mixture = Mixture()
    gate: Gate = Gate()
    joint: Joint = Joint()
    collapse: Collapse = Collapse()
    controls: Controls = Controls()
    deploy: Deploy = Deploy()
    evaluation: Evaluation = Evaluation()
