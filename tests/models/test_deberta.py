"""DeBERTa-v2 and -v3 against transformers and PEFT."""

import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from loft_jax.cli import main
from loft_jax.errors import InputError
from loft_jax.hub import load_pretrained, load_tokenizer
from loft_jax.lora import LoRAConfig, add_lora, lora_layers
from loft_jax.models.deberta import (
    FAMILY,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    relative_rows,
)
from loft_jax.tasks import Classification
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
RELATIVE = {"relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 8}
# The texts are longer than there are positions, which the buckets extend to.
VERSION_3 = {
    **RELATIVE,
    "max_position_embeddings": 16,
    "position_biased_input": False,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}
VERSION_2 = {**VERSION_3, "conv_kernel_size": 3, "conv_act": "gelu", "num_labels": 3}
VARIANTS = {
    "version 3": VERSION_3,
    "version 2": VERSION_2,
    "own projections of positions, grouped convolution": {
        **RELATIVE,
        "type_vocab_size": 2,
        "embedding_size": 20,
        "conv_kernel_size": 5,
        "conv_groups": 2,
        "num_hidden_layers": 3,
    },
    "c2p alone, without buckets": {
        "relative_attention": True,
        "pos_att_type": ["c2p"],
        "max_relative_positions": 6,
        "num_labels": 1,
        "pooler_hidden_act": "tanh",
    },
    "p2c alone": {
        **RELATIVE,
        "pos_att_type": "p2c",
        "hidden_act": "gelu_new",
        "type_vocab_size": 1,
    },
    "neither": {**RELATIVE, "pos_att_type": None, "share_att_key": True},
    "no relative positions": {**RELATIVE, "relative_attention": False},
}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LENGTH = 29
TOKENS = np.random.default_rng(0).integers(1, 400, (3, LENGTH))
MASK = (np.arange(LENGTH) < np.asarray([[LENGTH], [10], [1]])).astype(np.int32)
TYPES = (np.arange(LENGTH) >= 6).astype(np.int32) * np.ones((3, 1), np.int32)


def save_deberta(folder, kind=transformers.DebertaV2ForSequenceClassification, **changes):
    torch.manual_seed(0)
    model = kind(transformers.DebertaV2Config(**{**SIZES, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zeros
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_deberta(tmp_path_factory.mktemp("deberta") / "model", **VERSION_2)


def torch_logits(model, mask=MASK):
    types = np.minimum(TYPES, max(model.config.type_vocab_size - 1, 0))
    with torch.no_grad():
        return model(
            torch.tensor(TOKENS),
            attention_mask=torch.tensor(mask),
            token_type_ids=torch.tensor(types),
        ).logits.numpy()


@nnx.jit
def compiled(model, tokens, mask):
    return model(tokens, segment_ids=mask, token_types=TYPES)


def our_logits(model, mask=MASK, tokens=TOKENS):
    return np.asarray(compiled(model, tokens, mask))


def loaded(folder, **options):
    model = load_pretrained(folder, head=HEAD, **options)
    model.eval()
    return model


def abstract(config):
    return nnx.eval_shape(lambda: DebertaV2ForSequenceClassification(config, rngs=nnx.Rngs(0)))


# Version 2 is version 3 with a convolution.
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("version 3", "neither") else name
        for name in VARIANTS
    ],
)
def test_logits_are_those_of_transformers(tmp_path, variant):
    """With padding on either side."""
    folder = save_deberta(tmp_path / "model", **VARIANTS[variant])
    theirs, ours = AutoModelForSequenceClassification.from_pretrained(folder).eval(), loaded(folder)
    for mask in (MASK, MASK[:, ::-1].copy()):
        np.testing.assert_allclose(
            our_logits(ours, mask), torch_logits(theirs, mask), atol=1e-4, rtol=1e-4
        )


def test_what_stands_in_padding_changes_nothing(folder):
    model = loaded(folder)
    expected = our_logits(model)
    spoilt = our_logits(model, tokens=np.where(MASK, TOKENS, 7))
    np.testing.assert_array_equal(spoilt, expected)
    alone = model(TOKENS[1:2, :10])
    np.testing.assert_allclose(alone[0], expected[1], atol=1e-5)


def test_padding_beyond_the_positions_changes_nothing():
    config = DebertaV2Config.from_hf({"model_type": "deberta-v2", **SIZES})
    config = dataclasses.replace(config, max_position_embeddings=LENGTH)
    model = DebertaV2ForSequenceClassification(config, rngs=nnx.Rngs(0))
    model.eval()
    tokens, mask = (np.pad(x, ((0, 0), (0, 7))) for x in (TOKENS, MASK))
    np.testing.assert_allclose(our_logits(model, mask, tokens), our_logits(model), atol=1e-5)
    assert config.max_length == LENGTH


@pytest.mark.parametrize("buckets", [2, 3, 8, 20, 33, 256])
def test_buckets_are_those_of_transformers(buckets):
    for farthest in (16, 50, 66, 512, 514):
        config = DebertaV2Config(position_buckets=buckets, max_relative_positions=farthest)
        length = max(farthest, buckets)
        distances = torch.arange(-length, length + 1)
        expected = make_log_bucket_position(distances, buckets, farthest) + buckets
        np.testing.assert_array_equal(
            relative_rows(config, length), expected.clamp(0, 2 * buckets - 1)
        )


def test_gradients_are_those_of_torch(folder):
    model = loaded(folder)
    task, labels = Classification(["a", "b", "c"]), np.asarray([2, 0, 1], np.int32)
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
        torch.tensor(TOKENS), attention_mask=torch.tensor(MASK), labels=torch.tensor(labels).long()
    )
    np.testing.assert_allclose(total / weight, out.loss.item(), rtol=1e-4)
    (out.loss * 3).backward()
    encoder = theirs.deberta.encoder
    ours, layer = grads["encoder"]["layer"], encoder.layer[1]
    attention = ours["attention"]["self"]
    for found, expected in (
        (attention["query_proj"]["kernel"][...][1], layer.attention.self.query_proj.weight),
        (attention["key_proj"]["kernel"][...][1], layer.attention.self.key_proj.weight),
        (ours["output"]["dense"]["kernel"][...][1], layer.output.dense.weight),
        (grads["encoder"]["rel_embeddings"]["embedding"][...].T, encoder.rel_embeddings.weight),
        (grads["encoder"]["conv"]["conv"]["kernel"][...], encoder.conv.conv.weight),
        (grads["pooler"]["dense"]["kernel"][...], theirs.pooler.dense.weight),
        (grads["classifier"]["kernel"][...], theirs.classifier.weight),
    ):
        scale = float(expected.grad.abs().max())
        np.testing.assert_allclose(found, expected.grad.numpy().T, atol=1e-4 * scale)


def test_no_array_has_more_than_two_numbers_for_a_pair_of_tokens_and_head():
    """In a step, forward and backward: relative positions are never looked up pair by pair."""
    sizes = {**SIZES, **VERSION_3, "hidden_size": 64, "num_attention_heads": 2}
    config = DebertaV2Config.from_hf({"model_type": "deberta-v2", **sizes, **QUIET})
    graphdef, params, rest = nnx.split(abstract(config), nnx.Param, ...)
    length = 512

    def total(params, tokens):
        return nnx.merge(graphdef, params, rest)(tokens).sum()

    tokens = jax.ShapeDtypeStruct((1, length), np.int32)
    program = str(jax.make_jaxpr(jax.grad(total))(params, tokens))
    shapes = re.findall(r":[a-z]+\d*\[([\d,]+)\]", program)
    assert max(math.prod(map(int, shape.split(","))) for shape in shapes) == 2 * 2 * length**2


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


@pytest.mark.parametrize(
    "targets",
    [
        pytest.param(None, marks=pytest.mark.slow),
        ["query_proj", "key_proj", "value_proj", "dense"],
    ],
)
def test_an_adapter_of_peft_is_read_with_its_head(folder, tmp_path, targets):
    """By PEFT's own targets, queries and values, and by those of RefLoRA's authors."""
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


def test_all_linear_layers_are_those_that_peft_adapts(tmp_path):
    changes = VARIANTS["own projections of positions, grouped convolution"]
    folder = save_deberta(tmp_path, **changes)
    model = loaded(folder)
    add_lora(model, LoRAConfig(2, target_modules="all-linear"), rngs=nnx.Rngs(0))
    ours = {
        model.hf_name(path, number)
        for path in lora_layers(model)
        for number in (range(3) if path.startswith("encoder.layer") else (None,))
    }
    theirs = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(folder),
        LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear"),
    ).base_model.model
    assert ours == {name for name, module in theirs.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize(
    ("kind", "legacy"),
    [
        (transformers.DebertaV2ForMaskedLM, True),
        (transformers.DebertaV2ForMaskedLM, False),
        (transformers.DebertaV2Model, True),
    ],
)
def test_a_head_is_drawn_where_there_is_none_and_those_of_pretraining_are_ignored(
    tmp_path, kind, legacy
):
    folder = save_deberta(tmp_path / "model", kind, **VERSION_3, legacy=legacy)
    tensors = load_file(folder / "model.safetensors")
    tensors["mask_predictions.dense.weight"] = np.ones((32, 32), np.float32)
    save_file(tensors, folder / "model.safetensors")
    model = loaded(folder, labels=("a", "b", "c"))
    assert model.config.labels == ("a", "b", "c")
    assert model.drawn == (
        "classifier.bias",
        "classifier.kernel",
        "pooler.dense.bias",
        "pooler.dense.kernel",
    )
    assert model.output_modules == ("classifier", "pooler.dense")
    assert np.std(model.classifier.kernel[...]) == pytest.approx(0.3, rel=0.2)
    (words,) = (tensors[name] for name in tensors if name.endswith("word_embeddings.weight"))
    np.testing.assert_array_equal(model.embeddings.word_embeddings.embedding[...], words)


def test_names_of_older_checkpoints_are_read(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): x
        for name, x in tensors.items()
    }
    older["deberta.embeddings.position_ids"] = np.arange(16)[None]
    config = json.loads((folder / "config.json").read_text())
    config |= {"pos_att_type": "p2c|c2p", "attention_head_size": 8, "legacy": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(older, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(our_logits(loaded(tmp_path)), our_logits(loaded(folder)))


def test_dropout_is_that_of_the_configuration_and_drawn_in_training_only(folder):
    model = load_pretrained(folder, head=HEAD)
    model.train()
    assert np.abs(our_logits(model) - our_logits(model)).max() > 1e-3
    model.eval()
    np.testing.assert_array_equal(our_logits(model), our_logits(loaded(folder)))
    changes = {"cls_dropout": 0.5, "pooler_dropout": 0.25}
    model = abstract(dataclasses.replace(model.config, **changes))
    attention = model.encoder.layer.attention.self
    assert (model.dropout.rate, model.pooler.dropout.rate) == (0.5, 0.25)
    assert (attention.dropout.rate, attention.pos_dropout.rate) == (0.1, 0.1)
    still = abstract(dataclasses.replace(model.config, **QUIET, cls_dropout=None, pooler_dropout=0))
    assert not jax.tree.leaves(nnx.state(still, nnx.RngState))


@pytest.mark.slow
def test_a_mesh_gives_what_one_device_gives(tmp_path):
    folder = save_deberta(tmp_path / "model", **{**VERSION_2, **QUIET, "num_labels": 2})
    check_mesh(folder, "classification")


@pytest.mark.slow
def test_plan_works(folder):
    check_plan_works(folder, labels=("no", "yes"))


WORDS = ("plot", "acting", "film", "dull", "funny", "loud", "moving", "long", "honest", "joy")


@pytest.mark.slow
def test_the_command_trains_a_pretrained_model_and_torch_says_the_same(tmp_path, capsys):
    """By the recipe in docs/how-to/classification.md, from rows to an adapter that PEFT reads."""
    save_deberta(tmp_path / "model", transformers.DebertaV2ForMaskedLM, **VERSION_3, **QUIET)
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    pieces = [*((name, 0.0) for name in special), *((f"▁{word}", -3.0) for word in WORDS)]
    tokenizer = transformers.DebertaV2Tokenizer(vocab=pieces, unk_id=3)
    tokenizer.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 4))) for _ in range(160)]
    labels = ["good" if "joy" in text else "bad" for text in texts]
    lines = [f"{text}\t{label}\n" for text, label in zip(texts, labels, strict=True)]
    for name, rows in (("train", lines[:128]), ("dev", lines[128:])):
        (tmp_path / f"{name}.tsv").write_text("".join(["sentence\tlabel\n", *rows]))
    flags = f"""--model {tmp_path}/model --task classification --data.path {tmp_path}/train.tsv
        --data.text-field sentence --data.max-length 16 --eval-path {tmp_path}/dev.tsv
        --method reflora --learning-rate 1e-2 --rank 8 --alpha 8
        --target-modules query_proj key_proj value_proj intermediate.dense output.dense
        --reflora-warmup-steps 10 --steps 40 --batch-size 16 --output {tmp_path}/run"""
    assert main(["finetune", *flags.split()]) == 0
    settings = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["classifier", "pooler.dense"]
    evaluate = f"--adapter {tmp_path}/run/adapter --data.path {tmp_path}/dev.tsv"
    capsys.readouterr()
    assert main(["evaluate", *evaluate.split(), "--data.text-field", "sentence"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    model = PeftModel.from_pretrained(base, tmp_path / "run/adapter").eval()
    with torch.no_grad():
        batch = tokenizer(texts[128:], return_tensors="pt", padding=True)
        right = model(**batch).logits.argmax(-1) == torch.tensor(
            [x == "good" for x in labels[128:]]
        )
    assert found["accuracy"] == pytest.approx(right.float().mean().item())
    assert found["accuracy"] > 0.9


def test_a_tokenizer_that_is_a_sentencepiece_model_alone_is_read(tmp_path):
    """As Microsoft publishes it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    special = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "unk": "[UNK]"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 9),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **{f"{name}_id": number for number, name in enumerate(special)},
        **{f"{name}_piece": piece for name, piece in special.items()},
    )
    (tmp_path / "spm.vocab").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deberta-v2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"vocab_type": "spm"}))
    encoded = load_tokenizer(tmp_path)("honest plot", "long")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    first, second = pieces.encode("honest plot"), pieces.encode("long")
    assert encoded["input_ids"] == [1, *first, 2, *second, 2]
    assert encoded["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)


def test_configurations_go_to_transformers_and_back():
    for config in (
        FAMILY.sizes["deberta-v3-base"],
        DebertaV2Config.from_hf({"model_type": "deberta-v2", **SIZES, **VERSION_2}),
        DebertaV2Config(embedding_size=64, cls_dropout=0.2, labels=("no", "yes", "maybe")),
    ):
        theirs = transformers.DebertaV2Config(**config.to_hf())
        assert theirs.num_labels == len(config.labels)
        assert DebertaV2Config.from_hf(theirs.to_dict()) == config
    assert DebertaV2Config.from_hf(transformers.DebertaV2Config().to_dict()) == DebertaV2Config()


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ("deberta-v3-xsmall", 70.7),
        ("deberta-v3-small", 141.3),
        ("deberta-v3-base", 183.8),
        ("deberta-v3-large", 434.0),
    ],
)
def test_well_known_models_have_as_many_parameters_as_in_torch(size, millions):
    with torch.device("meta"):
        theirs = transformers.DebertaV2Model(
            transformers.DebertaV2Config(**FAMILY.sizes[size].to_hf())
        )
    assert theirs.num_parameters() / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model_type", "deberta", "model_type is 'deberta', expected 'deberta-v2'"),
        ("architectures", ["DebertaV2ForTokenClassification"], "architectures names"),
        ("z_steps", 2, "z_steps is 2, only 0"),
        ("pos_att_type", "c2p|p2p", "pos_att_type has 'p2p', expected only 'c2p', 'p2c'"),
        ("pos_att_type", 2, "pos_att_type is 2, expected a list of names"),
        ("norm_rel_ebd", "batch_norm", "norm_rel_ebd is 'batch_norm', expected one of"),
        ("conv_kernel_size", 4, "conv_kernel_size is 4, expected an odd number"),
        ("conv_groups", 5, "hidden_size is 32, expected a multiple of conv_groups (5)"),
        ("conv_act", "swish", "conv_act is 'swish', expected one of"),
        ("num_attention_heads", 5, "expected a multiple of num_attention_heads (5)"),
        ("position_buckets", 1, "position_buckets is 1, which has no buckets"),
        ("position_buckets", 126, "up to max_relative_positions (64)"),
        ("position_buckets", -2, "position_buckets is -2, expected an integer from 1"),
        ("pooler_hidden_size", 48, "pooler_hidden_size is 48, only 32 is supported"),
        ("attention_head_size", 16, "attention_head_size is 16, only 8 is supported"),
        ("share_att_key", 1, "share_att_key is 1, expected true or false"),
        ("cls_dropout", 1.0, "cls_dropout is 1.0, expected a number in [0, 1)"),
        ("type_vocab_size", -3, "type_vocab_size is -3"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field, value, said):
    with pytest.raises(InputError) as raised:
        DebertaV2Config.from_hf({"model_type": "deberta-v2", **SIZES, field: value})
    assert said in str(raised.value)
