"""loft-jax merge."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from loft_jax.cli.source import Source
from loft_jax.errors import InputError
from loft_jax.training.config import check_output


@dataclass(frozen=True)
class Merge:
    """Merge an adapter into its base model and write a whole Hugging Face model."""

    source: Annotated[Source, tyro.conf.arg(name="")]
    output: str
    """Folder to write to; it must be empty or not exist."""
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"
    """Dtype of the stored weights; "base" is that of the base model."""

    def __call__(self) -> int:
        """Runs the command."""
        from loft_jax.hub import save_pretrained
        from loft_jax.hub.pretrained import stored_dtype
        from loft_jax.lora import merge_lora

        if not self.source.adapter:
            raise InputError("adapter is not given; expected the folder of a PEFT adapter to merge")
        check_output(self.output)
        base = self.source.base
        dtype = str(stored_dtype(base)) if self.dtype == "base" else self.dtype
        assert self.source.adapter_head is not None
        head, labels = self.source.adapter_head
        model, tokenizer = self.source.load(head=head, labels=labels or None, param_dtype=dtype)
        save_pretrained(self.output, merge_lora(model), tokenizer, base_model=base)
        print(self.output)
        return 0
