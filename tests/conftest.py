import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]

# Here, since jax, transformers and tokenizers read them when test modules import them. Most of
# what tests do is compile: it takes a third less without LLVM's optimizations, which programs this
# small do not run long enough to need, and what is kept of it makes another run faster.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# XLA's older emitters compile a training step in a third of the time. Newer versions have none of
# them, and end the process at a flag that they do not know.
if Version(version("jaxlib")) < Version("0.11"):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_configure(config):
    cache = tempfile.TemporaryDirectory(prefix="datasets_cache")
    config.add_cleanup(cache.cleanup)
    os.environ["HF_DATASETS_CACHE"] = cache.name


@pytest.fixture(autouse=True, scope="module")
def _programs_of_one_file():
    """Frees the programs of a file after it: thousands in one process reach the kernel's limits."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()


@pytest.fixture(scope="session")
def smollm2():
    """The GGUF file of SmolLM2-135M-Instruct."""
    file = ROOT / "assets" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not file.is_file():
        pytest.fail(f"{file} is missing: `make assets` fetches it")
    return file
