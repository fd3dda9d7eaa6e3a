"""Paths and rules, argument checks, tracing to sites and channels, and the interpreter."""

from hybrid_jax.core.arrangement import Kernel
from hybrid_jax.core.channels import Group, Member, expand, keep_indices
from hybrid_jax.core.checks import (
    batch_size,
    check_arrays,
    check_batches,
    check_choice,
    check_finite,
    check_fraction,
    check_integer,
    check_masks,
    check_positive,
    check_same_paths,
    check_same_structure,
)
from hybrid_jax.core.examples import (
    VOID,
    check_labels,
    expectation,
    filled,
    one_by_one,
    one_hot,
    selected,
    top_class,
    weighted_mean,
    widen,
)
from hybrid_jax.core.fast_convolution import fast_convolutions
from hybrid_jax.core.files import (
    DRAFT,
    Path,
    append,
    as_path,
    cache_folder,
    in_bucket,
    on_this_machine,
    write_atomically,
    write_json,
)
from hybrid_jax.core.grams import Gram, check_grams, input_grams
from hybrid_jax.core.graph import Graph, abstract, trace
from hybrid_jax.core.host import check_known, is_traced, namespace, on_device
from hybrid_jax.core.interpreter import bind, evaluate, inline
from hybrid_jax.core.measure import CHOICES, Choices, machine, seconds
from hybrid_jax.core.narrowing import narrow_graph
from hybrid_jax.core.one_pass import one_pass_affine
from hybrid_jax.core.patches import kernel_from_matrix, kernel_matrix, output_matrix, patches
from hybrid_jax.core.paths import (
    REQUIRED,
    flatten_paths,
    is_masked_node,
    map_masked,
    map_state,
    map_with_path,
    match_rules,
    path_string,
)
from hybrid_jax.core.placing import copy, gathered, is_key, place, put, whole
from hybrid_jax.core.primitives import PRIMITIVES, Primitive
from hybrid_jax.core.processes import is_first, of_first, say
from hybrid_jax.core.replacement import at_sites
from hybrid_jax.core.sealed import Damaged, digest, read_sealed, seal, unseal, write_sealed
from hybrid_jax.core.shrink import (
    Certificate,
    kept_indices,
    mask_removed,
    narrow,
    shrink,
    slice_state,
    slice_tree,
)
from hybrid_jax.core.sites import Site
from hybrid_jax.core.surgeon import damped_gram, inverse_factor, sweep_rows
