"""Which room of the library may know of which: imports go down, and families stay in theirs."""

import ast
import re
from pathlib import Path

import pytest

from loft_jax.models.registry import FAMILIES

PACKAGE = Path(__file__).parents[1] / "loft_jax"

# A room knows those before it, and none after it.
ROOMS = (
    ("errors", "progress", "streams"),
    ("files", "patterns", "settings"),
    ("optim",),
    ("lora",),
    ("models",),
    ("hub", "data"),
    ("tasks", "methods", "generation"),
    ("evaluation",),
    ("training",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in LEVEL
)


def room_of(module):
    return module.split(".")[1]


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """The modules of the library that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "loft_jax":
            found |= {f"loft_jax.{a.name}" for a in node.names if a.name in LEVEL}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("loft_jax."):
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                is_module = (PACKAGE.parent / Path(*module.split("."))).with_suffix(".py").exists()
                found.add(module if is_module else node.module)
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("loft_jax.")}
    return found


def test_every_room_has_its_place():
    inside = {p.stem for p in PACKAGE.iterdir() if p.is_dir() or p.suffix == ".py"}
    assert inside - {"__init__", "__pycache__", "py"} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_knows_a_room_above_its_own(path):
    own = LEVEL[room_of(module_of(path))]
    above = {module for module in imported(path) if LEVEL[room_of(module)] > own}
    assert not above


def test_no_modules_know_each_other_in_a_circle():
    graph = {module_of(path): imported(path) for path in FILES}
    done, open_ = set(), []

    def visit(module):
        if module in done or module not in graph:
            return
        assert module not in open_, " -> ".join([*open_[open_.index(module) :], module])
        open_.append(module)
        for other in sorted(graph[module]):
            visit(other)
        done.add(open_.pop())

    for module in graph:
        visit(module)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_families_are_named_in_their_room_only(path):
    """But in examples that have to have a model."""
    families = set(FAMILIES)
    if path.parent.name == "models":
        return
    if path.stem in ("gguf_tokenizer", "image_processor"):  # which name transformers' classes
        return
    code = re.sub(r"^\s*(>>>|\.\.\.) .*$", "", path.read_text(), flags=re.MULTILINE)
    code = code.replace("llama.cpp", "")  # a program, not a family
    assert not re.search("|".join(families), code, flags=re.IGNORECASE)
