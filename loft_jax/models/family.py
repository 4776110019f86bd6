"""What the library needs to know of a family of models, and how a family says it.

A family is one file: a configuration from and to Hugging Face's, modules in Flax NNX, one table of
parameters, and a `Family` that names them. Loading, saving, PEFT's names, sharding, quantization,
LoRA targets, FLOPs and plans read these; none of them knows a family.
"""

import dataclasses
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, Self, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loft_jax.errors import InputError
from loft_jax.models.attention import KVCache

Head = Literal["causal-lm", "sequence-classification"]
"""What a model gives: logits of the next token, or of the labels of a text."""

Remat = Literal["none", "dots", "full"]
"""What the backward pass computes again: nothing; all of a layer but the outputs of its linear
layers, which are kept; or each layer as a whole."""


class PretrainedConfig(Protocol):
    """Sizes and constants of a model, under the names of Hugging Face's `config.json`."""

    @property
    def vocab_size(self) -> int:
        """Tokens that the model has weights for."""

    @property
    def max_length(self) -> int | None:
        """Positions that the model has weights for; None where they are computed."""

    @property
    def eos_token_id(self) -> int | tuple[int, ...] | None:
        """Tokens that end a text."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads the contents of a `config.json`.

        Raises:
            InputError: A field whose value is not supported; the message names it.
        """

    def to_hf(self) -> dict[str, Any]:
        """Gives the contents of a `config.json` that transformers loads."""


@dataclass(frozen=True)
class Tensor:
    """Where one of our parameters stands in a Hugging Face checkpoint.

    Attributes:
        name: Hugging Face's name. `{}` stands for the number of the layer: ours is then a stack
            of theirs, along its first axis.
        axes: Logical axes of one of theirs as ours has it; a mesh maps these names to its own axes,
            and None stays whole.
        transposed: Whether theirs is `(out, in)` where ours is `(in, out)`.
        tied: Theirs that has to be the same where it is there too: the head, of tied weights.
        optional: Whether a checkpoint may lack it, as it lacks a new head, which is then drawn.
    """

    name: str
    axes: tuple[str | None, ...]
    transposed: bool = False
    tied: str = ""
    optional: bool = False

    @property
    def stacked(self) -> bool:
        """Whether ours holds all layers."""
        return "{}" in self.name


def linear(
    path: str, name: str, axes: tuple[str | None, str | None], **rest: Any
) -> dict[str, Tensor]:
    """The rows of a table for an `nnx.Linear` that is a `torch.nn.Linear` there.

    Args:
        path: Of our module, dotted.
        name: Of theirs.
        axes: Logical axes of the kernel, (in, out).
        **rest: Of both tensors, as for `Tensor`; `transposed=False` for a Conv1D.

    Returns:
        Kernel and bias; a model without the bias has no parameter at that path.
    """
    transposed = rest.pop("transposed", True)
    return {
        f"{path}.kernel": Tensor(f"{name}.weight", axes, transposed=transposed, **rest),
        f"{path}.bias": Tensor(f"{name}.bias", axes[1:], **rest),
    }


def embedding(
    path: str, name: str, axes: tuple[str | None, str | None], *, tied: str = ""
) -> dict[str, Tensor]:
    """The row of a table for an `nnx.Embed`; see `linear` and `Tensor`."""
    return {f"{path}.embedding": Tensor(f"{name}.weight", axes, tied=tied)}


def norm(path: str, name: str) -> dict[str, Tensor]:
    """The rows of a table for a norm; see `linear`."""
    return {
        f"{path}.scale": Tensor(f"{name}.weight", ("norm",)),
        f"{path}.bias": Tensor(f"{name}.bias", ("norm",)),
    }


# LoRA's variables beside a weight (in, out): which of its two axes they have, by place.
_ADAPTER: Mapping[str, tuple[int | None, ...]] = {
    "lora_a": (0, None),
    "lora_start_a": (0, None),
    "lora_b": (None, 1),
    "lora_start_b": (None, 1),
    "lora_magnitude": (1,),
}


@dataclass(frozen=True)
class ParameterTable:
    """All parameters that a model of one configuration may have.

    Attributes:
        tensors: By dotted path of ours; an embedding of tokens first.
        units: Sizes of logical axes that are split between so many parts only, as "heads" is.
    """

    tensors: Mapping[str, Tensor]
    units: Mapping[str, int] = field(default_factory=dict)

    def tensor(self, path: str) -> Tensor:
        """Where a parameter stands.

        Args:
            path: Of ours, dotted.

        Returns:
            The row of the table.

        Raises:
            InputError: There is none.
        """
        if path not in self.tensors:
            raise InputError(f"{path}: not a parameter of the model")
        return self.tensors[path]

    def logical_axes(self, path: str) -> tuple[str | None, ...]:
        """Names the axes of an array, for a mesh to be laid over them.

        A LoRA factor has the axis of its weight that it shares; its rank is never split.

        Args:
            path: Dotted path of a parameter, or of what LoRA put beside one.

        Returns:
            One name for each axis of the array, None for an axis that stays whole.

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

    def weight(self, module: str) -> str:
        """The path of a module's weight: its kernel, its embedding, or its scale.

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
            layer: Which of the stacked layers; None for a module outside of the stack.

        Returns:
            The dotted name.

        Raises:
            InputError: No such module, or a layer where there is none to choose.
        """
        weight = self.tensor(self.weight(path))
        if weight.stacked != (layer is not None):
            raise InputError(
                f"{path}: layer is {layer}, expected a number for stacked modules only"
            )
        return weight.name.format(layer).rpartition(".")[0]

    def names(self, path: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The tensors that make up one of our parameters.

        Args:
            path: Of ours, dotted.
            shape: Of ours.

        Returns:
            Their shapes by name, in the order of the layers.

        Raises:
            InputError: The table has no such parameter.
        """
        tensor = self.tensor(path)
        one = shape[1:] if tensor.stacked else shape
        one = one[::-1] if tensor.transposed else one
        layers = range(shape[0]) if tensor.stacked else (None,)
        return {tensor.name.format(layer): one for layer in layers}


class PretrainedModel(nnx.Module):
    """What every model of a family has beside its modules.

    Attributes:
        config: What it was made from.
        architecture: Hugging Face's class of the same model.
        output_modules: Paths of its heads, and of other modules that were drawn anew since the
            checkpoint has none; "all-linear" leaves them out, as PEFT does.
    """

    config: Any
    architecture: ClassVar[str]
    output_modules: tuple[str, ...]

    @staticmethod
    def parameter_table(config: Any) -> ParameterTable:
        """The parameters of a model of this configuration."""
        raise NotImplementedError

    @property
    def table(self) -> ParameterTable:
        """Its parameters."""
        return self.parameter_table(self.config)

    @property
    def tied_modules(self) -> tuple[str, ...]:
        """Paths of the modules whose weight is a head's too."""
        tensors = self.table.tensors.items()
        return tuple(path.rpartition(".")[0] for path, tensor in tensors if tensor.tied)

    def hf_name(self, path: str, layer: int | None) -> str:
        """Hugging Face's name of a module; as `ParameterTable.module_name`."""
        return self.table.module_name(path, layer)


class LanguageModel(PretrainedModel):
    """A model that gives the logits of the token after each token.

    Attributes:
        dtype: What it computes in.
    """

    dtype: Any
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
            positions: `(b, t)` int32; by default each token's place within its segment.
            segment_ids: `(b, t)` int32: 0 for padding, equal numbers for tokens of one text.
                Texts in one row do not see each other. By default every row is one text, unpadded.
            cache: What came before these tokens, from `init_cache` or an earlier call.

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
        """Gives what the head reads, for callers that want logits of a few tokens only.

        Args:
            tokens: As for `__call__`, and so are the others.
            positions: `(b, t)` int32.
            segment_ids: `(b, t)` int32.
            branch_ids: `(b, t)` int32: several ways to go on with one text, in one row. 0 for
                what all of them see, equal numbers for the tokens of one; branches do not see each
                other, and each is at the positions after what all see. Not with a cache.
            cache: What came before.

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

    def init_cache(self, batch: int, length: int) -> KVCache:
        """Makes an empty cache for `batch` rows of at most `length` tokens."""
        raise NotImplementedError


class SequenceClassifier(PretrainedModel):
    """A model that gives the logits of the labels of a text, or one number."""

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        token_types: jax.Array | None = None,
    ) -> jax.Array:
        """Gives one logit a label.

        Args:
            tokens: `(b, t)` int32, one text or one pair of texts in each row.
            segment_ids: `(b, t)` int32: 0 for padding, 1 for tokens. By default nothing is
                padding.
            token_types: `(b, t)` int32: 1 for the second text of a pair, else 0; by default 0.

        Returns:
            Logits `(b, labels)` float32.
        """
        raise NotImplementedError


class GGUFAdapter(Protocol):
    """How GGUF files hold models of a family."""

    architecture: str

    def name(self, name: str) -> str:
        """Hugging Face's name of a tensor; one that has none keeps its own."""

    def config(
        self, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
    ) -> PretrainedConfig:
        """The configuration, from the metadata and the shapes by Hugging Face's names.

        Raises:
            InputError: Something is missing, or not supported.
        """

    def stored_rows(self, name: str, rows: np.ndarray, config: Any) -> np.ndarray:
        """Where each of the rows of a tensor is stored."""


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model_type: Hugging Face's name of it.
        config: The class of its configurations.
        models: The class of its models, by what they give.
        prefix: What Hugging Face puts before the names of a model without its head, as "model."; a
            checkpoint of that model alone lacks it.
        renamed: Patterns of tensor names in older checkpoints, and what they are today.
        ignored: Pattern of tensors that say nothing: buffers, and heads of other tasks.
        sizes: Well-known models by name, for what needs no weights.
        gguf: How GGUF files hold it; None where they are not read.
    """

    model_type: str
    config: type[PretrainedConfig]
    models: Mapping[Head, type[PretrainedModel]]
    prefix: str
    renamed: Mapping[str, str] = field(default_factory=dict)
    ignored: str = "(?!)"
    sizes: Mapping[str, PretrainedConfig] = field(default_factory=dict)
    gguf: GGUFAdapter | None = None

    def model(self, head: Head) -> Any:
        """The class of its models that give something.

        Args:
            head: What they give.

        Returns:
            A subclass of `PretrainedModel`, called as
            `(config, *, dtype, param_dtype, remat, rngs)`.

        Raises:
            InputError: It has none.
        """
        if head not in self.models:
            raise InputError(
                f"model_type {self.model_type!r} has no model for {head}; it has one for "
                f"{', '.join(self.models)}"
            )
        return self.models[head]

    def today(self, name: str) -> str:
        """A tensor's name as Hugging Face has it today."""
        for old, new in self.renamed.items():
            name = re.sub(old, new, name)
        return name


def flat_parameters(model: nnx.Module, *filters: Any) -> dict[str, Any]:
    """The variables of a model by dotted path.

    Args:
        model: Any NNX model.
        *filters: Of NNX, for the kinds of variables; by default all.

    Returns:
        Variables, in the order of NNX's state.
    """
    kinds = nnx.Any(*filters) if filters else ...
    state = nnx.to_flat_state(nnx.state(model, kinds))
    return {".".join(map(str, path)): variable for path, variable in state}


def with_labels(config: Any, labels: Sequence[str]) -> Any:
    """A configuration with other labels; one label stands for a number."""
    return dataclasses.replace(config, labels=tuple(labels))


def with_end_tokens(config: Any, tokens: Any) -> Any:
    """A configuration with other tokens that end a text."""
    several = isinstance(tokens, (list, tuple))
    return dataclasses.replace(config, eos_token_id=tuple(tokens) if several else tokens)
