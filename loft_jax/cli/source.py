"""The flags of commands that use a model: a base, with or without an adapter."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loft_jax.errors import InputError, shown
from loft_jax.models import Head, Quantization

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A base model, with or without an adapter."""

    model: str = ""
    """Folder, GGUF file or hub id; by default the one in the adapter's configuration."""
    adapter: str = ""
    """Folder of a PEFT adapter."""

    @functools.cached_property
    def base(self) -> str:
        """The base model, as it is given or as the adapter named it when first read."""
        from loft_jax.hub import load_model_config
        from loft_jax.hub.peft_base import base_model_of

        if not (self.model or self.adapter):
            raise InputError("neither model nor adapter is given; expected one at least")
        if self.model:
            return self.model
        name = base_model_of(self.adapter)
        try:
            load_model_config(name)
        except InputError as error:
            raise InputError(
                f"{self.adapter}: names the base model {shown(name)}, which cannot be read here: "
                f"{error}. If it is elsewhere, name it with --model"
            ) from error
        if (folder := Path(name)).exists():  # another one, where this is called in another folder
            _log.info("%s: its base model is %s", self.adapter, folder.resolve())
        return name

    @functools.cached_property
    def adapter_head(self) -> tuple[Head, tuple[str, ...]] | None:
        """The head that the adapter needs, and its labels; None without an adapter."""
        from loft_jax.hub import load_model_config
        from loft_jax.hub.peft_base import head_of

        return head_of(self.adapter, *load_model_config(self.base)) if self.adapter else None

    @functools.cached_property
    def processor(self) -> Any:
        """The base's tokenizer, with the chat template of the adapter's, or its image processor."""
        from loft_jax.hub import load_processor
        from loft_jax.hub.tokenizer_folder import with_template_of

        return with_template_of(load_processor(self.base), self.adapter)

    def load(
        self,
        *,
        head: Head = "causal-lm",
        labels: Sequence[str] | None = None,
        param_dtype: str = "float32",
        quantization: Quantization = "none",
    ) -> tuple[Any, Any]:
        """Loads the base model and applies the adapter.

        Args:
            head: Head of the model.
            labels: Names of the labels, for a head that has them.
            param_dtype: Dtype of the stored weights.
            quantization: Storage of the base model's kernels.

        Returns:
            The model in evaluation mode, and its tokenizer or image processor; a tokenizer has the
            chat template of the adapter's, if the adapter's folder holds one.

        Raises:
            InputError: One of them cannot be read, they do not fit, or the adapter was replaced
                meanwhile by one for another base model.
        """
        from loft_jax.hub import load_peft_adapter, load_pretrained
        from loft_jax.hub.peft_base import base_model_of

        base = self.base
        if self.adapter_head is not None and self.adapter_head[0] != head:
            raise InputError(
                f"{self.adapter}: is for {self.adapter_head[0]}, expected an adapter for {head}"
            )
        model = load_pretrained(
            base, head=head, labels=labels, param_dtype=param_dtype, quantization=quantization
        )
        if self.adapter:
            load_peft_adapter(self.adapter, model)
            if not self.model and (now := base_model_of(self.adapter)) != base:
                raise InputError(
                    f"{self.adapter}: names the base model {shown(now)}, and {shown(base)} before "
                    "that was loaded; expected an adapter that is not being replaced"
                )
        if model.drawn:
            names = ", ".join(model.table.tensors[path].name for path in model.drawn)
            raise InputError(
                f"{base}: has no {names}, and no adapter with them is given; "
                f"expected a model that was trained for {head}"
            )
        model.eval()
        return model, self.processor
