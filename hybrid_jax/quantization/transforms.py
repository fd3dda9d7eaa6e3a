"""Optimizers for parameters that hold ranges."""

import jax
import optax

from hybrid_jax.quantization.grids import Range


def scale_by_width() -> optax.GradientTransformation:
    """Makes every update of a range a fraction of its width, high − low.

    It belongs between an adaptive optimizer and its learning rate. Adam's updates have the size of
    the learning rate whatever they move, so that the narrow range of a kernel is passed in a few
    steps, and its ends change places; as a fraction of the width they move like the logarithm of a
    threshold. While the learning rate times the inner update is below ½, low stays below high. A
    range without a width stays as it is. Updates of all else pass.

    Source: Jain et al., Trained Quantization Thresholds (TQT) for Accurate and Efficient
    Fixed-Point Inference of Deep Neural Networks, arXiv 1903.08066, section 3.3, which learns the
    logarithm.

    Example:
      >>> tx = optax.chain(optax.scale_by_sign(), scale_by_width(), optax.scale(-0.01))
      >>> ranges = Range(jax.numpy.float32(-0.03), jax.numpy.float32(0.01))
      >>> gradient = Range(jax.numpy.float32(-5.0), jax.numpy.float32(2.0))
      >>> updates, _ = tx.update(gradient, tx.init(ranges), ranges)
      >>> print(f'{updates.low:.4f} {updates.high:.4f}')
      0.0004 -0.0004
    """

    def update(updates, params):
        def scaled(update, span):
            if not isinstance(span, Range):
                return update
            width = span.high - span.low
            return Range(update.low * width, update.high * width)

        return jax.tree.map(scaled, updates, params, is_leaf=lambda x: isinstance(x, Range))

    return optax.stateless(update)
