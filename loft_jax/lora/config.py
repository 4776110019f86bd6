"""The configuration of LoRA: which layers get factors, and of which kind."""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Literal, TypeGuard, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from loft_jax.errors import InputError, shown
from loft_jax.patterns import Patterns

Initializer = Callable[[jax.Array, tuple[int, ...], DTypeLike], jax.Array]
Init = Literal["kaiming_uniform", "gaussian", "balanced", "pissa"]

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoRAConfig:
    """The configuration of `loft_jax.lora.add_lora`, which adds `W = W0 + s A B` to layers.

    The scaling `s` is `alpha / rank`, or `alpha / sqrt(rank)` with `use_rslora`. Where it is not 1,
    `loft` and other optimizers have to be told it: `loft_jax.lora.scaling_of(model)`.

    Names and patterns match the dotted path of a module, as in PEFT: a name matches the end of the
    path at a dot (`"q_proj"`, `"self_attn.q_proj"`), a regular expression the whole path.

    Args:
        rank: Inner size r of the factors, at least 1 and at most `min(in, out)` of each layer.
        alpha: Numerator of the scaling. None uses the rank of each layer, for a scaling of 1, or of
            sqrt(rank) with `use_rslora`.
        target_modules: A name, a sequence of names, one regular expression, or `"all-linear"`:
            every linear layer (`nnx.Linear`, `LinearGeneral`, `Einsum`, and classes given to
            `register_lora_layer`) except the output head, which is the module `lm_head` at the top
            of the model. Embeddings must be named.
        exclude_modules: Name, names or regular expression of layers to exclude.
        layers: Numbers of the layers of the model that get factors, PEFT's `layers_to_transform`;
            negative ones count from the last. None is all of them. A module inside of no numbered
            layer, such as a head, then gets none. Factors of a stack have as many layers as get
            them, so that the others cost no memory; the families of this library run such a stack,
            and a model of your own passes its state through `loft_jax.lora.with_full_stacks`.
        dropout: Probability in [0, 1) of dropping an input of the low-rank branch in training.
            Embeddings have no such input, and no dropout.
        dtype: Dtype of the stored factors; they are cast to the layer's dtype for the computation.
            DoRA's magnitudes are stored in float32 or wider.
        init: Initialization of A: `"kaiming_uniform"` is uniform in ±1/sqrt(in), `"gaussian"`
            normal with standard deviation 1/rank, or a JAX initializer is called with shape `(in,
            rank)`. B starts at zero. For an embedding, A starts at zero and B is standard normal.
            Two further options start with a product that is not zero and subtract it, so that the
            layer still starts as the base: `W = W0 + s (A B - A0 B0)`; the initial A0 and B0 are
            kept beside the weight, which does not change. `"balanced"`: A is uniform in ±1/sqrt(in)
            and B in ±1/sqrt(out), so that AᵀA and BBᵀ are about equal. `"pissa"`: `s A B` is the
            best approximation of W0 of that rank, `A = U sqrt(S / s)` and `B = sqrt(S / s) Vᵀ`,
            from a full SVD of every weight. Neither is available for embeddings.
        rank_pattern: Ranks of layers by regular expressions for the end of the path; the first
            match counts.
        alpha_pattern: The same for alpha.
        use_rslora: Scale by `alpha / sqrt(rank)`, so that the size of the update does not decrease
            with the rank.
        use_dora: Train the norm of each column of the weight separately from its direction, `W = m
            (W0 + s A B) / ‖W0 + s A B‖`. Norms are over the inputs of each output, and constants
            for the gradient. m starts as the norms of W0. For `nnx.Linear` only.

    Raises:
        InputError: A value is out of its range; the message names the field.

    Example:
        >>> LoRAConfig(rank=8, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4})
        ... # doctest: +ELLIPSIS
        LoRAConfig(rank=8, alpha=None, target_modules=['q_proj', 'v_proj'], ...)

    Source:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685. Field
        names and matching are those of Hugging Face PEFT. rsLoRA: Kalajdzievski, arXiv 2312.03732.
        DoRA: Liu et al., arXiv 2402.09353. PiSSA: Meng et al., arXiv 2404.02948.
    """

    rank: int = 8
    alpha: float | None = None
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] = ()
    layers: Sequence[int] | None = None
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    init: Init | Initializer = "kaiming_uniform"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        _check_rank("rank", self.rank)
        if self.alpha is not None:
            check_alpha("alpha", self.alpha)
        _check_modules("target_modules", self.target_modules)
        if not self.target_modules:
            raise InputError("target_modules is empty: expected a name, names or a pattern")
        _check_modules("exclude_modules", self.exclude_modules)
        if self.layers is not None:
            _check_layers(self.layers)
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise InputError(f"dropout is {self.dropout!r}, expected a number in [0, 1)")
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise InputError(f"dtype is {self.dtype!r}, expected a floating dtype")
        if not callable(self.init) and self.init not in get_args(Init):
            names = ", ".join(map(repr, get_args(Init)))
            raise InputError(f"init is {self.init!r}, expected {names} or an initializer")
        for name in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} is {getattr(self, name)!r}, expected True or False")
        for key, rank in self.rank_pattern.items():
            Patterns("rank_pattern").check(key)
            _check_rank(f"rank_pattern[{shown(key)}]", rank)
        for key, alpha in self.alpha_pattern.items():
            Patterns("alpha_pattern").check(key)
            check_alpha(f"alpha_pattern[{shown(key)}]", alpha)

    @functools.cached_property
    def patterns(self) -> Patterns:
        """Compiles and matches the patterns of this configuration."""
        return Patterns("the patterns of target, excluded or ranked modules")

    def rank_of(self, path: str) -> int:
        """Gives the rank of the layer at a dotted path."""
        key = self.patterns.first_end(self.rank_pattern, path)
        return int(self.rank if key is None else self.rank_pattern[key])

    def alpha_of(self, path: str) -> float:
        """Gives the alpha of the layer at a dotted path."""
        key = self.patterns.first_end(self.alpha_pattern, path)
        if key is not None:
            return float(self.alpha_pattern[key])
        return float(self.rank_of(path) if self.alpha is None else self.alpha)


def product_scaling(rank: int, alpha: float, use_rslora: bool) -> float:
    """Gives the scaling of the product of A and B."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


_MOST_ALPHA = 3e38  # of float32


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_rank(name: str, rank: object) -> None:
    if not isinstance(rank, Integral) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"{name} is {shown(rank)}, expected an integer of at least 1")


def check_alpha(name: str, alpha: object) -> None:
    """Checks that an alpha is a finite number above 0.

    Raises:
        InputError: It is not; the message has the name.
    """
    if not _is_number(alpha) or not 0 < alpha <= _MOST_ALPHA:
        raise InputError(f"{name} is {shown(alpha)}, expected a finite number above 0")


def _check_layers(layers: Sequence[int]) -> None:
    numbers = isinstance(layers, Sequence) and all(type(number) is int for number in layers)
    if not numbers or not layers:
        raise InputError(f"layers is {shown(layers)}, expected numbers of layers")


def _check_modules(name: str, modules: str | Sequence[str]) -> None:
    if isinstance(modules, str):
        Patterns(name).check(modules)
        return
    if not isinstance(modules, Collection):  # an iterator would be used up here
        raise InputError(f"{name} is {shown(modules)}, expected a name, names or a pattern")
    for module in modules:
        if not isinstance(module, str) or not module:
            raise InputError(f"{name} holds {shown(module)}, expected names of modules")
