import os
import tempfile
from pathlib import Path

import pytest

# Here, since jax, transformers and tokenizers read them when test modules import them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

SMOLLM2 = Path(__file__).parents[1] / "assets" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_configure(config):
    cache = tempfile.TemporaryDirectory(prefix="datasets_cache")
    config.add_cleanup(cache.cleanup)
    os.environ["HF_DATASETS_CACHE"] = cache.name


@pytest.fixture(scope="session")
def smollm2():
    """The GGUF file of SmolLM2-135M-Instruct."""
    if not SMOLLM2.is_file():
        pytest.fail(f"{SMOLLM2} is missing: `make assets` fetches it")
    return SMOLLM2
