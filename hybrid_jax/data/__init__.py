"""Labelled images, in memory or on disk: sources, splits, resumable batches and augmentation.

Sources and augmentations by name are in registries that are open to users: `SOURCES` and
`AUGMENTATIONS`.
"""

from hybrid_jax.data.augment import AUGMENTATIONS as AUGMENTATIONS
from hybrid_jax.data.augment import augmentation as augmentation
from hybrid_jax.data.augment import in_place as in_place
from hybrid_jax.data.augment import normalize as normalize
from hybrid_jax.data.augment import random_flip as random_flip
from hybrid_jax.data.augment import random_shift as random_shift
from hybrid_jax.data.batches import batches as batches
from hybrid_jax.data.batches import epoch_order as epoch_order
from hybrid_jax.data.batches import steps_per_epoch as steps_per_epoch
from hybrid_jax.data.on_disk import OnDisk as OnDisk
from hybrid_jax.data.reading import MEMORY as MEMORY
from hybrid_jax.data.reading import Examples as Examples
from hybrid_jax.data.reading import Source as Source
from hybrid_jax.data.reading import check_size as check_size
from hybrid_jax.data.reading import fit as fit
from hybrid_jax.data.sources import SOURCES as SOURCES
from hybrid_jax.data.sources import load as load
from hybrid_jax.data.splits import Arrays as Arrays
from hybrid_jax.data.splits import Splits as Splits
from hybrid_jax.data.splits import check_amount as check_amount
from hybrid_jax.data.splits import from_arrays as from_arrays
from hybrid_jax.data.splits import stratified as stratified
from hybrid_jax.data.take import take as take
