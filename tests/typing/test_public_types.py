"""Public signatures have types: `Any` stands where there is none, and nowhere else."""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from tests.pages import ROOT

# Rows, JSON and trees of parameters; and Flax's classes that are generic in their values.
WIDE = re.compile(r"\b(dict|Mapping)\[str, Any\]|\bnnx\.(State\[Any, Any\]|Variable\[Any\])")
NO_TYPE = {
    # Any pytree: of shardings, of factors.
    "loft_jax.optim.state_shardings": {"shardings", "return"},
    "loft_jax.hub.save_peft_adapter": {"model"},
    # What a Linen model takes and gives, as in Flax itself.
    "loft_jax.lora.linen.add_lora": {"args", "kwargs"},
    "loft_jax.lora.linen.LinenLoRA.apply": {"args", "kwargs", "return"},
    # Each subclass takes a class of its own, which a base class cannot name.
    "loft_jax.lora.LoRALayer.lora_axes": {"layer"},
    "loft_jax.models.family.PretrainedModel": {"config"},
    "loft_jax.models.family.PretrainedModel.parameter_table": {"config"},
    "loft_jax.tasks.Task.tokenize": {"tokenizer"},
    "loft_jax.tasks.Task.loss": {"model"},
    "loft_jax.tasks.Task.evaluation": {"tokenizer"},
    "loft_jax.tasks.Task.head_modules": {"model"},
    # Of the class that a run's configuration names, or of the user's.
    "loft_jax.Progress": {"tokenizer"},
    "loft_jax.Progress.model": {"return"},
    "loft_jax.RunResult": {"model"},
}


def resolved(path: str) -> Any:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        owner, name = path.rsplit(".", 1)
        return getattr(resolved(owner), name)


def annotations(node: ast.AST, name: str) -> Iterator[tuple[str, str, ast.expr | None]]:
    """The annotations of a function, or of the public members of a class or a module."""
    if isinstance(node, ast.FunctionDef):
        given = node.args
        for each in (*given.args, given.vararg, *given.kwonlyargs, given.kwarg):
            if each is not None:
                yield name, each.arg, each.annotation
        yield name, "return", node.returns
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        if not node.target.id.startswith("_"):
            yield name, node.target.id, node.annotation
    elif isinstance(node, ast.ClassDef | ast.Module):
        for member in node.body:
            own = getattr(member, "name", "")
            if own in ("", "__init__"):
                yield from annotations(member, name)
            elif own.startswith("__") or not own.startswith("_"):
                yield from annotations(member, f"{name}.{own}")


def test_any_is_where_no_type_exists() -> None:
    pages = "".join(page.read_text("utf-8") for page in (ROOT / "docs/api").glob("*.md"))
    paths = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    found: dict[str, set[str]] = {}
    for path in paths:
        public = resolved(path)
        if not (inspect.ismodule(public) or inspect.isclass(public) or inspect.isfunction(public)):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(public)))
        node = tree if inspect.ismodule(public) else tree.body[0]
        for name, argument, annotation in annotations(node, path):
            written = ast.unparse(annotation) if annotation is not None else ""
            if re.search(r"\bAny\b", WIDE.sub("", written)):
                found.setdefault(name, set()).add(argument)
    assert found == NO_TYPE
