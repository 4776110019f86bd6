"""The mean of adapters on disk, judged by PEFT."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from loft_jax import average_adapters, load_peft_adapter, load_pretrained
from loft_jax.cli import main
from loft_jax.errors import InputError
from loft_jax.hub.peft_average import average_peft_adapters
from loft_jax.hub.tokenizer_folder import with_template_of
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 9))
OPTIONS = [
    {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"q_proj": 1},
    },
]


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def write(folder, seed, **options):
    model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "base"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    base().save_pretrained(folder / "base")
    return folder, [write(folder / str(seed), seed, **o) for seed, o in enumerate(OPTIONS)]


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.as_tensor(TOKENS)).logits.numpy()


def deltas(model, adapter):
    layers = {
        name: module
        for name, module in model.named_modules()
        if adapter in {**getattr(module, "lora_A", {}), **getattr(module, "lora_embedding_A", {})}
    }
    return {name: layer.get_delta_weight(adapter).detach() for name, layer in layers.items()}


@pytest.mark.parametrize("rank", [2, None])
def test_it_is_the_weighted_adapter_of_peft(adapters, tmp_path, rank):
    _, folders = adapters
    average_peft_adapters(folders, tmp_path / "mean", weights=(1, 2, 5), rank=rank)
    torch_model = PeftModel.from_pretrained(base(), folders[0], adapter_name="0")
    for number in (1, 2):
        torch_model.load_adapter(folders[number], str(number))
    shares = [1 / 8, 2 / 8, 5 / 8]
    torch_model.add_weighted_adapter(
        ["0", "1", "2"],
        shares,
        "theirs",
        combination_type="cat" if rank is None else "svd",
        svd_rank=rank,
    )
    torch_model.load_adapter(tmp_path / "mean", "ours")
    ours, theirs = deltas(torch_model, "ours"), deltas(torch_model, "theirs")
    assert len(ours) == 4
    for name, delta in ours.items():
        np.testing.assert_allclose(delta, theirs[name], atol=1e-5 * float(delta.abs().max()))


@pytest.mark.slow
def test_the_mean_of_files_is_that_of_models(adapters, tmp_path):
    folder, folders = adapters
    average_peft_adapters(folders, tmp_path / "mean", rank=3)
    model = load_pretrained(folder / "base")
    of_files = load_peft_adapter(tmp_path / "mean", load_pretrained(folder / "base"))
    clones = [load_peft_adapter(path, load_pretrained(folder / "base")) for path in folders]
    of_models = average_adapters(clones, rank=3)
    found, expected = of_files(TOKENS), of_models(TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - model(TOKENS)).max() > 1e-2
    mean = PeftModel.from_pretrained(base(), tmp_path / "mean")
    np.testing.assert_allclose(logits(mean), found, atol=1e-4)


def test_adapters_of_different_modules(adapters, tmp_path):
    _, folders = adapters
    other = write(tmp_path / "other", 7, r=2, target_modules=["v_proj"], layers_to_transform=[1])
    average_peft_adapters([folders[0], other], tmp_path / "mean")
    torch_model = PeftModel.from_pretrained(base(), tmp_path / "mean", adapter_name="mean")
    torch_model.load_adapter(folders[0], "first")
    first = deltas(torch_model, "first")
    mean = deltas(torch_model, "mean")
    assert len(mean) == 5
    for name, delta in mean.items():
        if "v_proj" not in name:
            np.testing.assert_allclose(delta, first[name] / 2, atol=1e-6)


def test_modules_that_are_saved_whole_become_their_mean(tmp_path):
    for number in range(2):
        write(
            tmp_path / str(number), 0, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]
        )
        file = tmp_path / str(number) / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors["base_model.model.lm_head.weight"] = np.full((64, 16), number, np.float32)
        save_file(tensors, file, {"format": "pt"})
    average_peft_adapters([tmp_path / "0", tmp_path / "1"], tmp_path / "mean", weights=(3, 1))
    mean = load_file(tmp_path / "mean" / "adapter_model.safetensors")
    np.testing.assert_array_equal(mean["base_model.model.lm_head.weight"], 0.25)


def test_the_command(adapters, tmp_path, capsys):
    _, folders = adapters
    names = list(map(str, folders))
    output = str(tmp_path / "mean")
    command = ["average", *names, "--weights", "1", "2", "3", "--rank", "2", "--output", output]
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == output
    average_peft_adapters(folders, tmp_path / "same", weights=(1, 2, 3), rank=2)
    first, second = (
        load_file(f"{folder}/adapter_model.safetensors") for folder in (output, tmp_path / "same")
    )
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, second[name])
    assert main(["average", *names, "--weights", "1", "--output", output]) == 2
    assert "1 weights for 3 adapters" in capsys.readouterr().err
    given = Path(folders[0], "adapter_model.safetensors").read_bytes()
    assert main(["average", *names, "--output", names[0]]) == 2
    assert f"{names[0]}: is one of the adapters" in capsys.readouterr().err
    assert Path(folders[0], "adapter_model.safetensors").read_bytes() == given


def test_the_weight_under_an_embedding_is_that_of_the_base(tmp_path):
    """PEFT writes it beside the factors."""
    both = write(tmp_path / "both", 0, r=2, target_modules=["embed_tokens", "q_proj"])
    one = write(tmp_path / "one", 1, r=3, target_modules=["q_proj"])
    [name] = [x for x in load_file(both / "adapter_model.safetensors") if "base_layer" in x]
    average_peft_adapters([one, both], tmp_path / "mean")
    found = PeftModel.from_pretrained(base(), tmp_path / "mean")
    parts = [PeftModel.from_pretrained(base(), folder) for folder in (one, both)]
    wanted, embedded = (deltas(model, "default") for model in parts)
    for module, delta in deltas(found, "default").items():
        mean = (wanted.get(module, 0) + embedded[module]) / 2
        np.testing.assert_allclose(delta, mean, atol=1e-5, err_msg=module)
    tensors = load_file(both / "adapter_model.safetensors")
    save_file(tensors | {name: tensors[name] + 1}, both / "other.safetensors")
    other = tmp_path / "other"
    shutil.copytree(both, other)
    (other / "other.safetensors").replace(other / "adapter_model.safetensors")
    average_peft_adapters([both, other], tmp_path / "mean")
    mean = load_file(tmp_path / "mean" / "adapter_model.safetensors")[name]
    np.testing.assert_allclose(mean, tensors[name] + 0.5, atol=1e-6)
    with pytest.raises(InputError, match=r"embed_tokens\.base_layer\.weight' is another one"):
        average_peft_adapters([both, other, one], tmp_path / "mean")


def test_the_mean_is_asked_as_its_first_adapter_was_trained(adapters, tmp_path, caplog):
    _, folders = adapters
    plain, chat = (
        write(tmp_path / "plain", 0, **OPTIONS[0]),
        write(tmp_path / "chat", 1, **OPTIONS[0]),
    )
    tiny_tokenizer(chat_template=None).save_pretrained(plain)
    tiny_tokenizer().save_pretrained(chat)
    mean = tmp_path / "mean"

    def template(*adapters):
        average_peft_adapters(adapters, mean)
        return with_template_of(tiny_tokenizer(chat_template="base"), str(mean)).chat_template

    assert template(chat, chat) == CHAT_TEMPLATE
    assert template(plain, plain) is None
    assert template(folders[0], folders[0]) == "base"
    assert not caplog.records
    for pair, expected in (((plain, chat), None), ((folders[0], plain), "base")):
        caplog.clear()
        assert template(*pair) == expected
        assert f"{pair[1]}: has another chat template than {pair[0]}" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is true"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS', expected 'CAUSAL_LM'"),
        ({"r": 5}, "expected two of rank 5"),
    ],
)
def test_mistakes_are_named(adapters, tmp_path, change, message):
    _, folders = adapters
    other = write(tmp_path / "other", 1, **OPTIONS[0])
    file = other / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=message):
        average_peft_adapters([folders[0], other], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
