"""From a function to its inference graph."""

from hybrid_jax.program.read.lowering import lower

__all__ = ["lower"]
