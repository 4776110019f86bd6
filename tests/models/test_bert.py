"""BERT against transformers and PEFT."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification

from loft_jax.errors import InputError
from loft_jax.hub import load_peft_adapter, load_pretrained, save_peft_adapter
from loft_jax.lora import LoRAConfig, add_lora
from loft_jax.models.bert import BertConfig, BertForSequenceClassification
from loft_jax.tasks import Classification, Regression
from tests.models.family_checks import (
    check_adapter_in,
    check_adapter_out,
    check_mesh,
    check_plan_works,
)

HEAD = "sequence-classification"
SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
VARIANTS = {
    "plain": {},
    "three labels": {"num_labels": 3, "num_hidden_layers": 3},
    "tanh gelu": {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
    "one head": {"num_attention_heads": 1, "hidden_size": 24, "num_labels": 1},
}
RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(0, 400, (3, 17))
TYPES = (np.arange(17) >= 6).astype(np.int32) * np.ones((3, 1), np.int32)
MASK = (np.arange(17) < np.asarray([[17], [9], [1]])).astype(np.int32)


def save_bert(folder, kind=transformers.BertForSequenceClassification, **changes):
    torch.manual_seed(0)
    kind(transformers.BertConfig(**{**SIZES, **changes})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert") / "model")


def torch_logits(model):
    with torch.no_grad():
        return model(
            torch.tensor(TOKENS),
            attention_mask=torch.tensor(MASK),
            token_type_ids=torch.tensor(TYPES),
        ).logits.numpy()


@nnx.jit
def compiled(model, tokens=TOKENS, mask=MASK, types=TYPES):
    return model(tokens, segment_ids=mask, token_types=types)


def our_logits(model):
    return np.asarray(compiled(model))


# The plain one is read in other tests too.
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(x, marks=pytest.mark.slow) if x in ("plain", "three labels") else x
        for x in VARIANTS
    ],
)
def test_logits_are_those_of_transformers(tmp_path, variant):
    folder = save_bert(tmp_path / "model", **VARIANTS[variant])
    model = load_pretrained(folder, head=HEAD)
    model.eval()
    expected = torch_logits(AutoModelForSequenceClassification.from_pretrained(folder).eval())
    np.testing.assert_allclose(our_logits(model), expected, atol=1e-4, rtol=1e-4)


def test_what_stands_in_padding_changes_nothing(folder):
    model = load_pretrained(folder, head=HEAD)
    model.eval()
    spoilt = np.where(MASK, TOKENS, 7)
    found = compiled(model, spoilt)
    np.testing.assert_array_equal(found, our_logits(model))
    alone = model(TOKENS[1:2, :9], token_types=TYPES[1:2, :9])
    np.testing.assert_allclose(alone[0], our_logits(model)[1], atol=1e-5)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_losses_and_gradients_are_those_of_torch(tmp_path, kind):
    count = 3 if kind == "classification" else 1
    folder = save_bert(tmp_path / "model", num_labels=count)
    model = load_pretrained(folder, head=HEAD)
    model.eval()
    if kind == "classification":
        task, labels = Classification(["a", "b", "c"]), np.asarray([2, 0, 1], np.int32)
        given = torch.tensor(labels).long()
    else:
        task, labels = Regression(), np.asarray([0.5, -1.0, 3.0], np.float32)
        given = torch.tensor(labels)
    inputs = {
        "tokens": TOKENS,
        "segment_ids": MASK,
        "token_types": TYPES,
        "labels": labels,
        "weights": np.ones(3, np.float32),
    }
    loss = nnx.value_and_grad(lambda model: task.loss(model, inputs), has_aux=True)
    (total, weight), grads = nnx.jit(loss)(model)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    out = theirs(
        torch.tensor(TOKENS),
        attention_mask=torch.tensor(MASK),
        token_type_ids=torch.tensor(TYPES),
        labels=given,
    )
    np.testing.assert_allclose(total / weight, out.loss.item(), rtol=1e-4)
    (out.loss * 3).backward()
    layer = theirs.bert.encoder.layer[1]
    ours = grads["encoder"]["layer"]
    for found, expected in (
        (ours["attention"]["self"]["query"]["kernel"][...][1], layer.attention.self.query.weight),
        (ours["output"]["dense"]["kernel"][...][1], layer.output.dense.weight),
        (grads["classifier"]["kernel"][...], theirs.classifier.weight),
    ):
        scale = float(expected.grad.abs().max())
        np.testing.assert_allclose(found, expected.grad.T, atol=1e-4 * scale)


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


def test_an_adapter_of_peft_is_read_with_its_head(folder, tmp_path):
    check_adapter_in(
        folder,
        tmp_path,
        auto=AutoModelForSequenceClassification,
        ours=our_logits,
        theirs=torch_logits,
        head=HEAD,
        task_type="SEQ_CLS",
        target_modules=["query", "value", "dense"],
    )


def test_a_head_is_drawn_where_there_is_none_and_heads_of_pretraining_are_passed_over(tmp_path):
    """From a BERT of masked words: no pooler, no classifier, and a head of its own."""
    folder = save_bert(tmp_path / "model", transformers.BertForMaskedLM)
    one, same, other = (
        load_pretrained(folder, head=HEAD, labels=("a", "b", "c"), seed=seed) for seed in (0, 0, 1)
    )
    for model in (one, same, other):
        model.eval()
    assert one.config.labels == ("a", "b", "c")
    assert our_logits(one).shape == (3, 3)
    np.testing.assert_array_equal(our_logits(one), our_logits(same))
    assert np.abs(our_logits(one) - our_logits(other)).max() > 1e-3
    words = load_file(folder / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(one.embeddings.word_embeddings.embedding[...], words)


@pytest.mark.parametrize("labels", ["pos", [], ["a", "a"], [0, 1], {"a": 0}, iter("ab"), 2])
def test_labels_are_different_names(tmp_path, labels):
    with pytest.raises(InputError, match=r"labels is .*, expected different names"):
        load_pretrained(save_bert(tmp_path / "model"), head=HEAD, labels=labels)


def test_a_text_beyond_the_positions_is_refused(tmp_path):
    model = load_pretrained(save_bert(tmp_path / "model"), head=HEAD)
    most = model.config.max_length
    with pytest.raises(InputError, match=f"rows of {most + 1}, and the model has {most} positions"):
        model(np.ones((1, most + 1), np.int32))


def test_a_head_that_an_adapter_brings_is_told(tmp_path, caplog):
    """After the warning that the base has none: it is that of the adapter."""
    folder = save_bert(tmp_path / "model", transformers.BertForMaskedLM)
    first, second = (load_pretrained(folder, head=HEAD, seed=seed) for seed in (0, 1))
    add_lora(first, LoRAConfig(rank=2, target_modules=("query",)), rngs=nnx.Rngs(0))
    heads = first.output_modules
    save_peft_adapter(tmp_path / "adapter", first, task_type="SEQ_CLS", modules_to_save=heads)
    with caplog.at_level(logging.INFO, logger="loft_jax"):
        load_peft_adapter(tmp_path / "adapter", second)
    assert "brings 'classifier.bias', 'classifier.kernel'" in caplog.text
    assert not {"classifier.bias", "classifier.kernel"} & set(second.drawn)
    kernel = first.classifier.kernel[...]
    np.testing.assert_array_equal(second.classifier.kernel[...], kernel)


def test_a_head_of_other_labels_is_drawn_anew(tmp_path, caplog):
    """Outputs that meant something else would be silently wrong."""
    folder = save_bert(tmp_path / "model", id2label={0: "no", 1: "yes"})
    same, turned, more = (
        load_pretrained(folder, head=HEAD, labels=labels)
        for labels in (("no", "yes"), ("yes", "no"), ("no", "yes", "maybe"))
    )
    assert same.drawn == ()
    assert turned.drawn == more.drawn == ("classifier.bias", "classifier.kernel")
    assert more.classifier.kernel.shape == (32, 3)
    assert "a new head is drawn" in caplog.text


def test_padding_beyond_the_positions_changes_nothing(tmp_path):
    folder = save_bert(tmp_path / "model", max_position_embeddings=17)
    model = load_pretrained(folder, head=HEAD)
    model.eval()
    wider = np.pad(TOKENS, ((0, 0), (0, 7))), np.pad(MASK, ((0, 0), (0, 7)))
    found = compiled(model, *wider, np.pad(TYPES, ((0, 0), (0, 7))))
    np.testing.assert_allclose(found, our_logits(model), atol=1e-5)


def test_names_of_older_checkpoints_are_read(folder, tmp_path):
    """Without the prefix, norms as gamma and beta, and numbers of positions."""
    tensors = load_file(folder / "model.safetensors")
    older = {
        name.removeprefix("bert.")
        .replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in tensors.items()
        if not name.startswith("classifier")
    }
    older["embeddings.position_ids"] = np.arange(64)[None]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(older, tmp_path / "model.safetensors")
    again = load_pretrained(tmp_path, head=HEAD)
    expected = load_pretrained(folder, head=HEAD)
    for path, value in nnx.to_flat_state(nnx.state(again.encoder, nnx.Param)):
        np.testing.assert_array_equal(
            value[...], dict(nnx.to_flat_state(nnx.state(expected.encoder)))[path][...]
        )


def test_dropout_is_that_of_the_configuration(folder):
    model = load_pretrained(folder, head=HEAD)
    model.train()
    assert np.abs(our_logits(model) - our_logits(model)).max() > 1e-3
    quiet = dataclasses.replace(
        model.config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    still = BertForSequenceClassification(quiet, rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(still, nnx.RngState))


@pytest.mark.slow
def test_a_mesh_gives_what_one_device_gives(tmp_path):
    folder = save_bert(
        tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    check_mesh(folder, "classification")


@pytest.mark.slow
def test_plan_works(folder):
    check_plan_works(folder, labels=("no", "yes"))


def test_configurations_go_to_transformers_and_back():
    config = BertConfig(hidden_size=48, num_attention_heads=3, labels=("no", "yes", "maybe"))
    theirs = transformers.BertConfig(**config.to_hf())
    assert theirs.num_labels == 3
    assert BertConfig.from_hf(theirs.to_dict()) == config


def test_the_head_of_another_task_is_refused(folder):
    with pytest.raises(InputError, match="'bert' has no model for causal-lm; it has one for seq"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_act", "swish", "hidden_act is 'swish', expected one of"),
        ("hidden_act", ["gelu"], "hidden_act is ['gelu'], expected one of"),
        ("position_embedding_type", "relative_key", "position_embedding_type is 'relative_key'"),
        ("num_attention_heads", 5, "hidden_size is 32, expected a multiple"),
        ("is_decoder", True, "is_decoder is True"),
        ("id2label", {"0": "a", "2": "b"}, "id2label is"),
        ("id2label", ["a"], "id2label is ['a']"),
        ("problem_type", "multi_label_classification", "problem_type is 'multi_label_class"),
        ("hidden_dropout_prob", "x", "hidden_dropout_prob is 'x'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field, value, said):
    with pytest.raises(InputError) as raised:
        BertConfig.from_hf({"model_type": "bert", **SIZES, field: value})
    assert said in str(raised.value)
