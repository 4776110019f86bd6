"""Adapters exchanged with torch + PEFT, and files that are no adapter for the model."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from loft_jax.errors import InputError
from loft_jax.hub import load_peft_adapter, save_peft_adapter
from loft_jax.hub.peft_load import head_of
from loft_jax.hub.pretrained import load_pretrained
from loft_jax.lora import LoRAConfig, add_lora, lora_layers, merge_lora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 9))
CPU = {"torch_device": "cpu"}


# --- A Llama, by transformers and by us, from the same files


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    return folder


def torch_llama(folder):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@nnx.jit
def run(model, tokens):
    return model(tokens)


def our_logits(model):
    return np.asarray(run(model, jnp.asarray(TOKENS, jnp.int32)))


def torch_logits(model):
    with torch.no_grad():
        output = model(torch.tensor(TOKENS))
    return np.asarray(getattr(output, "logits", output))


def randomize(model, seed=3):
    rng = np.random.default_rng(seed)
    for layer in lora_layers(model).values():
        for factor in (layer.lora_a, layer.lora_b):
            factor[...] = jnp.asarray(rng.normal(size=factor.shape) * 0.2, factor.dtype)
        if (magnitude := layer.lora_magnitude) is not None:
            magnitude[...] *= jnp.asarray(rng.uniform(0.5, 1.5, magnitude.shape), magnitude.dtype)
    return model


def randomized_peft(model, config, seed=5):
    torch.manual_seed(seed)
    model = get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def adapted_llama(folder, **fields):
    model = load_pretrained(folder)
    return randomize(add_lora(model, LoRAConfig(**{"rank": 4, **fields}), rngs=nnx.Rngs(0)))


def assert_same_files(left: Path, right: Path):
    ours, theirs = load_file(left / WEIGHTS), load_file(right / WEIGHTS)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


WIDE = 12  # k_proj is 32 to 16

OURS = {
    "all linear": {},
    "alpha": {"alpha": 12.0, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "mlp.up_proj": 6},
        "alpha_pattern": {"down_proj": 2.5},
    },
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "dropout": {"dropout": 0.1},
    "rslora": {"use_rslora": True, "alpha": 5.0, "rank_pattern": {"q_proj": 2}},
    "dora": {"use_dora": True, "alpha": 6.0},
    "pissa": {"init": "pissa", "alpha": 3.0, "target_modules": ["q_proj", "up_proj"]},
    "balanced": {"init": "balanced", "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "balanced dora": {"init": "balanced", "use_dora": True, "target_modules": ["q_proj", "o_proj"]},
    # Written at twice the rank, which is above the smaller side of the weight.
    "wide": {"init": "pissa", "rank": WIDE, "target_modules": ["k_proj"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", OURS)
def test_peft_reads_what_we_write(llama_folder, tmp_path, case):
    model = adapted_llama(llama_folder, **OURS[case])
    model.eval()
    base = torch_logits(torch_llama(llama_folder))
    save_peft_adapter(tmp_path, model, base_model=str(llama_folder))
    theirs = PeftModel.from_pretrained(torch_llama(llama_folder), tmp_path, **CPU)
    logits = torch_logits(theirs)
    np.testing.assert_allclose(our_logits(model), logits, atol=1e-4)
    assert np.abs(logits - base).max() > 1.0
    # Nothing but our layers: PEFT would add zero factors to others without a word.
    found = {name for name, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    with safe_open(tmp_path / WEIGHTS, "np") as file:
        assert file.metadata() == {"format": "pt"}
        written = {name.removeprefix("base_model.model.") for name in file.keys()}  # noqa: SIM118
    assert found == {name.split(".lora_")[0] for name in written}
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(llama_folder)
    assert (config["task_type"], config["inference_mode"]) == ("CAUSAL_LM", True)
    fields = OURS[case]
    assert config["use_rslora"] == fields.get("use_rslora", False)
    assert config["use_dora"] == fields.get("use_dora", False)
    assert config["r"] == fields.get("rank", 4) * (2 if "init" in fields else 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    # And back.
    again = load_peft_adapter(tmp_path, load_pretrained(llama_folder))
    np.testing.assert_array_equal(our_logits(again), our_logits(model))
    save_peft_adapter(tmp_path / "again", again, base_model=str(llama_folder))
    assert_same_files(tmp_path / "again", tmp_path)
    expected = {**config, "lora_dropout": 0.0}
    assert json.loads((tmp_path / "again" / CONFIG).read_text()) == expected


THEIRS = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 16},
    "all linear": {"target_modules": "all-linear", "lora_dropout": 0.1},
    "regex": {"target_modules": r".*\.(self_attn\.o|mlp\.gate)_proj"},
    "rslora": {"target_modules": ["k_proj"], "use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, r"model\.layers\.\d+\.mlp\..*": 5},
        "alpha_pattern": {"^model.layers.[012].self_attn.v_proj": 1},
    },
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "up_proj"]},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["gate_proj"]},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "dora": {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    "wide": {"target_modules": ["k_proj"], "r": 2 * WIDE},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", THEIRS)
def test_we_read_what_peft_writes(llama_folder, tmp_path, case):
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **THEIRS[case]})
    theirs = randomized_peft(torch_llama(llama_folder), config)
    theirs.save_pretrained(tmp_path)
    model = load_peft_adapter(tmp_path, load_pretrained(llama_folder))
    expected = torch_logits(theirs)
    np.testing.assert_allclose(our_logits(model), expected, atol=1e-4)
    assert np.abs(expected - torch_logits(torch_llama(llama_folder))).max() > 0.5
    # And back: the same tensors, read by PEFT to the same logits.
    save_peft_adapter(tmp_path / "again", model)
    stored = load_file(tmp_path / WEIGHTS)
    factors = {name: tensor for name, tensor in stored.items() if ".lora_" in name}
    save_file(factors, tmp_path / WEIGHTS)  # PEFT puts an adapted embedding's weight beside them
    assert_same_files(tmp_path / "again", tmp_path)
    again = PeftModel.from_pretrained(torch_llama(llama_folder), tmp_path / "again", **CPU)
    np.testing.assert_allclose(torch_logits(again), expected, atol=1e-5)
    np.testing.assert_allclose(our_logits(merge_lora(model)), expected, atol=1e-3)


def test_bfloat16_factors_keep_their_dtype(llama_folder, tmp_path):
    model = adapted_llama(llama_folder, dtype=jnp.bfloat16, target_modules="q_proj")
    save_peft_adapter(tmp_path, model)
    stored = load_file(tmp_path / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    again = load_peft_adapter(tmp_path, load_pretrained(llama_folder))
    save_peft_adapter(tmp_path / "again", again)
    assert_same_files(tmp_path / "again", tmp_path)
    wide = load_peft_adapter(tmp_path, load_pretrained(llama_folder), dtype=jnp.float32)
    layer = wide.layers.self_attn.q_proj
    assert layer.lora_a.dtype == jnp.float32
    np.testing.assert_array_equal(layer.lora_a[...], model.layers.self_attn.q_proj.lora_a[...])


def test_filling_a_model_that_has_lora(llama_folder, tmp_path):
    fields = {"alpha": 3.0, "target_modules": "q_proj"}
    model = adapted_llama(llama_folder, **fields)
    save_peft_adapter(tmp_path, model)
    other = randomize(adapted_llama(llama_folder, dropout=0.5, **fields), seed=9)
    dropout = other.layers.self_attn.q_proj.lora_dropout
    load_peft_adapter(tmp_path, other)
    assert other.layers.self_attn.q_proj.lora_dropout is dropout
    other.eval()
    np.testing.assert_array_equal(our_logits(other), our_logits(model))
    for wrong, message in (
        ({"rank": 2, **fields}, r"layers.self_attn.q_proj has rank 4 and alpha 3, .*rank 2"),
        ({"alpha": 4.0, "target_modules": "q_proj"}, "alpha 3, the model has rank 4 and alpha 4"),
        ({**fields, "target_modules": "k_proj"}, "does not adapt 'layers.self_attn.k_proj'"),
        ({**fields, "dtype": jnp.bfloat16}, "float32, which the model's bfloat16 cannot hold"),
    ):
        with pytest.raises(InputError, match=message):
            load_peft_adapter(tmp_path, adapted_llama(llama_folder, **wrong))
    model = adapted_llama(llama_folder, alpha=3.0, target_modules=["q_proj", "k_proj"])
    save_peft_adapter(tmp_path, model)
    with pytest.raises(InputError, match=r"also adapts 'layers\.self_attn\.k_proj'"):
        load_peft_adapter(tmp_path, other)


def test_filling_a_model_that_has_dora_rslora_or_a_start(llama_folder, tmp_path):
    fields = {"alpha": 3.0, "target_modules": "q_proj"}
    features = {"use_dora": True, "use_rslora": True}
    model = adapted_llama(llama_folder, **fields, **features)
    save_peft_adapter(tmp_path, model)
    other = randomize(adapted_llama(llama_folder, **fields, **features), seed=9)
    load_peft_adapter(tmp_path, other)
    np.testing.assert_array_equal(our_logits(other), our_logits(model))
    for wrong, message in (
        ({"use_dora": True}, "q_proj has rsLoRA in the adapter and not in the model"),
        ({"use_rslora": True}, "q_proj has DoRA in the adapter and not in the model"),
        (
            {**features, "init": "balanced"},
            r"q_proj: the model's LoRA has a start that is not zero",
        ),
    ):
        with pytest.raises(InputError, match=message):
            load_peft_adapter(tmp_path, adapted_llama(llama_folder, **fields, **wrong))
    save_peft_adapter(tmp_path, adapted_llama(llama_folder, **fields, use_rslora=True))
    with pytest.raises(InputError, match="q_proj has DoRA in the model and not in the adapter"):
        load_peft_adapter(tmp_path, other)


@pytest.mark.parametrize(("name", "field"), [("DoRA", "use_dora"), ("rsLoRA", "use_rslora")])
def test_what_an_adapter_has_everywhere_or_nowhere(tmp_path, name, field):
    model = Twin(nnx.Rngs(0))
    config = LoRAConfig(2, target_modules=["side.out"], **{field: True})
    add_lora(model, config, rngs=nnx.Rngs(1))
    add_lora(model, LoRAConfig(2, target_modules=["heads", "blocks"]), rngs=nnx.Rngs(1))
    message = f"{name} is on 'side.out' and not on 'blocks', 'heads'; expected it on all"
    with pytest.raises(InputError, match=message):
        save_peft_adapter(tmp_path / "adapter", model)
    assert not (tmp_path / "adapter").exists()


# --- Files that are damaged, not supported, or for another model


@pytest.fixture(scope="module")
def base(llama_folder):
    return load_pretrained(llama_folder)


@pytest.fixture(scope="module")
def good_adapter(llama_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save_peft_adapter(folder, adapted_llama(llama_folder, target_modules=["q_proj", "o_proj"]))
    return folder


Q1 = "base_model.model.model.layers.1.self_attn.q_proj"


def drop(*names):
    def edit(tensors):
        for name in names:
            del tensors[name]

    return edit


def put(name, tensor):
    return lambda tensors: tensors.update({name: np.asarray(tensor, np.float32)})


def rename(old, new):
    def edit(tensors):
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(f"{Q1}.lora_A.weight"), r"layers\.1\.self_attn\.q_proj\.lora_A\.weight' is missing"),
        (
            drop(f"{Q1}.lora_A.weight", f"{Q1}.lora_B.weight"),
            r"no factors for 'model\.layers\.1\.self_attn\.q_proj', which target_modules",
        ),
        (put(f"{Q1}.lora_A.weight", np.ones((4, 31))), r"is \(4, 31\), expected \(4, 32\)"),
        (put(f"{Q1}.lora_A.weight", np.ones((3, 32))), r"is \(3, 32\), expected \(4, 32\)"),
        (put(f"{Q1}.lora_B.weight", np.ones((16, 4))), r"is \(16, 4\), expected \(32, 4\)"),
        (
            put(f"{Q1}.lora_magnitude_vector", np.ones(32)),
            r"q_proj\.lora_magnitude_vector' is of DoRA, but use_dora in .* is not true",
        ),
        (
            put("base_model.model.model.embed_tokens.lora_magnitude_vector", np.ones(32)),
            r"embed_tokens\.lora_magnitude_vector' does not fit 'model\.embed_tokens', a Embed",
        ),
        (put(f"{Q1}.lora_C.weight", np.ones(4)), "lora_C.weight' is no LoRA factor"),
        (put(f"{Q1}.base_layer.weight", np.ones((32, 32))), "base weight other than the model's"),
        (put("base_model.model.lm_head.base_layer.weight", np.ones((64, 32))), "base weight other"),
        (rename("q_proj", "qkv_proj"), r"another base model: .*'model\.layers\.0\.self_attn\.qkv"),
        (rename("layers.2.", "layers.3."), r"another base model: .*'model\.layers\.3\."),
        (rename(f"{Q1}.lora_A.weight", f"{Q1}.lora_embedding_A"), "does not fit .* a Linear"),
        (lambda tensors: tensors.clear(), "holds no LoRA factors"),
    ],
)
def test_wrong_tensors_are_named_and_the_model_untouched(
    base, good_adapter, tmp_path, edit, message
):
    folder = tmp_path / "adapter"
    shutil.copytree(good_adapter, folder)
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(InputError, match=message):
        load_peft_adapter(folder, base)
    assert lora_layers(base) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, r"_proj\.lora_magnitude_vector' is missing"),
        ({"use_dora": 1}, "use_dora is 1, expected true or false"),
        ({"use_rslora": None, "use_qalora": True}, "use_qalora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"target_parameters": ["w"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"from_the_future": 1}, "from_the_future is 1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"r": 0}, "rank r is 0"),
        ({"r": None}, "rank r is None"),
        ({"lora_alpha": 0}, "alpha lora_alpha is 0"),
        ({"rank_pattern": {"(": 4}}, "'\\(' is no regular expression"),
        ({"rank_pattern": {"layers.1.self_attn.q_proj": 2}}, r"rank and alpha differ between"),
        (
            {"alpha_pattern": {"layers.1.self_attn.q_proj": 2}},
            r"differ between layers of 'layers\.",
        ),
        ({"target_modules": ["q_proj", "o_proj", "up_proj"]}, "no factors for .*up_proj"),
        ({"target_modules": 3}, "target_modules is 3, expected a text or a list"),
        ({"target_modules": [3]}, r"target_modules is \[3\], expected a text or a list"),
        ({"exclude_modules": 3}, "exclude_modules is 3"),
        ({"layers_to_transform": "x"}, "layers_to_transform is 'x', expected a number"),
        ({"layers_to_transform": [0], "layers_pattern": "("}, "'\\(' is no regular expression"),
        ({"layers_pattern": 3}, "layers_pattern is 3"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\], expected an object"),
        ({"alpha_pattern": "x"}, "alpha_pattern is 'x', expected an object"),
        ({"use_rslora": "x"}, "use_rslora is 'x', expected true or false"),
    ],
)
def test_settings_that_are_not_supported_are_named(base, good_adapter, tmp_path, settings, message):
    folder = tmp_path / "adapter"
    shutil.copytree(good_adapter, folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **settings}))
    with pytest.raises(InputError, match=message):
        load_peft_adapter(folder, base)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_some_layers_of_a_stack_is_refused(base, llama_folder, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0, 2])
    randomized_peft(torch_llama(llama_folder), config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no factors for layer 1 of 'layers\.self_attn\.q_proj'"):
        load_peft_adapter(tmp_path, base)


def test_missing_and_unreadable_files(base, llama_folder, good_adapter, tmp_path):
    model = base
    with pytest.raises(InputError, match="no such folder"):
        load_peft_adapter(tmp_path / "nowhere", model)
    with pytest.raises(InputError, match=CONFIG):
        load_peft_adapter(tmp_path, model)
    shutil.copy(good_adapter / CONFIG, tmp_path)
    with pytest.raises(InputError, match=WEIGHTS):
        load_peft_adapter(tmp_path, model)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds adapter_model\.bin"):
        load_peft_adapter(tmp_path, model)
    (tmp_path / WEIGHTS).write_bytes((good_adapter / WEIGHTS).read_bytes()[:100])
    with pytest.raises(InputError, match=WEIGHTS):
        load_peft_adapter(tmp_path, model)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(InputError, match=CONFIG):
        load_peft_adapter(tmp_path, model)
    with pytest.raises(InputError, match="cannot write"):
        save_peft_adapter(tmp_path / CONFIG, adapted_llama(llama_folder))


def test_an_interrupted_save_leaves_no_adapter(llama_folder, good_adapter, tmp_path, monkeypatch):
    shutil.copytree(good_adapter, tmp_path, dirs_exist_ok=True)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("loft_jax.hub.safetensors_io.os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save_peft_adapter(tmp_path, adapted_llama(llama_folder))
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
    assert_same_files(tmp_path, good_adapter)


# --- A model of other layers, named as its twin in torch


class Twin(nnx.Module):
    """Has a stack without numbers in its path, a weight of three axes, and names that clash."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(64, 8, rngs=rngs)

        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.blocks = stack(rngs)
        self.heads = nnx.LinearGeneral(8, (2, 3), use_bias=False, rngs=rngs)
        self.out = nnx.Einsum("...hd,hde->...e", (2, 3, 8), rngs=rngs)
        self.side = nnx.Dict(out=nnx.Linear(8, 5, rngs=rngs))

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return nnx.tanh(block(x))

        x = run(self.embed(tokens), self.blocks)
        return self.side.out(nnx.tanh(self.out(self.heads(x))))

    def hf_name(self, path: str, layer: int | None) -> str:
        return path if layer is None else f"{path}.{layer}.fc"


class Fc(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.fc(x))


class TorchTwin(torch.nn.Module):
    def __init__(self, model: Twin):
        super().__init__()
        self.embed = torch.nn.Embedding(64, 8)
        self.blocks = torch.nn.ModuleList([Fc(), Fc()])
        self.heads = torch.nn.Linear(8, 6, bias=False)
        self.out = torch.nn.Linear(6, 8, bias=False)
        self.side = torch.nn.ModuleDict({"out": torch.nn.Linear(8, 5)})
        kernels = np.asarray(model.blocks.kernel[...]), np.asarray(model.blocks.bias[...])
        state = {
            "embed.weight": model.embed.embedding[...],
            **{f"blocks.{i}.fc.weight": kernels[0][i].T for i in range(2)},
            **{f"blocks.{i}.fc.bias": kernels[1][i] for i in range(2)},
            "heads.weight": model.heads.kernel[...].reshape(8, 6).T,
            "out.weight": model.out.kernel[...].reshape(6, 8).T,
            "side.out.weight": model.side.out.kernel[...].T,
            "side.out.bias": model.side.out.bias[...],
        }
        self.load_state_dict({name: torch.tensor(np.array(v)) for name, v in state.items()})

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.side["out"](torch.tanh(self.out(self.heads(x))))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("fields", "targets"),
    [
        ({"target_modules": ["heads", "out", "embed"]}, ["embed", "heads", "out"]),
        ({"target_modules": "all-linear"}, ["fc", "heads", "out"]),
        # "out" alone would name side.out too, and so would a list with "out" in it.
        ({"target_modules": r"out|blocks"}, r"blocks\.0\.fc|blocks\.1\.fc|out"),
        ({"target_modules": ["side.out", "heads"]}, ["heads", "side.out"]),
        ({"rank_pattern": {"^out": 3}, "alpha_pattern": {"side.out": 7}}, ["fc", "heads", "out"]),
        ({"rank_pattern": {"side.out": 3}}, ["fc", "heads", "out"]),
    ],
)
def test_other_layers_and_names(tmp_path, fields, targets):
    model = Twin(nnx.Rngs(0))
    twin = TorchTwin(model).eval()
    np.testing.assert_allclose(our_logits(model), torch_logits(twin), atol=1e-5)
    randomize(add_lora(model, LoRAConfig(**{"rank": 2, **fields}), rngs=nnx.Rngs(1)))
    save_peft_adapter(tmp_path, model, task_type=None)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == targets
    theirs = PeftModel.from_pretrained(TorchTwin(Twin(nnx.Rngs(0))).eval(), tmp_path, **CPU)
    np.testing.assert_allclose(our_logits(model), torch_logits(theirs), atol=1e-5)
    adapted = sum(hasattr(module, "lora_A") for module in theirs.modules())
    with safe_open(tmp_path / WEIGHTS, "np") as file:
        assert 2 * adapted == len(list(file.keys()))
    again = load_peft_adapter(tmp_path, Twin(nnx.Rngs(0)))
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.to_pure_dict(nnx.state(again)),
        nnx.to_pure_dict(nnx.state(model)),
    )
    assert nnx.split(again)[0] == nnx.split(model)[0]


class Headed(nnx.Module):
    """A model whose head has two layers."""

    def __init__(self, labels: int, rngs: nnx.Rngs):
        self.body = nnx.Linear(4, 4, rngs=rngs)
        self.head = nnx.Dict(
            dense=nnx.Linear(4, 4, rngs=rngs), out=nnx.Linear(4, labels, rngs=rngs)
        )


@pytest.mark.parametrize("labels", [1, 3, 4])
def test_a_head_of_two_layers_is_one_module_that_is_saved(tmp_path, labels):
    """Named as a whole, as PEFT has it, which never adapts what is inside."""
    model = Headed(labels, nnx.Rngs(0))
    randomize(add_lora(model, LoRAConfig(2, target_modules="body"), rngs=nnx.Rngs(1)))
    save_peft_adapter(tmp_path, model, task_type="SEQ_CLS", modules_to_save=["head"])
    settings = json.loads((tmp_path / CONFIG).read_text())
    assert settings["modules_to_save"] == ["head"]
    assert head_of(tmp_path) == ("sequence-classification", labels)
    settings["target_modules"] = ["body", "dense"]  # as PEFT writes what it was given
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    again = load_peft_adapter(tmp_path, Headed(labels, nnx.Rngs(2)))
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.to_pure_dict(nnx.state(again.head)),
        nnx.to_pure_dict(nnx.state(model.head)),
    )
    assert list(lora_layers(again)) == ["body"]


def test_an_adapter_without_a_head_is_none_of_a_classifier(tmp_path):
    model = Headed(3, nnx.Rngs(0))
    add_lora(model, LoRAConfig(2), rngs=nnx.Rngs(1))
    save_peft_adapter(tmp_path, model, task_type="SEQ_CLS")
    with pytest.raises(InputError, match=r"shapes \[\]; expected those of one head"):
        head_of(tmp_path)


def test_models_that_cannot_be_saved(tmp_path):
    folder = tmp_path / "adapter"

    def lora(model):
        return add_lora(model, LoRAConfig(1), rngs=nnx.Rngs(1))

    with pytest.raises(InputError, match="no LoRA layer to save"):
        save_peft_adapter(folder, Twin(nnx.Rngs(0)))
    with pytest.raises(InputError, match="the layer is the whole model"):
        save_peft_adapter(folder, lora(nnx.Linear(2, 2, rngs=nnx.Rngs(0))))
    batched = nnx.LinearGeneral(2, 2, batch_axis={0: 3}, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=r"layers\.0: has a batch axis"):
        save_peft_adapter(folder, lora(nnx.Sequential(batched)))
    stacked = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    stacked.kernel = nnx.Param(jnp.zeros((3, 2, 2)))
    with pytest.raises(InputError, match=r"layers\.0: is a stack of 3 layers, pass hf_name"):
        save_peft_adapter(folder, lora(nnx.Sequential(stacked)))
    with pytest.raises(InputError, match=r"its name 'x' is another layer's too"):
        save_peft_adapter(folder, lora(Twin(nnx.Rngs(0))), hf_name=lambda path, layer: "x")
    assert not folder.exists()
