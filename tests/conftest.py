import functools
import gc
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
FLAGS += " --xla_cpu_parallel_codegen_split_count=1"  # parts cost more than they save
# XLA's older emitters compile a training step in a third of the time. Newer versions have none of
# them, and end the process at a flag that they do not know.
if Version(version("jaxlib")) < Version("0.11"):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads wait for each other's cores
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_configure(config):
    cache = tempfile.TemporaryDirectory(prefix="datasets_cache")
    config.add_cleanup(cache.cleanup)
    os.environ["HF_DATASETS_CACHE"] = cache.name
    gc.disable()


def pytest_collection_finish():
    """Spares the tests what takes a third of their time and is no part of what they check."""
    # Objects of imported libraries, a million, stay: no garbage collection need visit them.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()
    # JAX fills a new MLIR context for each program that it lowers, which takes as long as the rest
    # of lowering a small one, and holds 1.5 MB as long as the program is cached.
    if (mlir := sys.modules.get("jax._src.interpreters.mlir")) and hasattr(mlir, "make_ir_context"):
        mlir.make_ir_context = functools.cache(mlir.make_ir_context)


@pytest.fixture(autouse=True, scope="module")
def _programs():
    """Frees compiled programs before they reach the kernel's limit, of 65530 mappings a process."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="session")
def smollm2():
    """The GGUF file of SmolLM2-135M-Instruct."""
    file = ROOT / "assets" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not file.is_file():
        pytest.fail(f"{file} is missing: `make assets` fetches it")
    return file
