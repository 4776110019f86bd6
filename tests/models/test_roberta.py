"""RoBERTa against transformers and PEFT."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification

from loft_jax.data import DataConfig
from loft_jax.errors import InputError
from loft_jax.hub import load_pretrained, save_peft_adapter
from loft_jax.hub.peft_base import head_of
from loft_jax.hub.pretrained import load_model_config
from loft_jax.lora import LoRAConfig, add_lora, lora_layers
from loft_jax.models.roberta import RobertaConfig, RobertaForSequenceClassification
from loft_jax.tasks import Classification, Regression
from loft_jax.tasks.task import within
from tests.models.family_checks import (
    check_adapter_in,
    check_adapter_out,
    check_mesh,
    check_plan_works,
)

HEAD = "sequence-classification"
LABELS = ("LABEL_0", "LABEL_1")
SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
    "type_vocab_size": 1,
    "initializer_range": 0.3,
}
VARIANTS = {
    "plain": {},
    "three labels": {"num_labels": 3, "num_hidden_layers": 3},
    "as many labels as features": {"num_labels": 32, "hidden_act": "gelu_new"},
    "one head": {"num_attention_heads": 1, "hidden_size": 24, "num_labels": 1},
    "padding is another token": {"pad_token_id": 5, "layer_norm_eps": 1e-3},
    "two token types": {"type_vocab_size": 2},
}
LENGTHS = np.asarray([[17], [9], [1]])
MASK = (np.arange(17) < LENGTHS).astype(np.int32)
TEXTS = np.random.default_rng(0).integers(6, 400, (3, 17))
TEXTS[0, 4] = 1  # a text may hold the padding token, which has its own position
TOKENS = np.where(MASK, TEXTS, 1)


def save_roberta(folder, kind=transformers.RobertaForSequenceClassification, **changes):
    torch.manual_seed(0)
    model = kind(transformers.RobertaConfig(**{**SIZES, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "position_embeddings" in name:  # zeros, or zero at padding
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_roberta(tmp_path_factory.mktemp("roberta") / "model")


def torch_logits(model, tokens=TOKENS, mask=MASK):
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()


@nnx.jit
def compiled(model, tokens, mask):
    return model(tokens, segment_ids=mask)


def our_logits(model, tokens=TOKENS, mask=MASK):
    return np.asarray(compiled(model, tokens, mask))


def loaded(folder, **options):
    model = load_pretrained(folder, head=HEAD, **options)
    model.eval()
    return model


# The plain one is read in other tests too.
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(x, marks=pytest.mark.slow) if x in ("plain", "three labels") else x
        for x in VARIANTS
    ],
)
def test_logits_are_those_of_transformers(tmp_path, variant):
    folder = save_roberta(tmp_path / "model", **VARIANTS[variant])
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokens = np.where(MASK, TEXTS, theirs.config.pad_token_id)
    expected = torch_logits(theirs, tokens)
    np.testing.assert_allclose(our_logits(loaded(folder), tokens), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_what_stands_in_padding_changes_nothing(folder):
    model = loaded(folder)
    expected = our_logits(model)
    np.testing.assert_array_equal(our_logits(model, np.where(MASK, TOKENS, 7)), expected)
    alone = model(TOKENS[1:2, :9])
    np.testing.assert_allclose(alone[0], expected[1], atol=1e-5)


def test_the_longest_text_has_all_positions_after_that_of_padding(folder):
    model = loaded(folder)
    assert model.config.max_length == 64
    assert within(DataConfig("", max_length=512), model.config).max_length == 64
    tokens = np.random.default_rng(1).integers(2, 400, (2, 64))
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = torch_logits(theirs, tokens, np.ones_like(tokens))
    np.testing.assert_allclose(model(tokens), expected, atol=1e-4, rtol=1e-4)


# Regression: daily for BERT.
@pytest.mark.parametrize(
    "kind", ["classification", pytest.param("regression", marks=pytest.mark.slow)]
)
def test_losses_and_gradients_are_those_of_torch(tmp_path, kind):
    count = 3 if kind == "classification" else 1
    folder = save_roberta(tmp_path / "model", num_labels=count)
    model = loaded(folder)
    if kind == "classification":
        task, labels = Classification(["a", "b", "c"]), np.asarray([2, 0, 1], np.int32)
        given = torch.tensor(labels).long()
    else:
        task, labels = Regression(), np.asarray([0.5, -1.0, 3.0], np.float32)
        given = torch.tensor(labels)
    inputs = {
        "tokens": TOKENS,
        "segment_ids": MASK,
        "token_types": np.zeros_like(TOKENS),
        "labels": labels,
        "weights": np.ones(3, np.float32),
    }
    loss = nnx.value_and_grad(lambda model: task.loss(model, inputs), has_aux=True)
    (total, weight), grads = nnx.jit(loss)(model)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    out = theirs(torch.tensor(TOKENS), attention_mask=torch.tensor(MASK), labels=given)
    np.testing.assert_allclose(total / weight, out.loss.item(), rtol=1e-4)
    (out.loss * 3).backward()
    layer = theirs.roberta.encoder.layer[1]
    ours, head = grads["encoder"]["layer"], grads["classifier"]
    for found, expected in (
        (ours["attention"]["self"]["query"]["kernel"][...][1], layer.attention.self.query.weight),
        (ours["output"]["dense"]["kernel"][...][1], layer.output.dense.weight),
        (head["dense"]["kernel"][...], theirs.classifier.dense.weight),
        (head["out_proj"]["kernel"][...], theirs.classifier.out_proj.weight),
    ):
        scale = float(expected.grad.abs().max())
        np.testing.assert_allclose(found, expected.grad.T, atol=1e-4 * scale)


@pytest.mark.slow
def test_an_adapter_and_its_head_go_to_peft_and_merge_for_transformers(folder, tmp_path):
    check_adapter_out(
        folder,
        tmp_path,
        auto=AutoModelForSequenceClassification,
        ours=our_logits,
        theirs=torch_logits,
        head=HEAD,
        task_type="SEQ_CLS",
        saved=("classifier",),
    )
    assert head_of(tmp_path / "adapter", *load_model_config(folder)) == (
        HEAD,
        ("LABEL_0", "LABEL_1"),
    )


@pytest.mark.parametrize(
    "targets", [pytest.param(["query", "value", "dense"], marks=pytest.mark.slow), "all-linear"]
)
def test_an_adapter_of_peft_is_read_with_its_head(folder, tmp_path, targets):
    """Both targets name the layers of the head, which PEFT then holds whole."""
    check_adapter_in(
        folder,
        tmp_path,
        auto=AutoModelForSequenceClassification,
        ours=our_logits,
        theirs=torch_logits,
        head=HEAD,
        task_type="SEQ_CLS",
        target_modules=targets,
    )
    assert head_of(tmp_path / "theirs", *load_model_config(folder)) == (
        HEAD,
        ("LABEL_0", "LABEL_1"),
    )


def test_all_linear_layers_are_those_that_peft_adapts(folder):
    model = loaded(folder)
    add_lora(model, LoRAConfig(2, target_modules="all-linear"), rngs=nnx.Rngs(0))
    ours = {model.hf_name(path, number) for path in lora_layers(model) for number in range(2)}
    theirs = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(folder),
        LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear"),
    ).base_model.model
    assert ours == {name for name, module in theirs.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize(
    "kind",
    [
        transformers.RobertaForMaskedLM,
        pytest.param(transformers.RobertaModel, marks=pytest.mark.slow),
    ],
)
def test_a_head_is_drawn_where_there_is_none_and_that_of_pretraining_is_passed_over(tmp_path, kind):
    """With the prefix and `lm_head`, or without the prefix and with a pooler."""
    folder = save_roberta(tmp_path / "model", kind)
    one, same, other = (loaded(folder, labels=("a", "b", "c"), seed=seed) for seed in (0, 0, 1))
    assert one.config.labels == ("a", "b", "c")
    assert our_logits(one).shape == (3, 3)
    np.testing.assert_array_equal(our_logits(one), our_logits(same))
    for layer in (one.classifier.dense, one.classifier.out_proj):
        assert np.std(layer.kernel[...]) == pytest.approx(0.3, rel=0.2)
        assert not np.any(layer.bias[...])
    assert np.abs(our_logits(one) - our_logits(other)).max() > 1e-3
    tensors = load_file(folder / "model.safetensors")
    (words,) = (tensors[name] for name in tensors if name.endswith("word_embeddings.weight"))
    np.testing.assert_array_equal(one.embeddings.word_embeddings.embedding[...], words)


def test_names_of_older_checkpoints_are_read(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): x
        for name, x in tensors.items()
    }
    older["roberta.embeddings.position_ids"] = np.arange(66)[None]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(older, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(our_logits(loaded(tmp_path)), our_logits(loaded(folder)))


@pytest.mark.slow
def test_dropout_is_that_of_the_configuration(folder):
    model = load_pretrained(folder, head=HEAD)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    head_only = dataclasses.replace(model.config, **quiet, classifier_dropout=0.5)
    for config, still in ((dataclasses.replace(model.config, **quiet), True), (head_only, False)):
        model = RobertaForSequenceClassification(config, rngs=nnx.Rngs(0))
        model.train()
        assert np.array_equal(our_logits(model), our_logits(model)) == still


@pytest.mark.slow
def test_a_mesh_gives_what_one_device_gives(tmp_path):
    folder = save_roberta(
        tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    check_mesh(folder, "classification")


@pytest.mark.slow
def test_plan_works(folder):
    check_plan_works(folder, labels=("no", "yes"))


def test_configurations_go_to_transformers_and_back():
    config = RobertaConfig(hidden_size=48, num_attention_heads=3, labels=("no", "yes", "maybe"))
    theirs = transformers.RobertaConfig(**config.to_hf())
    assert theirs.num_labels == 3
    assert RobertaConfig.from_hf(theirs.to_dict()) == config
    assert RobertaConfig.from_hf(transformers.RobertaConfig().to_dict()) == RobertaConfig()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model_type", "bert", "model_type is 'bert', expected 'roberta'"),
        ("architectures", ["RobertaForCausalLM"], "architectures names 'RobertaForCausalLM'"),
        ("is_decoder", True, "is_decoder is True"),
        ("position_embedding_type", "relative_key", "position_embedding_type is 'relative_key'"),
        ("pad_token_id", 65, "pad_token_id is 65, expected 0 to 64"),
        ("pad_token_id", -1, "pad_token_id is -1, expected 0 to 64"),
        ("hidden_act", "swish", "hidden_act is 'swish', expected one of"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field, value, said):
    with pytest.raises(InputError) as raised:
        RobertaConfig.from_hf({"model_type": "roberta", **SIZES, field: value})
    assert said in str(raised.value)


def test_a_head_is_written_without_asking(folder, tmp_path):
    model = add_lora(loaded(folder), LoRAConfig(2), rngs=nnx.Rngs(0))
    kernel = model.classifier.out_proj.kernel
    kernel.set_value(kernel.get_value() + 1)
    save_peft_adapter(tmp_path, model)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    theirs = PeftModel.from_pretrained(theirs, tmp_path).eval()
    np.testing.assert_allclose(our_logits(model), torch_logits(theirs), atol=1e-4)
    assert head_of(tmp_path, *load_model_config(folder))[1] == model.config.labels


def test_an_adapter_without_a_head_is_none_of_a_classifier(folder, tmp_path):
    model = add_lora(loaded(folder), LoRAConfig(2), rngs=nnx.Rngs(0))
    save_peft_adapter(tmp_path, model)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "classifier" not in k}, file)
    with pytest.raises(InputError, match=r"classifier\.out_proj\.weight' is missing, the head's"):
        head_of(tmp_path, *load_model_config(folder))
