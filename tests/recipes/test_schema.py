"""Every key of the configuration just inside and just outside its bound, as values and as flags."""

import importlib
import math
import operator
import pathlib
import pkgutil
import re
import types
import typing

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

import hybrid_jax
from hybrid_jax import core, deploy, models, quantization, recipes
from hybrid_jax.recipes import bounds, schema, usage
from hybrid_jax.recipes.schema import KEYS

# What bounds take that say more than their limits: values inside and outside.
AMOUNTS = ([0, 0.5, 1000, 2.0], [1.5, -1, math.nan, math.inf, True, "half", "9", None, (3,)])
BY_HAND = {
    "a name": (["a", "ä b", "\n"], ["", 3]),
    "the name of an argument": (["", "train", "_ä2"], ["is training", "2nd", "a.b", 3]),
    "FILE.py:FUNCTION or an import path": (
        ["", "my_model.py:make", "dir with spaces/m.py:make", "package.module:make", "module.make"],
        ["my_model.py", "make", "m.py:", "m.py:a b", "a/b.c", 3],
    ),
    "a directory": (["run", "a b/c"], ["", 3, None]),
    "a fraction below 1 or a whole number": AMOUNTS,
    "a fraction below 1, a whole number, or either after 'test:'": (
        [*AMOUNTS[0], "test:0.1", "test:1000"],
        [*AMOUNTS[1], "tset:9", "test:", "test:1.5", "test:-1", "test:nan"],
    ),
    str(KEYS["budget.bytes"].bound): (
        [0, 0.0, 1e-9, 0.25, 1.0, 2, 64_000, 10**15],
        [-1, -0.5, 1.5, 64_000.0, 10**15 + 1, math.nan, True, "64kB", None],
    ),
    str(KEYS["model.widths"].bound.of): ([1, 2**16, (64, 64)], [0, 2**16 + 1, 1.5, (), (0,), "64"]),
}


def inside_and_outside(bound):
    """Values that the bound must take, and such that it must not."""
    match bound:
        case bounds.Integer(low, high):
            return [low, high, np.int64(low)], [low - 1, high + 1, low + 0.5, "4", True, None]
        case bounds.Real(low, high, ends):
            above, below = math.nextafter(low, high), math.nextafter(high, low)
            under, over = math.nextafter(low, -math.inf), math.nextafter(high, math.inf)
            least, too_small = (low, under) if ends[0] == "[" else (above, low)
            most, too_large = (high, over) if ends[1] == "]" else (below, high)
            wrong = [math.nan, math.inf, -math.inf, 1e300, "0.5", True, None]
            return [least, most, np.float32(0.5)], [too_small, too_large, *wrong]
        case bounds.Truth():
            return [True, False], [0, 1.0, "true", None]
        case bounds.Choice():
            return list(bound.names), [bound.names[-1] + "x", 3, None, bound.names[:1]]
        case bounds.Joined(choice):
            a, b, *_ = choice.names
            everything = "+".join(choice.names)
            return ["", a, f"{b}+{a}", everything], [f"{a}+{a}", "+", f"{a}+", f"{a} + {b}", a[1:]]
        case bounds.Each(of, count, distinct):
            entries, wrong = inside_and_outside(of)
            lengths = {min(set(count) - {0}), min(count), min(max(count), len(entries))}
            right = [tuple(entries[:length]) for length in lengths & set(count)]
            wrong = [(entry,) * min(set(count) - {0}) for entry in wrong]
            many = (entries * (max(count) + 1))[: max(count) + 1]
            wrong += [many, () if 0 not in count else "text", entries[0], None]
            wrong += [(entries[0],) * 2] if distinct and 2 in count else []
            return [*right, *map(list, right)], wrong
        case bounds.Text() if bound == bounds.Text():
            return ["", *map(str, range(6)), "~/a b,c"], [3, None, ("a",)]
    return BY_HAND[str(bound)]


def changed(key, value):
    """A configuration in which nothing but a value's own bound can refuse it."""
    free = {"experts.diversity": "", "experts.count": 64, "model.make": "module:function"}
    # Of the keys that would make no difference without zeros.
    free |= {"experts.weight_sparsity": 0.5} if key != "experts.weight_sparsity" else {}
    return {**recipes.flatten(recipes.Config()), **free, key: value}


@pytest.mark.parametrize("key", KEYS)
def test_a_value_inside_is_read_and_one_outside_named(key):
    inside, outside = inside_and_outside(KEYS[key].bound)
    for value in inside:
        got = operator.attrgetter(key)(recipes.read(changed(key, value)))
        assert got == (tuple(value) if isinstance(value, list) else value)
        kind = KEYS[key].kind
        assert isinstance(got, tuple if typing.get_origin(kind) is tuple else kind)
    for value in outside:
        with pytest.raises(ValueError, match=rf"^config\.{key}(\[\d\])* must be .*, got "):
            recipes.read(changed(key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.padding", 100_000),
        ("data.class_names", ("cat", "dog", "cat")),
        ("data.mean", (123.7,)),
        ("parent.label_smoothing", 1.0),
        ("distillation.temperature", 1e300),
        ("seed", 2**32),
        ("data.seed", 2**32),
        ("experts.diversity", "seed+seed"),
        ("experts.count", 1000),
        ("experts.bits", (4, 32)),
        ("experts.learning_rate", 1e9),
        ("gate.balance", math.inf),
        ("deploy.targets", ("onnx", "onnx")),
        ("budget.latency", 2.0),
    ],
)
def test_nonsense_is_out_of_bounds(key, value):
    with pytest.raises(ValueError, match=rf"config\.{key}(\[\d\])? must be "):
        recipes.read(changed(key, value))


def test_the_largest_seed_is_one_to_all_that_take_it():
    largest = KEYS["seed"].bound.high
    assert not np.array_equal(*(jax.random.bits(jax.random.key(s), 4) for s in (0, largest)))
    KMeans(1, random_state=largest).fit(np.zeros((1, 1)))
    with pytest.raises(ValueError, match="random_state"):
        KMeans(1, random_state=largest + 1).fit(np.zeros((1, 1)))


@pytest.mark.parametrize("name", ["digits", "cifar10", "bloodmnist"])
def test_shipped_configs_are_read(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert recipes.read(config).data.name == config.data.name


def test_defaults_are_read_from_whatever_holds_them():
    config = recipes.default_config()
    config.model.widths = [[8, 8], [16]]
    made = recipes.read(config)
    assert made.model.widths == ((8, 8), (16,))
    assert made == recipes.read(made) == recipes.read(recipes.flatten(config))
    assert recipes.flatten(made) == recipes.flatten(config)
    with pytest.raises(ValueError, match=r"config must be one of default_config.*, got NoneType"):
        recipes.read(None)


def test_unknown_and_missing_keys():
    config = recipes.default_config()
    config.gate.featurse = (3,)
    message = r"config.gate.featurse is no key .*; the nearest valid key is config.gate.features"
    with pytest.raises(ValueError, match=message):
        recipes.read(config)
    del config.gate.featurse, config.gate.features
    with pytest.raises(ValueError, match=r"config.gate.features must be given"):
        recipes.read(config)
    with pytest.raises(ValueError, match=r"config.gates is no key of the configuration"):
        recipes.override(config, {"gates": 3})


def choices_of(bound):
    """The choices among names of the library that a bound consists of."""
    if isinstance(bound, bounds.Choice):
        return [bound] if bound.late else []
    inner = [getattr(bound, name, None) for name in ("of", "first", "second")]
    return [c for own in inner if isinstance(own, bounds.Bound) for c in choices_of(own)]


LATE = {c.of for known in KEYS.values() for c in choices_of(known.bound)}
OWNERS = {
    "hybrid_jax.models:names": models.registry._MODELS,  # ours alone: of one's own is model.make
    "hybrid_jax.quantization.learning:of_activations": quantization.LEARNING,
    "hybrid_jax.quantization.learning:of_weights": quantization.LEARNING,
    "hybrid_jax.quantization.observers:of_any_bits": quantization.observers.METHODS,
}
"""The registries whose names keys do not take as they are."""


@pytest.mark.parametrize("of", sorted(LATE))
def test_an_entry_of_any_registry_is_one_by_name(of, monkeypatch):
    """Of checks, errors and `--help`, by nothing but an entry of a dict."""
    keys = [key for key, known in KEYS.items() if of in [c.of for c in choices_of(known.bound)]]
    registry = OWNERS[of] if of in OWNERS else bounds._of_library(of)
    one, first = "mine", next(iter(registry.values()))

    def read(key, name):
        value = (name,) if isinstance(KEYS[key].bound, bounds.Each) else name
        return recipes.read(changed(key, value))

    for key in keys:
        with pytest.raises(ValueError, match=rf"{key}(\[0\])? must be one of .*, got 'mine'"):
            read(key, one)
    monkeypatch.setitem(registry, one, first)
    for key in keys:
        assert one in str(operator.attrgetter(key)(read(key, one)))
        with pytest.raises(ValueError, match="got 'minne'; did you mean mine"):
            read(key, "minne")
    listed = {row.split("`")[1] for row in usage.table().splitlines() if " mine" in row}
    assert listed >= set(keys)
    assert one in usage.help_text()


NO_KEY = {
    "core:PRIMITIVES": set(core.PRIMITIVES),  # of JAX, which a network is made of
    "deploy:PROCESSORS": set(deploy.PROCESSORS),  # of `deploy.emulate`, which no run calls
    "quantization:LEARNING": {"dynamic"},  # of ranges that no file holds
}


def test_what_the_library_has_by_name_is_reachable_by_name():
    """A key of the configuration takes every name of every registry, but contrib's."""
    asked = [c for known in KEYS.values() for c in choices_of(known.bound)]
    rooms = {module.name for module in pkgutil.iter_modules(hybrid_jax.__path__)} - {"contrib"}
    left = {}
    for room in rooms:
        face = importlib.import_module(f"hybrid_jax.{room}")
        own = [c for c in asked if re.match(rf"hybrid_jax\.{room}\b", c.of)]
        for name in filter(str.isupper, dir(face)):
            registry = getattr(face, name)
            if isinstance(registry, dict):
                taken = [set(c.names) - {""} for c in own]
                taken = [names for names in taken if names <= set(registry)]
                left[f"{room}:{name}"] = set(registry).difference(*taken)
    assert {name: names for name, names in left.items() if names} == NO_KEY
    assert len(left) > 12


DISAGREEMENTS = {
    "gate.k must be at most config.experts.count = 2, got 3": {"gate.k": 3, "experts.count": 2},
    r"experts.criteria must hold at least two .* for 2 .*, got \('obs', 'obs', 'snip'\)": {
        "experts.diversity": "criterion",
        "experts.count": 2,
        "experts.criteria": ("obs", "obs", "snip"),
    },
    r"experts.bits must hold at least two .* 'bits', got \(4, 4\)": {
        "experts.diversity": "bits",
        "experts.bits": (4, 4),
    },
    r"experts.sparsities must hold at least two .* got \(0.5,\)": {
        "experts.diversity": "width",
        "experts.sparsities": (0.5,),
    },
    "experts.weight_sparsity must be above 0 with config.experts.schedule = 'cubic', .* got 0": {
        "experts.schedule": "cubic",
    },
    "experts.allocation must be 'uniform' with config.budget.macs, which chooses widths": {
        "effort": "finetune",
        "budget.macs": 0.5,
        "experts.allocation": "global",
    },
    "experts.sparsity must be 0.5 with config.budget.bytes, which chooses widths, got 0.25": {
        "budget.bytes": 8000,
        "experts.sparsity": 0.25,
    },
    "experts.diversity must be without 'bits' with config.budget.bytes, which chooses it": {
        "budget.bytes": 8000,
        "experts.diversity": "bits",
    },
    "experts.diversity must be without 'width' with config.budget.macs, which chooses it": {
        "budget.macs": 0.5,
        "experts.diversity": "criterion+width",
    },
    "experts.weight_sparsity must be above 0 with config.experts.weight_allocation = 'erk'": {
        "experts.weight_allocation": "erk",
    },
    "experts.floats and deployed must leave 2 .* got 0.5 and 1.0, which leave 0 of 300": {
        "experts.weight_sparsity": 0.5,
        "experts.schedule": "cubic",
        "experts.floats": 0.5,
        "experts.deployed": 1.0,
    },
    "experts.jitter must not be 0 with diversity 'seed'": {
        "experts.diversity": "criterion+seed",
        "experts.jitter": 0.0,
    },
    "experts.others_weight must not be 1 with diversity 'cluster'": {
        "experts.diversity": "cluster",
        "experts.others_weight": 1.0,
    },
    "experts.others_weight must not be 1 with diversity 'classes'": {
        "experts.diversity": "classes",
        "experts.others_weight": 1.0,
    },
}


@pytest.mark.parametrize("message", DISAGREEMENTS)
def test_values_that_do_not_agree(message):
    """Each is refused for the last of its values: without that the others are read."""
    *others, (last, _) = DISAGREEMENTS[message].items()
    for values in (dict(others), DISAGREEMENTS[message]):
        config = recipes.default_config()
        recipes.override(config, values)
        if last in values:
            with pytest.raises(ValueError, match=f"config.{message}"):
                recipes.read(config)
        else:
            recipes.read(config)


@pytest.mark.parametrize("given", ["model.weights", "model.make"])
def test_a_parent_that_is_given_takes_no_steps(given):
    config = recipes.default_config()
    recipes.override(config, {"parent.steps": 0, given: "module:function"})
    assert recipes.read(config).parent.steps == 0


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("experts.count=3", 3),
        ("experts.count=many", "many"),
        ("experts.deployed=1e-1", 0.1),
        ("data.flip=TRUE", True),
        ("data.flip=yes", "yes"),
        ("data.dir=3", "3"),
        ("data.dir=a=b", "a=b"),
        ("data.validation=0.2", 0.2),
        ("data.validation=test:9", "test:9"),
        ("data.resize=", ()),
        ("data.resize=32", (32,)),
        ("data.resize=[32, 24]", (32, 24)),
        ("data.class_names=cat, dog", ("cat", "dog")),
        ("data.class_names='cat','dog'", ("cat", "dog")),
        ("data.class_names='cat'", ("cat",)),
        ("data.class_names=0,1", ("0", "1")),
        ("model.widths=(64,64),(128,)", ((64, 64), (128,))),
        ("budget.bytes=64_000", 64_000),
        ("budget.macs=.25", 0.25),
        ("gate.features=8,x", ("8", "x")),
    ],
)
def test_a_flag_is_a_value(flag, value):
    key = flag.partition("=")[0]
    (got,) = schema.flag_values([f"--config.{flag}"]).values()
    assert got == value
    assert type(got) is type(value), key


@given(st.sampled_from(list(KEYS)), st.text(max_size=12))
def test_no_flag_breaks_the_reading(key, text):
    config = recipes.default_config()
    recipes.override(config, recipes.flag_values([f"--config.{key}={text}"]))
    try:
        recipes.read(config)
    except ValueError as error:
        assert f"config.{key}" in str(error)  # noqa: PT017


def test_help_holds_every_key_as_a_flag_of_its_default():
    lines = usage.help_text().splitlines()
    assert max(map(len, lines)) <= usage.WIDTH
    flags = [line.strip() for line in lines if line.startswith("  --")]
    config = recipes.default_config()
    for key in KEYS:
        recipes.override(config, {key: None})
    recipes.override(config, recipes.flag_values(flags))
    assert recipes.read(config) == recipes.Config()


def test_the_table_has_a_row_for_each_key_and_a_sentence_in_it():
    heading, line, *rows = usage.table().splitlines()
    assert {row.count("|") for row in (heading, line, *rows)} == {4}
    for row, (key, known) in zip(rows, KEYS.items(), strict=True):
        assert row.startswith(f"| `{key}` | ")
        assert f"| {known.doc} " in row
        assert known.doc.endswith(".")
        assert ". " not in known.doc
        assert isinstance(known.kind, type | types.GenericAlias | types.UnionType)


def test_the_readme_has_the_table():
    """If not: python -c 'from hybrid_jax.recipes import usage; print(usage.table())'."""
    readme = pathlib.Path(__file__).parents[2] / "README.md"
    assert usage.table() in readme.read_text()


def test_no_name_of_the_recipes_is_hidden_by_a_file_of_that_name():
    assert recipes.compress.__module__ == "hybrid_jax.recipes.pipeline"  # imports all of them
    for name in dir(recipes):
        if name in recipes.__getattr__.keywords["imported_symbols"]:
            assert not isinstance(getattr(recipes, name), types.ModuleType), name
