"""LoFT, RefLoRA and related optimizers as links of an Optax chain, over trees of low-rank pairs.

This package needs jax and optax only. Everything public is here; where to read what:

- `loft_optimizers`: LoFT, whole, with AdamW and with Muon; `refactored`: RefLoRA and its scalar
  form; `baselines`: LoRA+, LoRA-FA, Riemannian LoRA, AltLoRA+.
- `links`: gradient scaling, clipping, the overlap of both updates, alternation; `moments`:
  calibrated moments and the projected update; `balance`: the balanced factorization.
- `second_moments`: what a rule for the second moment is, the factored and the diagonal one;
  `full_moment`: the exact one, of `packed_matrices`; `fused_direction`: its direction as a kernel
  for GPUs and TPUs.
- `paired_updates`: updates with their pairs, as every link sees them, and bases computed once;
  `stacking`: pairs of one shape as one array.
- `pairs`: which leaves of a tree are the two factors of one adapter, and their matrix form.
- `linear_algebra`: products, orthonormal bases, many small matrices at once.
- `state`: what the state of an optimizer costs, and how it lies on a mesh; `meshes`: meshes with
  explicit axes.
- `arguments`: numbers out of range; `eager`: updates that are not jitted, without compiling;
  `optax_types`: what Optax types widely, typed as it is here.

No module has the name of a function: `loft_jax.optim.loft` is the optimizer.
"""

from loft_jax.optim.balance import balance_factors, factor_grams
from loft_jax.optim.baselines import (
    alt_lora_plus,
    lora_fa,
    lora_plus,
    precondition_by_gram,
    riemannian_lora,
)
from loft_jax.optim.links import (
    alternate_factors,
    assign_overlap,
    clip_by_projected_norm,
    project_gradients,
)
from loft_jax.optim.loft_optimizers import loft, loft_muon, orthogonalize_momentum
from loft_jax.optim.moments import calibrate_moments, project_updates
from loft_jax.optim.paired_updates import share_bases
from loft_jax.optim.pairs import FactorSpec, find_pairs, paired_leaves
from loft_jax.optim.refactored import (
    balance_norms,
    precondition_by_reflora,
    reflora,
    reflora_s,
)
from loft_jax.optim.state import state_bytes, state_shardings

__all__ = [
    "FactorSpec",
    "alt_lora_plus",
    "alternate_factors",
    "assign_overlap",
    "balance_factors",
    "balance_norms",
    "calibrate_moments",
    "clip_by_projected_norm",
    "factor_grams",
    "find_pairs",
    "loft",
    "loft_muon",
    "lora_fa",
    "lora_plus",
    "orthogonalize_momentum",
    "paired_leaves",
    "precondition_by_gram",
    "precondition_by_reflora",
    "project_gradients",
    "project_updates",
    "reflora",
    "reflora_s",
    "riemannian_lora",
    "share_bases",
    "state_bytes",
    "state_shardings",
]
