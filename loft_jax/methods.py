"""The methods of fine-tuning, one class each: trained variables, adapters, optimizer.

The fields of a class are the settings of its method, in addition to those of all methods. The
optimizers (`loft_jax.optim`) and `loft_jax.LoRAConfig` cite the papers. To add a method, write its
class and list it in `METHODS`. Settings with the same name in several methods are one flag.
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
from loft_jax.optim.links import Move
from loft_jax.optim.moments import SecondMoment
from loft_jax.optim.pairs import Scaling, StackAxis
from loft_jax.settings import check_settings

# Gives Muon's updates the size of AdamW's (Liu et al., arXiv 2502.16982): the same learning rate
# suits both.
_RMS_OF_ADAMW = 0.2


class AdamW(NamedTuple):
    """AdamW's settings, which all methods share.

    Attributes:
        learning_rate: Schedule of the learning rate.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay; it is multiplied by the learning rate.
    """

    learning_rate: optax.Schedule
    b1: float
    b2: float
    eps: float
    weight_decay: float


class Common(NamedTuple):
    """The settings that a run gives to the optimizer of any method.

    Attributes:
        adam: Learning rate and AdamW's settings.
        max_grad_norm: Norm that gradients are clipped to; None does not clip.
        scaling: The s of `W = s A B` by the path of a pair.
        stack_axis: The stacked axes by the path of a pair.
        init: How the factors start.
    """

    adam: AdamW
    max_grad_norm: float | None
    scaling: Scaling
    stack_axis: StackAxis
    init: str

    def clipped(self, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        """Puts clipping of gradients before an optimizer."""
        if self.max_grad_norm is None:
            return tx
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), tx)


@dataclass(frozen=True)
class Method:
    """A method of fine-tuning, with its settings; by default AdamW on the trained variables.

    Attributes:
        name: Name of the method in configurations.
        adapts: Whether adapters are trained on frozen weights; else all weights are trained.
        lora: Options of `loft_jax.LoRAConfig` that the method sets.
    """

    name: str = field(init=False)
    adapts: ClassVar[bool] = True
    lora: ClassVar[Mapping[str, bool | str]] = {}

    def __post_init__(self) -> None:
        check_settings(self, "method")

    @property
    def trained(self) -> type[nnx.Variable[Any]]:
        """The type of the trained variables."""
        return nnx.LoRAParam if self.adapts else nnx.Param

    def optimizer(self, common: Common) -> optax.GradientTransformation:
        """Makes the optimizer of the method.

        Args:
            common: The settings of the run for any method.

        Returns:
            A gradient transformation over the trained parameters, with clipping.
        """
        learning_rate, b1, b2, eps, decay = common.adam
        return common.clipped(optax.adamw(learning_rate, b1, b2, eps, weight_decay=decay))

    def check_layers(self, layers: Mapping[str, nnx.Module]) -> None:
        """Refuses adapters that the method cannot train.

        Args:
            layers: The layers with adapters, by dotted path.

        Raises:
            InputError: A layer cannot be trained; the message names it.
        """

    def check_steps(self, steps: int, init: str) -> None:
        """Refuses a run that would amount to another method.

        Args:
            steps: Number of steps of the run.
            init: How the factors start.

        Raises:
            InputError: A setting does not fit the run; the message names it.
        """


@dataclass(frozen=True)
class LoFT(Method):
    """AdamW on the full weight, projected on updates of rank r.

    Args:
        second_moment: LoFT's second moment: "full" is exactly Adam's of the full weight; "factored"
            approximates it at almost no cost in memory and time; "diagonal" is Adam's of the
            factors.
        move: How LoFT's factors are updated: "tangent" updates both in every step, without counting
            their overlap twice; "alternate" updates one in each step.
        state_dtype: Dtype of LoFT's stored second moment.
        balance: Whether LoFT keeps the factors balanced, `AᵀA = B Bᵀ`; their product is not
            affected.
    """

    name: str = field(default="loft", init=False)
    second_moment: SecondMoment = "factored"
    move: Move = "tangent"
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    balance: bool = False

    def optimizer(self, common: Common) -> optax.GradientTransformation:
        """Makes `loft`, which clips by the norm of the projected gradients of the full weights."""
        return loft(
            *common.adam,
            max_grad_norm=common.max_grad_norm,
            second_moment=self.second_moment,
            move=self.move,
            state_dtype=self.state_dtype,
            balance=self.balance,
            scaling=common.scaling,
            stack_axis=common.stack_axis,
        )


@dataclass(frozen=True)
class LoFTMuon(Method):
    """LoFT with Muon's direction in place of Adam's, at the size of AdamW's updates.

    Args:
        move: How LoFT's factors are updated: "tangent" updates both in every step, without counting
            their overlap twice; "alternate" updates one in each step.
    """

    name: str = field(default="loft-muon", init=False)
    move: Move = "tangent"

    def optimizer(self, common: Common) -> optax.GradientTransformation:
        """Makes `loft_muon`, which clips by the norm of the projected gradients."""
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
            stack_axis=common.stack_axis,
        )


@dataclass(frozen=True)
class LoRA(Method):
    """AdamW on the factors."""

    name: str = field(default="lora", init=False)


@dataclass(frozen=True)
class LoRAPlus(Method):
    """AdamW on the factors, with a separate learning rate for B.

    Args:
        ratio: Ratio of B's learning rate to A's, for method "lora-plus".
    """

    name: str = field(default="lora-plus", init=False)
    ratio: Annotated[float, arg(name="lora-plus-ratio")] = 16.0

    def __post_init__(self) -> None:
        check_settings(self, "method", positive=["ratio"])

    def optimizer(self, common: Common) -> optax.GradientTransformation:
        """Makes `lora_plus`."""
        return common.clipped(
            lora_plus(*common.adam, ratio=self.ratio, stack_axis=common.stack_axis)
        )


@dataclass(frozen=True)
class RSLoRA(Method):
    """AdamW on the factors, whose product is scaled by `alpha / sqrt(rank)`."""

    name: str = field(default="rslora", init=False)
    lora: ClassVar[Mapping[str, bool | str]] = {"use_rslora": True}


@dataclass(frozen=True)
class DoRA(Method):
    """AdamW on the factors and on the norms of the weight's columns."""

    name: str = field(default="dora", init=False)
    lora: ClassVar[Mapping[str, bool | str]] = {"use_dora": True}


@dataclass(frozen=True)
class LoRAFA(Method):
    """Trains only B, with projected gradients."""

    name: str = field(default="lora-fa", init=False)

    def optimizer(self, common: Common) -> optax.GradientTransformation:
        """Makes `lora_fa`, which clips by itself."""
        return lora_fa(
            *common.adam,
            max_grad_norm=common.max_grad_norm,
            scaling=common.scaling,
            stack_axis=common.stack_axis,
        )

    def check_layers(self, layers: Mapping[str, nnx.Module]) -> None:
        """Refuses embeddings: their A starts at zero, so that training only B has no effect."""
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
    lora: ClassVar[Mapping[str, bool | str]] = {"init": "pissa"}


@dataclass(frozen=True)
class Riemannian(Method):
    """Gradients of the factors divided by damped Gram matrices, then AdamW.

    Args:
        damping: Number added to the diagonal of the Gram matrices of method "riemannian".
    """

    name: str = field(default="riemannian", init=False)
    damping: float = 1e-6

    def __post_init__(self) -> None:
        check_settings(self, "method", positive=["damping"])

    def optimizer(self, common: Common) -> optax.GradientTransformation:
        """Makes `riemannian_lora`."""
        return common.clipped(
            riemannian_lora(*common.adam, damping=self.damping, stack_axis=common.stack_axis)
        )


@dataclass(frozen=True)
class AltLoRAPlus(Method):
    """One factor in each step, with aligned momentum and Adam's second moment of the factor."""

    name: str = field(default="altlora-plus", init=False)

    def optimizer(self, common: Common) -> optax.GradientTransformation:
        """Makes `alt_lora_plus`."""
        return common.clipped(
            alt_lora_plus(*common.adam, scaling=common.scaling, stack_axis=common.stack_axis)
        )


@dataclass(frozen=True)
class RefLoRA(Method):
    """Gradients of the best-balanced factorization, then AdamW.

    Args:
        warmup_steps: Number of steps of plain LoRA before methods "reflora" and "reflora-s" start
            to balance, in which B reaches its full rank. By default 100, or 0 with init "balanced".
    """

    name: str = field(default="reflora", init=False)
    warmup_steps: Annotated[int | None, arg(name="reflora-warmup-steps")] = None

    def __post_init__(self) -> None:
        check_settings(self, "method", at_least={"warmup_steps": 0})

    def optimizer(self, common: Common) -> optax.GradientTransformation:
        """Makes `reflora`."""
        return common.clipped(
            reflora(
                *common.adam, warmup_steps=self.warmup(common.init), stack_axis=common.stack_axis
            )
        )

    def check_steps(self, steps: int, init: str) -> None:
        """Refuses a run that ends before the factors are balanced."""
        if (warmup := self.warmup(init)) >= steps:
            raise InputError(
                f"method.warmup_steps is {warmup}, and the run has {steps} steps: it would be "
                "plain LoRA; expected fewer"
            )

    def warmup(self, init: str) -> int:
        """Gives the number of steps before the factors are balanced.

        Args:
            init: How the factors start.
        """
        if self.warmup_steps is not None:
            return self.warmup_steps
        return 0 if init == "balanced" else 100


@dataclass(frozen=True)
class RefLoRAS(RefLoRA):
    """RefLoRA's scalar form: factors are rescaled to equal norms, and their moments with them."""

    name: str = field(default="reflora-s", init=False)

    def optimizer(self, common: Common) -> optax.GradientTransformation:
        """Makes `reflora_s`."""
        return common.clipped(
            reflora_s(
                *common.adam, warmup_steps=self.warmup(common.init), stack_axis=common.stack_axis
            )
        )


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
    """Gives the settings of a method, in addition to those of all methods.

    Args:
        method: Class of the method.

    Returns:
        Their defaults by name.

    Example:
        >>> settings_of(LoRAPlus)
        {'ratio': 16.0}
    """
    return {known.name: known.default for known in dataclasses.fields(method) if known.init}


def methods_with(setting: str) -> list[str]:
    """Lists the methods that have a setting.

    Args:
        setting: Name of the setting.

    Returns:
        Names of methods; none if no method has it.

    Example:
        >>> methods_with("move")
        ['loft', 'loft-muon']
    """
    return [name for name, method in METHODS.items() if setting in settings_of(method)]
