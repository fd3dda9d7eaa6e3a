"""What a stage makes of a network: arrays and plain values, of which its functions are rebuilt."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core, experts, models, quantization
from hybrid_jax import program as p


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """A network with channels physically removed, and how it is to be quantized.

    Attributes:
      source: The network that it was cut from, whose variables give the shapes.
      images: Images (B, H, W, C) as it takes them.
      variables: Its own, at its own widths.
      kept: {path: indices of each axis that stay}; {} for the whole network.
      bits: {site: {'weight', 'activation': bits}}; {} for floats.
      origin: Which of a run's networks the source is; '' for the parent.
      learning: {'weight_learning', 'activation_learning'} as of `quantization.spec`.
    """

    source: models.Network
    images: jax.Array
    variables: Any
    kept: Mapping[str, tuple[np.ndarray, ...]] = dataclasses.field(default_factory=dict)
    bits: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    origin: str = ""
    learning: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def network(self) -> models.Network:
        """Its functions, in floats."""
        predict, train, params = self.source
        if self.kept:
            predict = core.narrow(predict, params, self.kept)
            train = train and core.narrow(train, params, self.kept)
        return models.Network(predict, train, self.variables)

    @property
    def whole(self) -> "Cut":
        """The network that it was cut from, as it came."""
        return Cut(self.source, self.images, self.source.params, origin=self.origin)

    @functools.cached_property
    def graph(self) -> core.Graph:
        """Its sites."""
        image = jax.ShapeDtypeStruct((1, *self.images.shape[1:]), self.images.dtype)
        return core.trace(self.network.predict, self.variables, image)

    @functools.cached_property
    def spec(self) -> quantization.Spec:
        """How its sites are quantized."""
        return quantization.with_bits(quantization.spec(self.graph, **self.learning), self.bits)

    @functools.cached_property
    def statistics(self) -> frozenset[str]:
        """Paths of the variables that are not trained."""
        return models.statistics(self.network, self.images[:1])

    @functools.cached_property
    def program(self) -> p.Program:
        """Its inference graph, in floats."""
        return p.lower(self.network.predict, self.variables, self.images)

    @functools.cached_property
    def plan(self) -> quantization.Plan:
        """Its inference graph, and how that is stored."""
        return quantization.plan(self.program, self.spec)

    def merge(self, *parts: Mapping[str, Any]) -> Any:
        """Returns variables of {path: leaf}s."""
        flat = {path: leaf for part in parts for path, leaf in part.items()}
        return core.map_with_path(lambda path, _: flat[path], self.variables)

    def split(self, variables: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns what is trained of the variables, and what is not, as {path: leaf}s."""
        flat = core.flatten_paths(variables)
        rest = {path: flat[path] for path in flat if path in self.statistics}
        return {path: leaf for path, leaf in flat.items() if path not in rest}, rest

    def with_bits(self, weight: int, activation: int, first_last: int, depthwise: int = 2) -> "Cut":
        """Returns the same cut to be quantized in these bits, see `quantization.spec`.

        Depthwise kernels have at least theirs.
        """
        own = quantization.spec(
            self.graph, weight_bits=weight, activation_bits=activation, first_last_bits=first_last
        )
        least = self.least_bits(depthwise)
        bits = {
            s.name: {
                "weight": max(s.weight.bits, least.get(s.name, 2)),
                "activation": s.activation.bits,
            }
            for s in own.sites
        }
        return self.in_bits(bits)

    def least_bits(self, depthwise: int) -> dict[str, int]:
        """{site: `depthwise`} of grouped kernels: each output has only a few weights of its own."""
        return {site.name: depthwise for site in self.graph.sites if site.groups > 1}

    def in_bits(self, bits: Mapping[str, Mapping[str, int]]) -> "Cut":
        """Returns the same cut to be quantized in other bits, {site: {'weight', 'activation'}}."""
        return self._kept(dataclasses.replace(self, bits=bits), "graph", "statistics", "program")

    def with_variables(self, variables: Any) -> "Cut":
        """Returns the same cut with other variables."""
        new = dataclasses.replace(self, variables=variables)
        return self._kept(new, "graph", "spec", "statistics")  # these depend on shapes alone

    def _kept(self, new: "Cut", *names: str) -> "Cut":
        """The new one, with what is known of this one already."""
        new.__dict__.update((name, known) for name, known in vars(self).items() if name in names)
        return new


class Model(NamedTuple):
    """A network of a run.

    Attributes:
      cut: Its functions, and its variables in floats.
      masks: {path of a kernel: which of its weights are kept}.
      ranges: Of its sites, before it is deployed, and of the edges of its inference graph after.
      weights: Those of its inference graph once it is deployed; {} before.
      fn: ({'params': weights, 'ranges': ranges}, images (B, H, W, C)) -> outputs, fake-quantized as
        a device computes; models of one program have one function. None before it is deployed.
      facts: What else is told of it: JSON.
    """

    cut: Cut
    masks: Mapping[str, jax.Array] = {}
    ranges: Mapping[str, Any] = {}
    weights: Mapping[str, Any] = {}
    fn: Callable[[Any, jax.Array], jax.Array] | None = None
    facts: Mapping[str, Any] = {}

    @property
    def params(self) -> dict[str, Any]:
        """What `fn` takes."""
        return {"params": self.weights, "ranges": self.ranges}

    @property
    def has_function(self) -> bool:
        """Whether there is all that `fn` takes: a graph's weights, and ranges of its edges."""
        return bool(self.weights and self.ranges)

    def trained(self, params: Mapping[str, Any]) -> "Model":
        """Returns the model with other `params`."""
        return self._replace(weights=params["params"], ranges=params["ranges"])

    def encoded(self) -> p.Program:
        """Returns its inference graph as it is stored: in integers, or in floats without bits."""
        if not self.cut.bits:
            return self.cut.program
        planned = self.cut.plan.replace(self.weights)
        return quantization.encode(planned, self.ranges, self.cut.images)


def deployed(model: Model) -> Model:
    """Returns a model of sites as its inference graph, with the weights and ranges that it has."""
    planned = model.cut.plan
    ranges = quantization.edge_ranges(planned, model.ranges, model.cut.images)
    weights = jax.tree.map(jnp.asarray, dict(planned.program.params))
    return model._replace(ranges=jax.tree.map(jnp.asarray, ranges), weights=weights)


def with_functions(made: Sequence[Model]) -> list[Model]:
    """Returns deployed models with their functions, one for all that are one program."""
    image = jax.ShapeDtypeStruct((1, *made[0].cut.images.shape[1:]), made[0].cut.images.dtype)
    fns = [_function(model.cut.plan) for model in made]
    shared = experts.alike(fns, [model.params for model in made], image)
    return [model._replace(fn=fn) for model, fn in zip(made, shared, strict=True)]


def _function(planned):
    fn = quantization.as_deployed(planned)
    return lambda own, images: fn(own["params"], own["ranges"], images)
