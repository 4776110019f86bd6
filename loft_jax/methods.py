"""The methods of fine-tuning, one class each: what trains, which adapters, which optimizer.

The fields of a class are the settings that its method has beside those of all methods. Papers are
named by the optimizers (`loft_jax.optim`) and by `loft_jax.LoRAConfig`. To add a method, write its
class and list it in `METHODS`. Settings of one name in several methods are one flag.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import optax
from flax import nnx
from tyro.conf import arg

from loft_jax.errors import InputError
from loft_jax.optim import (
    alt_lora_plus,
    loft,
    loft_muon,
    lora_fa,
    lora_plus,
    reflora,
    reflora_s,
    riemannian_lora,
)
from loft_jax.optim.pairs import Scaling
from loft_jax.settings import check_settings

# Muon's updates as large as AdamW's (Liu et al., arXiv 2502.16982): one learning rate for both.
_RMS_OF_ADAMW = 0.2


class AdamW(NamedTuple):
    """The numbers of AdamW, which all methods share.

    Attributes:
        learning_rate: By step.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, times the learning rate.
    """

    learning_rate: optax.Schedule
    b1: float
    b2: float
    eps: float
    weight_decay: float


class Common(NamedTuple):
    """What a run gives to the optimizer of any method.

    Attributes:
        adam: Learning rate and AdamW's numbers.
        max_grad_norm: What gradients are clipped to; None does not clip.
        scaling: The s of `W = s A B` by path of a pair.
        init: How the factors start.
    """

    adam: AdamW
    max_grad_norm: float | None
    scaling: Scaling
    init: str

    def clipped(self, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        """An optimizer of clipped gradients."""
        if self.max_grad_norm is None:
            return tx
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), tx)


@dataclass(frozen=True)
class Method:
    """A method of fine-tuning, with its settings; as it stands here, AdamW on what is trained.

    Attributes:
        name: As users write it.
        adapts: Whether adapters train on frozen weights; else all weights train, without adapters.
        lora: Options of `loft_jax.LoRAConfig` that the method sets.
    """

    name: str = field(init=False)
    adapts: ClassVar[bool] = True
    lora: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        check_settings(self, "method")

    @property
    def trained(self) -> type[nnx.Variable[Any]]:
        """The kind of the variables that are trained."""
        return nnx.LoRAParam if self.adapts else nnx.Param

    def optimizer(self, common: Common) -> optax.GradientTransformation:
        """Makes the optimizer of the method.

        Args:
            common: What the run has for any method.

        Returns:
            A gradient transformation over the trained parameters, which clips.
        """
        *numbers, decay = common.adam
        return common.clipped(optax.adamw(*numbers, weight_decay=decay))

    def check_layers(self, layers: Mapping[str, nnx.Module]) -> None:
        """Refuses adapters that the method could not train.

        Args:
            layers: The layers that have adapters, by dotted path.

        Raises:
            InputError: Names the layer.
        """

    def check_steps(self, steps: int, init: str) -> None:
        """Refuses a run that would be one of another method.

        Args:
            steps: Of the run.
            init: How the factors start.

        Raises:
            InputError: Names the setting.
        """


@dataclass(frozen=True)
class LoFT(Method):
    """AdamW on the full weight, projected on what rank r can hold.

    Args:
        second_moment: LoFT's second moment: "factored" costs next to nothing, in memory and in
            time; "full" is Adam's own, exactly; "diagonal" is Adam's of the factors.
        move: How LoFT's factors move: "tangent" moves both at every step, counting what both can do
            once; "alternate" moves one a step.
        state_dtype: What LoFT's second moment is stored in.
        balance: Whether LoFT keeps the factors balanced, `AᵀA = B Bᵀ`; their product moves as
            without.
    """

    name: str = field(default="loft", init=False)
    second_moment: Literal["full", "factored", "diagonal"] = "factored"
    move: Literal["tangent", "alternate"] = "tangent"
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    balance: bool = False

    def optimizer(self, common: Common) -> optax.GradientTransformation:
        """`loft`, which clips by the norm of the projected gradients of the full weights."""
        return loft(
            *common.adam,
            max_grad_norm=common.max_grad_norm,
            second_moment=self.second_moment,
            move=self.move,
            state_dtype=self.state_dtype,
            balance=self.balance,
            scaling=common.scaling,
        )


@dataclass(frozen=True)
class LoFTMuon(Method):
    """LoFT with Muon's direction in the place of Adam's, at the size of AdamW's updates.

    Args:
        move: How LoFT's factors move: "tangent" moves both at every step, counting what both can do
            once; "alternate" moves one a step.
    """

    name: str = field(default="loft-muon", init=False)
    move: Literal["tangent", "alternate"] = "tangent"

    def optimizer(self, common: Common) -> optax.GradientTransformation:
        """`loft_muon`, which clips by the norm of the projected gradients of the full weights."""
        return loft_muon(
            common.adam.learning_rate,
            weight_decay=common.adam.weight_decay,
            consistent_rms=_RMS_OF_ADAMW,
            adam_b1=common.adam.b1,
            adam_b2=common.adam.b2,
            eps=common.adam.eps,
            max_grad_norm=common.max_grad_norm,
            move=self.move,
            scaling=common.scaling,
        )


@dataclass(frozen=True)
class LoRA(Method):
    """AdamW on the factors."""

    name: str = field(default="lora", init=False)


@dataclass(frozen=True)
class LoRAPlus(Method):
    """AdamW on the factors, with a learning rate of its own for B.

    Args:
        ratio: B's learning rate over A's, for method "lora-plus".
    """

    name: str = field(default="lora-plus", init=False)
    ratio: Annotated[float, arg(name="lora-plus-ratio")] = 16.0

    def __post_init__(self) -> None:
        check_settings(self, "method", positive=["ratio"])

    def optimizer(self, common: Common) -> optax.GradientTransformation:
        """`lora_plus`."""
        return common.clipped(lora_plus(*common.adam, ratio=self.ratio))


@dataclass(frozen=True)
class RSLoRA(Method):
    """AdamW on the factors, whose product is scaled by `alpha / sqrt(rank)`."""

    name: str = field(default="rslora", init=False)
    lora: ClassVar[Mapping[str, Any]] = {"use_rslora": True}


@dataclass(frozen=True)
class DoRA(Method):
    """AdamW on the factors and on the norms of the weight's columns."""

    name: str = field(default="dora", init=False)
    lora: ClassVar[Mapping[str, Any]] = {"use_dora": True}


@dataclass(frozen=True)
class LoRAFA(Method):
    """B alone trains, with projected gradients."""

    name: str = field(default="lora-fa", init=False)

    def optimizer(self, common: Common) -> optax.GradientTransformation:
        """`lora_fa`, which clips by itself."""
        return lora_fa(*common.adam, max_grad_norm=common.max_grad_norm, scaling=common.scaling)

    def check_layers(self, layers: Mapping[str, nnx.Module]) -> None:
        """Refuses embeddings: what starts with an A of zero learns nothing from B alone."""
        for path, layer in layers.items():
            if isinstance(layer, nnx.Embed):
                raise InputError(
                    f"{path} is an embedding, whose A starts at zero, and method lora-fa trains B "
                    "alone; exclude it"
                )


@dataclass(frozen=True)
class PiSSA(Method):
    """AdamW on factors that start as the largest singular values of the weight."""

    name: str = field(default="pissa", init=False)
    lora: ClassVar[Mapping[str, Any]] = {"init": "pissa"}


@dataclass(frozen=True)
class Riemannian(Method):
    """Gradients of the factors divided by damped Gram matrices, then AdamW.

    Args:
        damping: Added to the Gram matrices that method "riemannian" divides by.
    """

    name: str = field(default="riemannian", init=False)
    damping: float = 1e-6

    def __post_init__(self) -> None:
        check_settings(self, "method", positive=["damping"])

    def optimizer(self, common: Common) -> optax.GradientTransformation:
        """`riemannian_lora`."""
        return common.clipped(riemannian_lora(*common.adam, damping=self.damping))


@dataclass(frozen=True)
class AltLoRAPlus(Method):
    """One factor a step, with aligned momentum and Adam's second moment of the factor."""

    name: str = field(default="altlora-plus", init=False)

    def optimizer(self, common: Common) -> optax.GradientTransformation:
        """`alt_lora_plus`."""
        return common.clipped(alt_lora_plus(*common.adam, scaling=common.scaling))


@dataclass(frozen=True)
class RefLoRA(Method):
    """Gradients of the best-balanced factorization, then AdamW.

    Args:
        warmup_steps: Steps of plain LoRA before methods "reflora" and "reflora-s" balance: until
            then B gets its rank. By default 100, and none with init "balanced".
    """

    name: str = field(default="reflora", init=False)
    warmup_steps: Annotated[int | None, arg(name="reflora-warmup-steps")] = None

    def __post_init__(self) -> None:
        check_settings(self, "method", at_least={"warmup_steps": 0})

    def optimizer(self, common: Common) -> optax.GradientTransformation:
        """`reflora`."""
        return common.clipped(reflora(*common.adam, warmup_steps=self.warmup(common.init)))

    def check_steps(self, steps: int, init: str) -> None:
        """Refuses a run that ends before the factors are balanced."""
        if (warmup := self.warmup(init)) >= steps:
            raise InputError(
                f"method.warmup_steps is {warmup}, and the run has {steps} steps: it would be "
                "plain LoRA; expected fewer"
            )

    def warmup(self, init: str) -> int:
        """Steps before the factors are balanced, as they are set or by default.

        Args:
            init: How the factors start.
        """
        if self.warmup_steps is not None:
            return self.warmup_steps
        return 0 if init == "balanced" else 100


@dataclass(frozen=True)
class RefLoRAS(RefLoRA):
    """RefLoRA's scalar form: factors of equal norms, moments along."""

    name: str = field(default="reflora-s", init=False)

    def optimizer(self, common: Common) -> optax.GradientTransformation:
        """`reflora_s`."""
        return common.clipped(reflora_s(*common.adam, warmup_steps=self.warmup(common.init)))


@dataclass(frozen=True)
class Full(Method):
    """AdamW on all weights."""

    name: str = field(default="full", init=False)
    adapts: ClassVar[bool] = False


METHODS: Mapping[str, type[Method]] = {
    method.name: method
    for method in (
        LoFT,
        LoFTMuon,
        LoRA,
        LoRAPlus,
        RSLoRA,
        DoRA,
        LoRAFA,
        PiSSA,
        Riemannian,
        AltLoRAPlus,
        RefLoRA,
        RefLoRAS,
        Full,
    )
}
"""All methods by name."""


def settings_of(method: type[Method]) -> dict[str, Any]:
    """The settings that a method has, and no other has to have.

    Args:
        method: Its class.

    Returns:
        Their defaults by name.

    Example:
        >>> settings_of(LoRAPlus)
        {'ratio': 16.0}
    """
    return {known.name: known.default for known in dataclasses.fields(method) if known.init}


def methods_with(setting: str) -> list[str]:
    """The methods that have a setting.

    Args:
        setting: Its name.

    Returns:
        Names of methods; none if no method has it.

    Example:
        >>> methods_with("move")
        ['loft', 'loft-muon']
    """
    return [name for name, method in METHODS.items() if setting in settings_of(method)]
