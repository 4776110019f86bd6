"""What is published: a source archive that builds, and a wheel of the package and nothing else."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from readme_renderer import markdown

import loft_jax
from scripts.test_versions import PYTHONS, interpreter

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "loft_jax", "tests")

# Trains on rows of its own, with the files and the command that the wheel installs.
MAKE_MODEL = """
import json, runpy, sys
from flax import nnx
import loft_jax
from loft_jax.models.llama import Llama, LlamaConfig

sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
model = Llama(LlamaConfig.from_hf({"model_type": "llama", **sizes, **heads}), rngs=nnx.Rngs(0))
tiny = runpy.run_path(sys.argv[1])
loft_jax.save_pretrained("model", model, tiny["tiny_tokenizer"]())
with open("rows.jsonl", "w") as rows:
    rows.writelines(json.dumps({"text": text}) + "\\n" for text in tiny["SENTENCES"])
print(loft_jax.__version__, loft_jax.__file__)
"""
FINETUNE = (
    *("finetune", "--model", "model", "--data.path", "rows.jsonl", "--output", "run"),
    *("--steps", "3", "--batch-size", "2", "--rank", "2"),
)


class Built(NamedTuple):
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source archive of the tree, and the wheel that is built from that archive alone."""
    tree, unpacked, out = (tmp_path_factory.mktemp(name) for name in ("tree", "unpacked", "out"))
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
            )
        else:
            shutil.copy(ROOT / name, tree)
    build("sdist", tree, out)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (inside,) = unpacked.iterdir()
    build("wheel", inside, out)
    (wheel,) = out.glob("*.whl")
    return Built(sdist, wheel)


def build(kind, tree, out):
    program = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    run([sys.executable, "-c", program], tree)


def run(command, folder):
    ours = ("PYTHONPATH", "XLA_FLAGS")  # flags are those that our jaxlib knows
    elsewhere = {name: value for name, value in os.environ.items() if name not in ours}
    found = subprocess.run(
        command, cwd=folder, env=elsewhere, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def package_files():
    """The package as it stands here."""
    files = (path for path in (ROOT / "loft_jax").rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_whole_package_and_nothing_else(built):
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - metadata == package_files()
    assert "loft_jax/py.typed" in names


def test_the_source_archive_holds_what_is_built_from_and_no_tests(built):
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if name.count("/")}
    made = {"PKG-INFO", "setup.cfg"}
    files = {name for name in names if not name.startswith(("loft_jax/", "loft_jax.egg-info"))}
    assert files - {"loft_jax"} == made | set(BUILT_FROM) - {"loft_jax", "tests"}
    assert package_files() <= names


def test_the_metadata_agree_with_the_package(built):
    with zipfile.ZipFile(built.wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_string(archive.read(name).decode())
    assert metadata["Name"] == "loft-jax"
    assert metadata["Version"] == loft_jax.__version__
    assert metadata["Requires-Python"] == f">={PYTHONS[0]}"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert markdown.render(metadata.get_payload()) is not None


@pytest.mark.slow
@pytest.mark.parametrize("python", [PYTHONS[0], PYTHONS[-1]])
def test_the_wheel_trains_in_an_empty_environment(built, tmp_path, python):
    """With what pip finds for it: this needs a package index."""
    if (found := interpreter(python)) is None:
        pytest.skip(f"Python {python} is not installed")
    run([found, "-m", "venv", "environment"], tmp_path)
    binaries = tmp_path / "environment" / "bin"
    run([binaries / "python", "-m", "pip", "install", "-q", "--no-compile", built.wheel], tmp_path)

    tiny = ROOT / "tests" / "tiny.py"
    version, file = run([binaries / "python", "-I", "-c", MAKE_MODEL, tiny], tmp_path).split()
    assert version == loft_jax.__version__
    assert Path(file).is_relative_to(tmp_path / "environment")
    assert "finetune" in run([binaries / "loft-jax", "--help"], tmp_path)
    run([binaries / "loft-jax", *FINETUNE], tmp_path)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
