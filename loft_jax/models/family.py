"""The interface between the library and a family of models.

A family is one file: a configuration from and to Hugging Face's, modules in Flax NNX, one parameter
table, and a `Family` that names them. Loading, saving, PEFT's names, sharding, quantization, LoRA
targets, FLOPs and plans use only these, and do not depend on any family.
"""

import dataclasses
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from loft_jax.errors import InputError, shown
from loft_jax.models import config_checks
from loft_jax.models.attention import KVCache

if TYPE_CHECKING:
    from loft_jax.models.decoder_gguf import DecoderGGUF

Head = Literal["causal-lm", "sequence-classification", "image-classification"]
"""The head of a model: logits of the next token, or of the labels of a text or of an image."""

Remat = Literal["none", "dots", "full"]
"""What the backward pass recomputes: nothing; all of a layer but the outputs
of its linear layers; or whole layers."""


class PretrainedConfig(Protocol):
    """Sizes and constants of a model, with the names of Hugging Face's `config.json`."""

    @property
    def vocab_size(self) -> int | None:
        """The number of tokens that the model has weights for; None for a model of images."""

    @property
    def max_length(self) -> int | None:
        """The largest number of tokens of a row; None if there is no limit."""

    @property
    def eos_token_id(self) -> int | tuple[int, ...] | None:
        """The tokens that end a text; None for a model of images."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads the contents of a `config.json`.

        Raises:
            InputError: The value of a field is not supported; the message names the field.
        """

    def to_hf(self) -> dict[str, Any]:
        """Gives the contents of a `config.json` that transformers loads."""


@dataclass(frozen=True)
class Tensor:
    """The place of one of our parameters in a Hugging Face checkpoint.

    Attributes:
        name: Hugging Face's name. `{}` stands for the number of the layer; our parameter is then a
            stack of their tensors, along its first axis.
        axes: Logical axes of one layer of our parameter. A mesh maps these names to its own axes;
            None is not split.
        transposed: Whether their tensor is `(out, in, *window)` and our parameter
            `(*window, in, out)`; only a convolution has a window.
        tied: Name of their tensor that must be equal if the checkpoint has it: the head, for tied
            weights.
        optional: Whether a checkpoint may lack the tensor, such as a new head, which is then
            initialized.
    """

    name: str
    axes: tuple[str | None, ...]
    transposed: bool = False
    tied: str = ""
    optional: bool = False

    @property
    def stacked(self) -> bool:
        """Whether our parameter holds all layers."""
        return "{}" in self.name

    def stored_axes(self, count: int) -> tuple[int, ...]:
        """Gives the axes of one layer of our parameter in the order of their tensor.

        Args:
            count: Number of the axes.

        Returns:
            A permutation, for `numpy.transpose`.

        Example:
            >>> Tensor("conv.weight", (None, None, None, "embed"), transposed=True).stored_axes(4)
            (3, 2, 0, 1)
        """
        axes = range(count)
        return (*axes[:-3:-1], *axes[:-2]) if self.transposed else tuple(axes)


def linear(
    path: str,
    name: str,
    axes: tuple[str | None, str | None],
    *,
    transposed: bool = True,
    optional: bool = False,
) -> dict[str, Tensor]:
    """Makes the rows of a table for an `nnx.Linear` that is a `torch.nn.Linear` in PyTorch.

    Args:
        path: Dotted path of our module.
        name: Name of their module.
        axes: Logical axes of the kernel, (in, out).
        transposed: Whether their weight is (out, in); False for a Conv1D.
        optional: Whether a checkpoint may lack both tensors.

    Returns:
        Kernel and bias; a model without the bias has no parameter at that path.
    """
    return {
        f"{path}.kernel": Tensor(f"{name}.weight", axes, transposed=transposed, optional=optional),
        f"{path}.bias": Tensor(f"{name}.bias", axes[1:], optional=optional),
    }


def embedding(
    path: str, name: str, axes: tuple[str | None, str | None], *, tied: str = ""
) -> dict[str, Tensor]:
    """Makes the row of a table for an `nnx.Embed`; see `linear` and `Tensor`."""
    return {f"{path}.embedding": Tensor(f"{name}.weight", axes, tied=tied)}


def norm(path: str, name: str) -> dict[str, Tensor]:
    """Makes the rows of a table for a norm; see `linear`."""
    return {
        f"{path}.scale": Tensor(f"{name}.weight", ("norm",)),
        f"{path}.bias": Tensor(f"{name}.bias", ("norm",)),
    }


# For LoRA's variables beside a weight (in, out): the axis of the weight that each of their axes is.
_ADAPTER: Mapping[str, tuple[int | None, ...]] = {
    "lora_a": (0, None),
    "lora_start_a": (0, None),
    "lora_b": (None, 1),
    "lora_start_b": (None, 1),
    "lora_magnitude": (1,),
}


@dataclass(frozen=True)
class ParameterTable:
    """The table of all parameters that a model of one configuration may have.

    Attributes:
        tensors: Tensors by our dotted path; the first is one that every checkpoint has.
        units: Numbers of units of logical axes whose units are not split, such as "heads".
    """

    tensors: Mapping[str, Tensor]
    units: Mapping[str, int] = field(default_factory=dict)

    def tensor(self, path: str) -> Tensor:
        """Gives the row of a parameter.

        Args:
            path: Our dotted path.

        Returns:
            The row of the table.

        Raises:
            InputError: The table has no such parameter.
        """
        if path not in self.tensors:
            raise InputError(f"{path}: not a parameter of the model")
        return self.tensors[path]

    def logical_axes(self, path: str) -> tuple[str | None, ...]:
        """Gives the logical axes of an array, for its sharding.

        A LoRA factor has the axis that it shares with its weight; its rank is never split.

        Args:
            path: Dotted path of a parameter, or of a variable of LoRA beside it.

        Returns:
            One name for each axis of the array; None for an axis that is not split.

        Raises:
            InputError: The table has no such parameter.
        """
        module, _, name = path.rpartition(".")
        if name in _ADAPTER:
            weight = self.tensor(self.weight(module))
            axes = tuple(None if at is None else weight.axes[at] for at in _ADAPTER[name])
        else:
            weight = self.tensor(path)
            axes = weight.axes
        return ("layers", *axes) if weight.stacked else axes

    @property
    def modules(self) -> frozenset[str]:
        """Paths of the modules that have parameters."""
        return frozenset(path.rpartition(".")[0] for path in self.tensors)

    def weight(self, module: str) -> str:
        """Gives the path of a module's weight: its kernel, its embedding, or its scale.

        Raises:
            InputError: The table has no such module.
        """
        for name in ("kernel", "embedding", "scale"):
            if (path := f"{module}.{name}") in self.tensors:
                return path
        raise InputError(f"{module}: not a module of the model")

    def module_name(self, path: str, layer: int | None) -> str:
        """Hugging Face's name of a module.

        Args:
            path: Dotted path of our module.
            layer: Number of the stacked layer; None for a module outside the stack.

        Returns:
            The dotted name.

        Raises:
            InputError: There is no such module, or a layer is given for a module that is not
                stacked, or missing for one that is.
        """
        weight = self.tensor(self.weight(path))
        if weight.stacked != (layer is not None):
            raise InputError(
                f"{path}: layer is {layer}, expected a number for stacked modules only"
            )
        return weight.name.format(layer).rpartition(".")[0]

    def names(self, path: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Gives the tensors that make up one of our parameters.

        Args:
            path: Our dotted path.
            shape: Shape of our parameter.

        Returns:
            Their shapes by name, in the order of the layers.

        Raises:
            InputError: The table has no such parameter.
        """
        tensor = self.tensor(path)
        one = shape[1:] if tensor.stacked else shape
        one = tuple(one[axis] for axis in tensor.stored_axes(len(one)))
        layers = range(shape[0]) if tensor.stacked else (None,)
        return {tensor.name.format(layer): one for layer in layers}


class PretrainedModel(nnx.Module):
    """The common part of all models, beside their modules.

    Attributes:
        config: Configuration of the model.
        architecture: Name of Hugging Face's class of the same model.
        output_modules: Paths of its heads, and of other modules that were drawn because the
            checkpoint lacks them; "all-linear" excludes them, as PEFT does.
        drawn: Paths of the parameters that were drawn because the checkpoint lacks them.
        replaced: Names, as Hugging Face has them, of the tensors that an adapter held whole.
        task_type: PEFT's name of the task; None if it has none.
    """

    config: Any
    architecture: ClassVar[str]
    task_type: ClassVar[str | None] = None
    output_modules: tuple[str, ...]
    drawn: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()

    if TYPE_CHECKING:  # each model has its own, for its class of configurations

        def __init__(
            self,
            config: Any,
            *,
            dtype: DTypeLike = ...,
            param_dtype: DTypeLike = ...,
            remat: Remat = ...,
            rngs: nnx.Rngs,
        ) -> None: ...

    @staticmethod
    def parameter_table(config: Any) -> ParameterTable:
        """Makes the parameter table of a model of this configuration."""
        raise NotImplementedError

    @property
    def table(self) -> ParameterTable:
        """The parameter table of this model."""
        return self.parameter_table(self.config)

    @property
    def tied_modules(self) -> tuple[str, ...]:
        """Paths of the modules whose weight is tied to a head."""
        tensors = self.table.tensors.items()
        return tuple(path.rpartition(".")[0] for path, tensor in tensors if tensor.tied)

    def hf_name(self, path: str, layer: int | None) -> str:
        """Gives Hugging Face's name of a module; see `ParameterTable.module_name`."""
        return self.table.module_name(path, layer)


def check_positions(length: int, most: int | None) -> None:
    """Checks that rows of tokens are not longer than there are embeddings of positions.

    Raises:
        InputError: They are.
    """
    if most is not None and length > most:
        raise InputError(f"tokens has rows of {length}, and the model has {most} positions")


class LanguageModel(PretrainedModel):
    """A model that gives the logits of the token after each token.

    Attributes:
        dtype: What it computes in.
    """

    dtype: DTypeLike
    task_type = "CAUSAL_LM"
    output_modules = ("lm_head",)

    @overload
    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: None = None,
    ) -> jax.Array: ...

    @overload
    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache,
    ) -> tuple[jax.Array, KVCache]: ...

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> jax.Array | tuple[jax.Array, KVCache]:
        """Gives the logits of the token after each token.

        Args:
            tokens: `(b, t)` int32.
            positions: `(b, t)` int32; by default each token's position within its segment.
            segment_ids: `(b, t)` int32: 0 for padding, equal numbers for tokens of one text.
                Texts in one row do not see each other. By default every row is one text, unpadded.
            cache: Keys and values of earlier tokens, from `init_cache` or an earlier call.

        Returns:
            Logits `(b, t, vocab)` float32; with a cache, also the cache extended by the tokens.
        """
        hidden, cache = self.hidden_states(
            tokens, positions=positions, segment_ids=segment_ids, cache=cache
        )
        logits = self.logits(hidden)
        return logits if cache is None else (logits, cache)

    def hidden_states(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        branch_ids: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Computes the input of the head, for callers that need logits of only some tokens.

        Args:
            tokens: `(b, t)` int32, as for `__call__`, like the other arguments.
            positions: `(b, t)` int32.
            segment_ids: `(b, t)` int32.
            branch_ids: `(b, t)` int32, for several continuations of one text in one row: 0 for the
                common part, and equal numbers for the tokens of one branch. Branches do not see
                each other, and the positions of each follow the common part. Not with a cache.
            cache: Keys and values of earlier tokens.

        Returns:
            `(b, t, hidden)` in the compute dtype, and the cache extended by the tokens (None
            without one).

        Raises:
            ValueError: Branches are given with a cache.
        """
        raise NotImplementedError

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Applies the head `lm_head`, or the embedding that it is tied to.

        Args:
            hidden: `(..., hidden)`.

        Returns:
            `(..., vocab)` float32.
        """
        if hasattr(self, "lm_head"):
            return self.lm_head(hidden)
        (path,) = self.tied_modules
        embedding = operator.attrgetter(path)(self).embedding[...].astype(self.dtype)
        return jnp.einsum("...e,ve->...v", hidden, embedding, preferred_element_type=jnp.float32)

    def untie(self) -> None:
        """Gives the head a weight of its own, in place: a copy of the embedding it was tied to.

        For an adapter that changes the one and not the other.
        """
        (path,) = self.tied_modules
        embedding = operator.attrgetter(path)(self).embedding[...]
        self.lm_head = nnx.Linear(
            *embedding.shape[::-1],
            use_bias=False,
            dtype=self.dtype,
            param_dtype=embedding.dtype,
            preferred_element_type=jnp.float32,
            kernel_init=lambda *_: embedding.T,
            rngs=nnx.Rngs(0),
        )
        self.config = dataclasses.replace(self.config, tie_word_embeddings=False)

    def retie(self) -> None:
        """Undoes `untie`."""
        del self.lm_head
        self.config = dataclasses.replace(self.config, tie_word_embeddings=True)

    def init_cache(self, batch: int, length: int) -> KVCache:
        """Makes an empty cache for `batch` rows of at most `length` tokens."""
        raise NotImplementedError


class SequenceClassifier(PretrainedModel):
    """A model that gives the logits of the labels of a text, or one number."""

    task_type = "SEQ_CLS"

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        token_types: jax.Array | None = None,
    ) -> jax.Array:
        """Gives one logit for each label.

        Args:
            tokens: `(b, t)` int32, one text or one pair of texts in each row.
            segment_ids: `(b, t)` int32: 0 for padding, 1 for tokens. By default nothing is
                padding.
            token_types: `(b, t)` int32: 1 for the second text of a pair, else 0; by default 0.

        Returns:
            Logits `(b, labels)` float32.

        Raises:
            InputError: Rows without padding are longer than there are positions.
        """
        if segment_ids is None:
            check_positions(tokens.shape[1], self.config.max_length)
            segment_ids = jnp.ones_like(tokens)
        if token_types is None:
            token_types = jnp.zeros_like(tokens)
        return self.classified(tokens, segment_ids != 0, token_types).astype(jnp.float32)

    def classified(self, tokens: jax.Array, real: jax.Array, token_types: jax.Array) -> jax.Array:
        """Gives the logits `(b, labels)`; `real (b, t)` says what is not padding."""
        raise NotImplementedError


class ImageClassifier(PretrainedModel):
    """A model that gives the logits of the labels of an image."""

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """Gives one logit for each label.

        Args:
            pixel_values: `(b, height, width, 3)` float32, resized and normalized as the model
                expects it.

        Returns:
            Logits `(b, labels)` float32.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model_type: Hugging Face's name of the family.
        config: Class of its configurations.
        models: Classes of its models, by head.
        prefix: Hugging Face's prefix for the names of the model without its head, such as "model.";
            a checkpoint of only that model lacks it.
        renamed: Patterns of tensor names in older checkpoints, with their current names.
        fused: Patterns of current names of tensors that hold several of ours, with the names of
            these, which are equal parts along the first axis.
        ignored: Pattern of tensors to ignore: buffers, and heads of other tasks.
        sizes: Configurations of well-known models by name, for use without weights.
        gguf: Adapter for GGUF files; None if they are not supported.
    """

    model_type: str
    config: type[PretrainedConfig]
    models: Mapping[Head, type[PretrainedModel]]
    prefix: str
    renamed: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: str = "(?!)"
    sizes: Mapping[str, PretrainedConfig] = field(default_factory=dict)
    gguf: "DecoderGGUF | None" = None

    def model(self, head: Head) -> type[PretrainedModel]:
        """Gives the class of its models with a head.

        Args:
            head: Head of the model.

        Returns:
            A subclass of `PretrainedModel`, called as
            `(config, *, dtype, param_dtype, remat, rngs)`.

        Raises:
            InputError: The family has no such model.
        """
        if head not in self.models:
            raise InputError(
                f"model_type {self.model_type!r} has no model for {head}; it has one for "
                f"{', '.join(self.models)}"
            )
        return self.models[head]

    def current_name(self, name: str) -> str:
        """Gives Hugging Face's current name of a tensor."""
        for old, new in self.renamed.items():
            name = re.sub(old, new, name)
        return name

    def part_names(self, name: str) -> tuple[str, ...]:
        """Gives the names of the tensors that a tensor of a current name holds."""
        for whole, parts in self.fused.items():
            if match := re.fullmatch(whole, name):
                return tuple(match.expand(part) for part in parts)
        return (name,)


def flat_parameters(model: nnx.Module, *filters: Any) -> dict[str, Any]:
    """Gives the variables of a model by dotted path.

    Args:
        model: Any NNX model.
        *filters: NNX filters of variables; by default all.

    Returns:
        Variables, in the order of NNX's state.
    """
    kinds = nnx.Any(*filters) if filters else ...
    state = nnx.to_flat_state(nnx.state(model, kinds))
    return {".".join(map(str, path)): variable for path, variable in state}


def with_labels(config: Any, labels: Sequence[str]) -> Any:
    """Gives a configuration other labels; one label is for regression.

    Raises:
        InputError: They are not different texts, or the family has no head with labels.
    """
    if not hasattr(config, "labels"):
        raise InputError(f"labels is {shown(labels)}, and a {type(config).__name__} has none")
    several = isinstance(labels, (Sequence, np.ndarray)) and not isinstance(labels, str)
    names = tuple(labels) if several else ()
    if not names or not all(isinstance(x, str) for x in names) or len({*names}) < len(names):
        raise InputError(f"labels is {shown(labels)}, expected different names")
    return dataclasses.replace(config, labels=tuple(map(str, names)))


def with_end_tokens(config: Any, tokens: Any) -> Any:
    """Gives a configuration other tokens that end a text."""
    return dataclasses.replace(config, eos_token_id=config_checks.tokens(tokens))
