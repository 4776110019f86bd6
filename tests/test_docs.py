"""The pages: public names are on one of them, commands have options, most of their Python runs."""

import ast
import dataclasses
import importlib
import inspect
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from flax import nnx

import loft_jax
from loft_jax.cli.commands import _COMMANDS
from loft_jax.cli.finetune import Finetune, finetune_default
from loft_jax.cli.method_flags import METHOD_FLAGS
from loft_jax.cli.unknown_flags import parser_of, refuse_unknown
from loft_jax.data import DataConfig
from loft_jax.methods import METHODS, AdamW, Common
from loft_jax.models.llama import Llama, LlamaConfig
from loft_jax.models.registry import FAMILIES
from loft_jax.optim import moments
from loft_jax.tasks import TASKS, CausalLM, Given, find_task
from loft_jax.training.callbacks import RunResult
from loft_jax.training.config_io import config_from_dict, load_config, save_config
from tests.flat_config import flat_config
from tests.pages import ROOT
from tests.pages import blocks as blocks_of

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
PUBLIC = (
    "loft_jax",
    "loft_jax.data",
    "loft_jax.data.presets",
    "loft_jax.evaluation",
    "loft_jax.hub",
    "loft_jax.lora",
    "loft_jax.lora.linen",
    "loft_jax.models",
    "loft_jax.optim",
    "loft_jax.tasks",
)


def blocks(page, language):
    return blocks_of(DOCS / page, language)


def run(page, count=None, **names):
    """The names that the blocks of a page leave, or the first ones of them."""
    exec("\n".join(blocks(page, "python")[:count]), names)
    return names


def resolved(path):
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def test_every_public_name_is_on_one_page_of_the_api():
    text = "".join(page.read_text("utf-8") for page in (DOCS / "api").glob("*.md"))
    pages = Counter(id(resolved(path)) for path in re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    assert set(pages.values()) == {1}
    for module in map(importlib.import_module, PUBLIC):
        missing = [name for name in public(module) if id(getattr(module, name)) not in pages]
        assert not missing, module
    assert all(id(method) in pages for method in METHODS.values())


def public(module):
    own = [n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__]
    return getattr(module, "__all__", [name for name in own if not name.startswith("_")])


def test_every_command_is_on_its_page():
    page = (DOCS / "api/command-line.md").read_text("utf-8")
    assert set(re.findall(r"^## (.+)$", page, re.MULTILINE)) == set(_COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_code_of_a_page_names_what_exists(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("loft_jax"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.fixture(scope="module")
def parsers():
    made = {}

    def parser(name):
        command = Finetune if name == "sweep" else _COMMANDS[name]
        if command not in made:
            default = {"default": finetune_default([])} if command is Finetune else {}
            made[command] = parser_of(command, registry=METHOD_FLAGS, **default)
        return made[command]

    return parser


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_commands_of_a_page_have_their_options(page, parsers):
    for block in blocks(page, "console"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("$ loft-jax "):
                name, *arguments = shlex.split(line, comments=True)[2:]
                if "--help" not in arguments:
                    refuse_unknown(parsers(name), arguments)


def test_the_configuration_of_a_page_is_one():
    [block] = blocks("how-to/runs.md", "yaml")
    assert config_from_dict(yaml.safe_load(block)).method.second_moment == "factored"


@pytest.mark.parametrize("page", ["index.md", "how-to/optax.md"])
def test_a_loop_of_optax_runs(page):
    names = run(page)
    assert np.abs(names["params"]["q_proj"]["lora_b"]).max() > 0


def test_a_linen_model_is_adapted_and_merged():
    names = run("how-to/linen-model.md")
    merged = names["model"].apply({"params": names["merged"]}, names["x"])
    np.testing.assert_allclose(merged, names["logits"], rtol=1e-5)


def test_an_nnx_model_is_adapted_trained_and_merged():
    assert type(run("how-to/nnx-model.md", 1)["model"].up) is nnx.Linear


def test_factors_of_flax_are_written_and_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("how-to/other-libraries.md", 1)
    written = jax.tree.map(jnp.copy, names["state"])
    jax.tree.map(np.testing.assert_array_equal, nnx.state(names["model"], nnx.LoRAParam), written)


def test_runs_from_python_are_given_what_finetune_takes(monkeypatch):
    """Without training: that such runs train is what `tests/training/test_objects.py` is about."""
    taken, signature = [], inspect.signature(loft_jax.finetune)

    def finetune(*args, **kwargs):
        taken.append(signature.bind(*args, **kwargs).arguments)
        return RunResult(Path("runs/first"), 2, False, {}, {"loss": 1.0}, None, history=[{}])

    monkeypatch.setattr(loft_jax, "finetune", finetune)
    monkeypatch.setattr(loft_jax, "save_peft_adapter", lambda folder, model: None)
    run("how-to/python.md")
    first, second = taken
    assert first["config"].schedule.steps == 2
    assert isinstance(second["callbacks"][0], loft_jax.Callback)


def test_the_method_of_the_page_trains_and_has_its_settings_in_a_file(tmp_path, monkeypatch):
    method = run("extend/method.md")["LoRALion"]
    monkeypatch.setitem(METHODS, "lora-lion", method)
    config = flat_config(model="m", data=DataConfig("d"), output="o")
    config = dataclasses.replace(config, method=method(lion_b2=0.5))
    save_config(config, tmp_path / "config.yaml")
    assert config_from_dict(load_config(tmp_path / "config.yaml")) == config
    tx = config.method.optimizer(Common(AdamW(1e-2, 0.9, 0.99, 1e-8, 0.0), 1.0, 1.0, None, "lora"))
    assert losses(tx)[-1] < 0.5 * losses(tx)[0]


def losses(tx):
    """Of some steps towards a matrix of rank 1."""
    target = jnp.outer(jnp.linspace(-1, 1, 6), jnp.ones(5))
    params = {"lora_a": jnp.eye(6)[:, :2] + 0.1, "lora_b": jnp.zeros((2, 5))}

    def loss(params):
        return jnp.mean((params["lora_a"] @ params["lora_b"] - target) ** 2)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, (params, tx.init(params)), length=100)[1]


def test_the_second_moment_of_the_page_is_one_of_loft(monkeypatch):
    monkeypatch.setattr(moments, "SecondMoment", Literal["row", *moments._RULES])
    monkeypatch.setitem(moments._RULES, "row", run("extend/second-moment.md")["RowMoment"]())
    tx = loft_jax.loft(1e-2, second_moment="row")
    assert losses(tx)[-1] < 0.5 * losses(tx)[0]
    nu = tx.init({"lora_a": jnp.zeros((6, 2)), "lora_b": jnp.zeros((2, 5))})
    assert (6, 1) in {leaf.shape for leaf in jax.tree.leaves(nu)}


def test_the_task_of_the_page_is_found_by_its_name_and_has_a_smoothed_loss(monkeypatch):
    names = run("extend/task.md")
    task = names["SmoothedLM"]
    monkeypatch.setitem(TASKS, "smoothed-lm", task)
    given = Given(DataConfig("rows"), [{"text": "a joy"}])
    assert find_task("smoothed-lm", FAMILIES["llama"], given) is task
    assert find_task("auto", FAMILIES["llama"], given) is CausalLM
    model = tiny_llama(Llama, LlamaConfig)
    mask = np.ones((1, 6), bool)
    batch = {"tokens": np.arange(6)[None], "positions": np.arange(6)[None], "loss_mask": mask}
    inputs = task.make(given).inputs({**batch, "segment_ids": mask.astype(np.int32)})
    sharp, smoothed = CausalLM().loss(model, inputs), task().loss(model, inputs)
    scores = jax.nn.log_softmax(model(batch["tokens"])[:, :-1].astype(jnp.float32))
    spread = -jnp.sum(scores.mean(-1))
    assert smoothed[1] == sharp[1] == 5
    np.testing.assert_allclose(smoothed[0], 0.9 * sharp[0] + 0.1 * spread, rtol=1e-5)


def tiny_llama(model, config):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return model(
        config.from_hf({"model_type": config.model_type, **sizes, **heads}), rngs=nnx.Rngs(0)
    )


def test_the_family_of_the_page_is_saved_and_loaded(tmp_path, monkeypatch):
    names = run("extend/family.md", 1)
    monkeypatch.setitem(FAMILIES, "new_llama", names["FAMILY"])
    model = tiny_llama(names["NewLlama"], names["NewLlamaConfig"])
    loft_jax.save_pretrained(tmp_path, model)
    found, tokens = loft_jax.load_pretrained(tmp_path), jnp.arange(6)[None]
    assert type(found) is names["NewLlama"]
    np.testing.assert_array_equal(found(tokens), model(tokens))
