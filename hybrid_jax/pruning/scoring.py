"""By what scheduled pruning scores and masks: shared by the transformations that follow one."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax import core
from hybrid_jax.pruning.allocation import Allocation
from hybrid_jax.pruning.granularity import Granularity
from hybrid_jax.pruning.masking import masks as make_masks
from hybrid_jax.pruning.schedules import Schedule
from hybrid_jax.pruning.selection import check_sparsity

Accumulate = Callable[[Any, Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Scoring:
    """The arguments of `prune_by_schedule` but the optimizer, and what follows from them."""

    criterion: Callable[..., Any]
    schedule: Schedule
    granularity: Granularity | None
    allocation: Allocation | None
    every: int
    exempt: tuple[str, ...]
    needs: tuple[str, ...]
    accumulate: Accumulate | None

    def __post_init__(self):
        core.check_integer("every", self.every, 1)
        if (self.accumulate is not None) != ("accumulated" in self.needs):
            raise ValueError(
                "needs must name 'accumulated' if and only if accumulate is given, got "
                f"needs={self.needs} and accumulate={self.accumulate}"
            )
        if self.granularity is not None:
            # Where the schedule ends; on the way there `masks` would only cut it off.
            check_sparsity(
                self.schedule(jnp.int32(jnp.iinfo(jnp.int32).max)),
                f"sparsity of the schedule for {self.granularity.name}",
                most=self.granularity.max_sparsity,
            )

    def nothing_removed(self, params: Any) -> Any:
        """Masks all True; raises what `masks` raises on these parameters."""
        if not jax.tree.leaves(params):
            return params  # What the state is made of, asked as `core.map_state` does.
        like = jax.eval_shape(
            lambda p: self.masks(p, [p] * len(self.needs), jnp.float32(0.0)), params
        )
        return jax.tree.map(lambda mask: jnp.ones(mask.shape, bool), like)

    def start(self, params: Any) -> Any:
        """What is accumulated before the first step."""
        if self.accumulate is None:
            return ()

        def zeros(param):
            floating = jnp.issubdtype(param.dtype, jnp.floating)
            return jnp.zeros(param.shape, jnp.float32 if floating else param.dtype)

        return jax.tree.map(zeros, params)

    def add(self, accumulated: Any, params: Any, known: Mapping[str, Any]) -> Any:
        """What is accumulated after this step."""
        if self.accumulate is None:
            return accumulated
        result = self.accumulate(accumulated, params, _given("gradients", known))
        core.check_same_structure("the result of accumulate", accumulated, result)
        return result

    def gather(self, accumulated: Any, known: Mapping[str, Any]) -> list[Any]:
        """What the criterion needs, in order."""
        return [_given(name, {**known, "accumulated": accumulated}) for name in self.needs]

    def masks(self, params: Any, needed: list[Any], sparsity: jax.Array, held: Any = None) -> Any:
        """Masks of `sparsity`; what `held` removes leaves first."""
        scores = self.criterion(params, *needed)
        return make_masks(scores, sparsity, self.granularity, self.allocation, self.exempt, held)


def _given(name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise ValueError(f"update must be called with {name}=..., got none")
    return known[name]
