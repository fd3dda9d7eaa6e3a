"""Criteria: how much each weight matters, as a pytree of scores shaped like the parameters.

A criterion is a pure function `criterion(kernels, params, *statistics) -> scores` in float32. A
score is larger where a weight is worth more, and says nothing about how many weights leave: `masks`
and `keep_channels` do. Scored are the `kernels` that `core.trace(...)` found, whatever their rank
and layout; all that is no site's kernel (biases, normalizations, statistics, though stacked by a
scan), or has no statistic, carries `optax.MaskedNode()`. The exception is `batchnorm_scale`, which
scores the normalization scales and nothing else. For a stack of E experts, `jax.vmap` the criterion
over it. By name, `CRITERIA[name](Given(kernels, params, fn, loss, batches, key))` works out the
statistics too.

Scores that compare across layers go with `global_` allocation, the others with `uniform` or `erk`.

| criterion        | statistics it needs                        | compares across layers         |
|:-----------------|:-------------------------------------------|:-------------------------------|
| magnitude        | none                                       | no                             |
| random           | a key                                      | yes                            |
| lamp             | none                                       | yes                            |
| geometric_median | none                                       | no                             |
| batchnorm_scale  | none                                       | yes                            |
| taylor           | gradients                                  | yes                            |
| snip             | gradients, at initialization               | yes                            |
| grasp            | `hessian_gradient`, at initialization      | yes                            |
| fisher           | `mean_squared_gradients`                   | yes                            |
| movement         | `accumulate_movement`, of training steps   | yes                            |
| wanda            | `activation_norms` of batches              | no, nor between output neurons |
| chip             | `channel_independence` of batches          | no                             |
| obs              | `core.input_grams` of batches              | no                             |
"""

from hybrid_jax.pruning.criteria import activations, filters, gradients, weights
