"""What stays as the traced function has it."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from hybrid_jax.program.operations.base import Array, Operation


@dataclasses.dataclass(frozen=True, eq=False)
class Call(Operation):
    """Equations of the traced function for which there is no operation, in floats."""

    # function(*inputs) -> y, of as many examples as it was traced with
    function: Callable[..., Array]
    examples: int  # how many these are
    equation: str  # its text
    reason: str  # why it is no operation

    integral = False

    def refused(self, target: str) -> ValueError:
        """The error of a target that computes operations alone."""
        return ValueError(
            f"program must be of operations that {target} has, got {self.equation}: {self.reason}; "
            "write it otherwise in the model, or export to 'stablehlo', which holds any function"
        )

    def floats(self, *values):
        """Of each example by itself, as the first of that many like it."""
        batch = next((n for value in values if (n := value.shape[0]) != 1), 1)
        values = [jnp.broadcast_to(value, (batch, *value.shape[1:])) for value in values]

        def one(parts):
            alike = [jnp.broadcast_to(part, (self.examples, *part.shape)) for part in parts]
            return self.function(*alike)[0].astype(jnp.float32)

        return lax.map(one, values)
