"""What tells experts apart by their training images: clusters, classes, bootstrap samples."""

from collections.abc import Sequence

import numpy as np
from sklearn.cluster import KMeans

from hybrid_jax.recipes.config import IMAGES
from hybrid_jax.recipes.cut import Model
from hybrid_jax.recipes.task import Task


def image_weights(
    task: Task, dense: Model, sources: Sequence[str], count: int, others_weight: float
) -> np.ndarray | None:
    """Returns the weight (E, n) of each training image for each expert: the sources' product.

    None where `sources` name none of this kind.
    """
    train = task.splits.train

    def logits():
        return task.outputs(dense.cut.network.predict, dense.cut.variables, train)

    make = {
        "cluster": lambda: prefer(own_cluster(logits(), count, task.seed), others_weight),
        "classes": lambda: prefer(own_classes(train.labels, count), others_weight),
        "bootstrap": lambda: bootstrap(len(train.labels), count, task.seed),
    }
    weights = [make[source]() for source in IMAGES if source in sources]
    return np.prod(weights, axis=0, dtype=np.float32) if weights else None


def prefer(own: np.ndarray, others_weight: float) -> np.ndarray:
    """Returns weight 1 for an expert's own (E, n) images and `others_weight` for all others."""
    return np.where(own, 1.0, others_weight)


def own_cluster(features: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Returns bool (E, n): expert e owns cluster e of k-means of the features (n, ...); E ≤ n."""
    means = KMeans(count, n_init=4, random_state=seed)
    return means.fit_predict(features.reshape(len(features), -1))[None] == np.arange(count)[:, None]


def own_classes(labels: np.ndarray, count: int) -> np.ndarray:
    """Returns bool (E, n): expert e owns every E-th class, from class e on.

    With more experts than classes several own the same class.

    Example:
      >>> own_classes(np.array([0, 1, 2]), 2).astype(int).tolist()
      [[1, 0, 1], [0, 1, 0]]
    """
    classes = int(labels.max()) + 1
    return labels[None] % count == np.arange(count)[:, None] % classes


def bootstrap(n: int, count: int, seed: int) -> np.ndarray:
    """Returns float (E, n): how often each image is in each expert's own resample of n images.

    Source: Breiman, Bagging Predictors, Machine Learning 24, 1996.
    """
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, np.full(n, 1 / n), size=count).astype(float)
