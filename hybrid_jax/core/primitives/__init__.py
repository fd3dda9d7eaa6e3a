"""What is known of each primitive: how channels pass it, how it is made smaller, what it costs."""

from hybrid_jax.core.primitives import contraction, elementwise, moves, parts, reduce
from hybrid_jax.core.primitives.base import PRIMITIVES, Primitive, propagate
