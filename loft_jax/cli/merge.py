"""loft-jax merge."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from flax import nnx

from loft_jax.cli.source import Source
from loft_jax.errors import InputError, shown
from loft_jax.models.family import flat_parameters
from loft_jax.training.config import check_output


@dataclass(frozen=True)
class Merge:
    """Write a whole model: a base with its adapter merged, or a base alone, in another format.

    The output is a Hugging Face folder or, with --gguf, a file for llama.cpp. Without an adapter, a
    GGUF file becomes a folder.
    """

    source: Annotated[Source, tyro.conf.arg(name="")]
    output: str
    """Folder to write to, which must be empty or not exist; with --gguf, a new file."""
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"
    """Dtype of the stored weights of a folder; "base" is that of the base model."""
    gguf: Literal["none", "f32", "f16", "bf16", "q8_0"] = "none"
    """Write a GGUF file with matrices of this kind; "none" writes a folder."""

    def __call__(self) -> int:
        """Runs the command."""
        check_output(self.output)
        if self.gguf != "none":
            self._write_gguf()
        elif self.output.endswith(".gguf"):
            raise InputError(
                f"{self.output} is named as a file of GGUF, but gguf is 'none', for a folder; "
                "expected --gguf q8_0, or another of its kinds"
            )
        else:
            self._write_folder()
        print(self.output)
        return 0

    def _write_folder(self) -> None:
        from loft_jax.hub import save_pretrained
        from loft_jax.hub.pretrained import stored_dtype

        base = self.source.base
        dtype = str(stored_dtype(base)) if self.dtype == "base" else self.dtype
        model, tokenizer = self._merged(dtype)
        # Modules that the adapter holds whole are in a dtype of their own.
        for parameter in flat_parameters(model, nnx.Param).values():
            parameter.set_value(parameter.get_value().astype(dtype))
        save_pretrained(self.output, model, tokenizer, base_model=base)

    def _write_gguf(self) -> None:
        from loft_jax.hub import load_model_config
        from loft_jax.hub.gguf_save import check_gguf, save_gguf

        assert self.gguf != "none"
        if self.dtype != "base":
            raise InputError(
                f"dtype is {shown(self.dtype)} beside gguf {self.gguf}; expected one of them"
            )
        if Path(self.output).exists():
            raise InputError(f"{self.output}: exists already; expected the name of a new file")
        base = self.source.base
        family, config = load_model_config(base)
        make = family.model("causal-lm")
        # Before the weights are read.
        check_gguf(nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0))), self.source.processor)
        model, tokenizer = self._merged("float32")
        save_gguf(self.output, model, tokenizer, kind=self.gguf, name=Path(base).stem)

    def _merged(self, dtype: str) -> tuple[Any, Any]:
        from loft_jax.lora import merge_lora

        if self.source.adapter_head is None:
            return self.source.load(param_dtype=dtype)
        head, labels = self.source.adapter_head
        model, processor = self.source.load(head=head, labels=labels or None, param_dtype=dtype)
        return merge_lora(model), processor
