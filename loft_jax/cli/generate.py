"""loft-jax generate."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from loft_jax.cli.source import Source
from loft_jax.models import Quantization


@dataclass(frozen=True)
class Generate:
    """Continue prompts."""

    source: Annotated[Source, tyro.conf.arg(name="")]
    prompt: tuple[str, ...]
    """Texts to continue; `\\n` stands for a line break."""
    max_new_tokens: int = 64
    """Largest number of new tokens for each prompt."""
    temperature: float = 0.0
    """0 takes the likeliest token; higher values give more varied texts."""
    top_p: float = 1.0
    """Sample among the likeliest tokens, up to this total probability."""
    seed: int = 0
    """Seed of the sampling."""
    quantization: Quantization = "none"
    """Storage of the base model's kernels; use the same as in the training of the adapter."""

    def __call__(self) -> int:
        """Runs the command."""
        from loft_jax.generation import generate_text

        model, tokenizer = self.source.load(quantization=self.quantization)
        prompts = [prompt.replace("\\n", "\n") for prompt in self.prompt]
        texts = generate_text(
            model,
            tokenizer,
            prompts,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )
        for prompt, text in zip(prompts, texts, strict=True):
            print(prompt + text)
        return 0
