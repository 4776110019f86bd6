"""A table of families and options of PEFT: in both directions, both libraries compute the same.

For every cell, PEFT makes an adapter with all that it trains random; we load it, write it again,
and PEFT loads what we wrote. Logits of all of them are those of PEFT.
"""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model

from loft_jax.hub import load_peft_adapter, load_pretrained, save_peft_adapter
from loft_jax.lora import merge_lora

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's

TOKENS = np.random.default_rng(0).integers(2, 40, (2, 7))
CONFIG = "adapter_config.json"
LAYERS = 3

_BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama": SimpleNamespace(
        make=lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=40,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=LAYERS,
                num_attention_heads=2,
                num_key_value_heads=1,
                initializer_range=0.3,
                attention_bias=True,
            )
        ),
        head="causal-lm",
        stack="model.layers",
        module="self_attn.q_proj",
        names=["q_proj", "v_proj", "down_proj"],
        embed="embed_tokens",
        norm=("input_layernorm", "layers.input_layernorm"),
        whole=("lm_head", "lm_head"),
    ),
    "gpt2": SimpleNamespace(
        make=lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=40,
                n_positions=16,
                n_embd=16,
                n_layer=LAYERS,
                n_head=2,
                initializer_range=0.3,
                tie_word_embeddings=False,
            )
        ),
        head="causal-lm",
        stack="transformer.h",
        module="attn.c_proj",
        names=["c_attn", "c_fc"],
        embed="wte",
        norm=("ln_1", "h.ln_1"),
        whole=("lm_head", "lm_head"),
    ),
    "bert": SimpleNamespace(
        make=lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**_BERT)),
        head="sequence-classification",
        stack="bert.encoder.layer",
        module="attention.self.query",
        names=["query", "value", "intermediate.dense"],
        embed="word_embeddings",
        norm=("attention.output.LayerNorm", "encoder.layer.attention.output.LayerNorm"),
        whole=("pooler", "pooler"),
    ),
    "roberta": SimpleNamespace(
        make=lambda: transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(**_BERT, pad_token_id=1)
        ),
        head="sequence-classification",
        stack="roberta.encoder.layer",
        module="attention.self.query",
        names=["query", "value", "intermediate.dense"],
        embed="position_embeddings",
        norm=("attention.output.LayerNorm", "encoder.layer.attention.output.LayerNorm"),
        whole=("embeddings.LayerNorm", "embeddings.LayerNorm"),
    ),
}
# Changes of PEFT's configuration, made of the names of a family.
OPTIONS = {
    "names": lambda f: {},
    "all linear": lambda f: {"target_modules": "all-linear"},
    "pattern": lambda f: {"target_modules": rf".*\.\d+\.{f.module}"},
    "end of two names": lambda f: {"target_modules": [f.module]},
    "excluded": lambda f: {"target_modules": "all-linear", "exclude_modules": f.names},
    "excluded by a pattern": lambda f: {"exclude_modules": rf".*\.{f.names[0]}"},
    "fan_in_fan_out": lambda f: {"fan_in_fan_out": True},
    "ranks and alphas": lambda f: {
        "rank_pattern": {f.names[0]: 2, rf"^{f.stack}\.\d+\..*{f.names[1]}": 5},
        "alpha_pattern": {rf".*\.{f.names[1]}": 2.5},
    },
    "ranks and alphas that differ by layer": lambda f: {
        "rank_pattern": {rf"^{f.stack}\.1\..*": 2, f"0.*{f.names[0]}": 5},
        "alpha_pattern": {rf"{f.stack}\.[02]\..*": 7},
        "use_rslora": True,
    },
    "dora": lambda f: {"use_dora": True},
    "dora, ranks and some layers": lambda f: {
        "use_dora": True,
        "use_rslora": True,
        "layers_to_transform": [0, 2],
        "rank_pattern": {rf"^{f.stack}\.2\..*": 2},
    },
    "layers": lambda f: {"layers_to_transform": [0, 2]},
    "one layer and its list": lambda f: {
        "layers_to_transform": 1,
        "layers_pattern": [f.stack.rpartition(".")[2]],
    },
    "modules of several layers": lambda f: {
        "target_modules": [f"{f.stack}.0.{f.module}", f"{f.stack}.2.{f.module}", *f.names[1:]]
    },
    "embedding": lambda f: {"target_modules": [f.embed, *f.names]},
    "whole modules": lambda f: {"modules_to_save": [f.norm[0], f.whole[0]]},
    "biases": lambda f: {"bias": "all"},
    "biases of some layers": lambda f: {"bias": "lora_only", "layers_to_transform": [2]},
    "gaussian": lambda f: {"init_lora_weights": "gaussian", "lora_dropout": 0.3},
    "wide": lambda f: {"r": 20},
}
# Its head has two layers, and positions begin after the padding.
OWN_TO_ROBERTA = {"embedding", "whole modules"}


@nnx.jit
def run(model):
    return model(TOKENS.astype(np.int32))


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A family, with the folder of a random model of it."""
    family = FAMILIES[request.param]
    torch.manual_seed(0)
    model = family.make()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    family.folder = tmp_path_factory.mktemp(request.param)
    family.torch = model.eval()
    family.logits = torch_logits(model)
    model.save_pretrained(family.folder)
    family.ours = load_pretrained(family.folder, head=family.head)
    family.ours.eval()
    return family


def made_by_peft(family, folder, **options):
    """Writes an adapter, all of whose trained parameters are random, and gives PEFT's logits."""
    classifies = family.head == "sequence-classification"
    config = LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 6,
            "target_modules": family.names,
            "task_type": "SEQ_CLS" if classifies else "CAUSAL_LM",
            **options,
        }
    )
    model = get_peft_model(copy.deepcopy(family.torch), config).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return torch_logits(model)


def loaded(family, folder):
    return load_peft_adapter(folder, nnx.clone(family.ours))


def cells():
    """All families with all options; daily, each with Llama, GPT-2 or BERT by turns.

    RoBERTa's layers are BERT's: daily, what names other parts.
    """
    for family in FAMILIES:
        for place, option in enumerate(OPTIONS):
            daily = {
                "llama": place % 2 == 0,
                "gpt2": place % 4 == 1,
                "bert": place % 4 == 3,
                "roberta": option in OWN_TO_ROBERTA,
            }
            yield pytest.param(family, option, marks=[] if daily[family] else [pytest.mark.slow])


@pytest.mark.parametrize(("family", "option"), cells(), indirect=["family"])
def test_both_libraries_compute_the_same(family, option, tmp_path):
    options = OPTIONS[option](family)
    expected = made_by_peft(family, tmp_path / "theirs", **options)
    assert np.abs(expected - family.logits).max() > 0.1
    model = loaded(family, tmp_path / "theirs")
    saved = [ours for ours in (family.norm, family.whole) if "modules_to_save" in options]
    heads = model.output_modules if family.head == "sequence-classification" else ()
    save_peft_adapter(
        tmp_path / "ours",
        model,
        task_type="SEQ_CLS" if heads else "CAUSAL_LM",
        modules_to_save=[*(ours for _, ours in saved), *heads],
        bias=options.get("bias", "none"),
    )
    base = copy.deepcopy(family.torch)
    theirs = PeftModel.from_pretrained(base, tmp_path / "ours", torch_device="cpu").eval()
    np.testing.assert_allclose(torch_logits(theirs), expected, atol=2e-5)
    np.testing.assert_allclose(run(merge_lora(model)), expected, atol=1e-4)
    if "layers_to_transform" in options:
        given, written = (
            json.loads((tmp_path / name / CONFIG).read_text()) for name in ("theirs", "ours")
        )
        only = given["layers_to_transform"]
        assert written["layers_to_transform"] == (only if isinstance(only, list) else [only])
        assert len(written["target_modules"]) == len(given["target_modules"])


@pytest.mark.parametrize(
    "family",
    ["llama", "bert", *(pytest.param(x, marks=pytest.mark.slow) for x in ("gpt2", "roberta"))],
    indirect=True,
)
def test_some_layers_compute_the_same_before_they_are_merged(family, tmp_path):
    options = OPTIONS["dora, ranks and some layers"](family)
    expected = made_by_peft(family, tmp_path, **options)
    np.testing.assert_allclose(run(loaded(family, tmp_path)), expected, atol=1e-4)
