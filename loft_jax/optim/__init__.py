"""LoFT as links of an Optax chain, over any tree of low-rank factor pairs.

This package imports jax and optax only. From what is general to what is specific:

- `pairs`: which leaves of a tree are the two factors of one adapter, and their matrix form.
- `subspace`: orthonormal bases of what a factor spans, and changes of basis.
- `second_moment`: the second moment of a full gradient, held in such a basis.
- `links`: the five gradient transformations.
- `loft`: the optimizer, a chain of them.
- `state`: what the state of an optimizer costs, and how it lies on a mesh.
"""
