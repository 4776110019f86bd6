"""LoFT as links of an Optax chain, over any tree of low-rank factor pairs.

This package imports jax and optax only. From what is general to what is specific:

- `pairs`: which leaves of a tree are the two factors of one adapter, and their matrix form;
  `tall`: that form, which never transposes an array.
- `subspace`: orthonormal bases of what a factor spans, and changes of basis.
- `packed`, `tiles`, `rounding`: symmetric matrices as packed halves, work on a tile at a time,
  rounding to bfloat16 that is right on average.
- `second_moment`: what a rule for the second moment is; `full_moment`, `factored_moment`,
  `diagonal_moment`: the three rules.
- `tree`: leaves beside their pairs, as every link sees them; `sharing`: bases computed once.
- `links`: gradient scaling, clipping, the overlap of both updates, alternation; `moments`:
  calibrated moments and the projected update; `balance`: the balanced factorization; `together`:
  small matrices of several sizes in one call.
- `loft`, `muon`: the optimizers, chains of these.
- `reflora`: RefLoRA and its scalar form; `baselines`: LoRA+, LoRA-FA, Riemannian LoRA, AltLoRA+.
- `state`: what the state of an optimizer costs, and how it lies on a mesh; `conditioning`: how far
  factors are from orthogonal ones.
"""
