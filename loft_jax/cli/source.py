"""What the commands that use a model are given: a base, with or without an adapter."""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loft_jax.errors import InputError, shown
from loft_jax.models import Quantization

if TYPE_CHECKING:
    from loft_jax.models import Llama


@dataclass(frozen=True)
class Source:
    """A base model, with or without an adapter."""

    model: str = ""
    """Folder, GGUF file or hub id; by default what the adapter's configuration names."""
    adapter: str = ""
    """Folder of a PEFT adapter."""

    @functools.cached_property
    def base(self) -> str:
        """The base model, as it is given or as the adapter named it at first."""
        from loft_jax.hub.peft_load import base_model_of

        if not (self.model or self.adapter):
            raise InputError("neither model nor adapter is given; expected one at least")
        return self.model or base_model_of(self.adapter)

    def load(
        self, *, param_dtype: str = "float32", quantization: Quantization = "none"
    ) -> tuple["Llama", Any]:
        """Loads the base model and puts the adapter on it.

        Args:
            param_dtype: What weights are stored in.
            quantization: What the kernels of the base model are stored in.

        Returns:
            The model, to evaluate, and its tokenizer.

        Raises:
            InputError: One of them cannot be read, they do not fit, or the adapter was replaced by
                one for another base model meanwhile.
        """
        from loft_jax.hub import load_peft_adapter, load_pretrained, load_tokenizer
        from loft_jax.hub.peft_load import base_model_of

        base = self.base
        model = load_pretrained(base, param_dtype=param_dtype, quantization=quantization)
        if self.adapter:
            load_peft_adapter(self.adapter, model)
            if not self.model and (now := base_model_of(self.adapter)) != base:
                raise InputError(
                    f"{self.adapter}: names the base model {shown(now)}, and {shown(base)} before "
                    "that was loaded; expected an adapter that is not being replaced"
                )
        model.eval()
        return model, load_tokenizer(base)
